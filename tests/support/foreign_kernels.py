"""The CPU kernels compiled for another kind of processor, which an emulator runs.

As a plugin (``pytest -p foreign_kernels``) this lets tests that run here have ``spark::build``,
``spark::step`` and ``spark::step_partial`` of that processor, without torch on it:
$SPARK_FOREIGN_KERNELS is the command that starts them.
"""

from __future__ import annotations

import os
import shlex
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spark_compile.kernels import cpu
from spark_compile.kernels.cpu import build as cpu_build

VARIABLE = "SPARK_FOREIGN_KERNELS"
DRIVER = Path(__file__).with_suffix(".cpp")
DTYPES = {
    torch.uint8: 0, torch.int32: 3, torch.int64: 4, torch.float16: 5, torch.float32: 6,
    torch.float64: 7, torch.bool: 11, torch.bfloat16: 15,
}  # fmt: skip
"""What the driver calls them."""
WANTED = {"build": 0, "step": 1, "step_partial": 2}

Operands = Sequence[Tensor | int | None]


def compile_driver(compiler: str, level: str, folder: Path) -> Path:
    """The program that runs the kernels of a level.

    Raises:
        BuildFailed: it cannot be compiled.
    """
    program = folder / f"kernels-{level}"
    includes = (Path(cpu_build.__file__).parent, Path(torch.__file__).parent / "include")
    # What else of torch is called only for operators of Python.
    flags = ["-O3", "-std=c++20", "-static", "-Wl,--unresolved-symbols=ignore-all"]
    flags += [*cpu_build.machine_flags(level), *(f"-I{folder}" for folder in includes)]
    cpu_build._run([compiler, *flags, str(DRIVER), "-o", str(program)])
    return program


class Emulated:
    """The operators of a driver that runs."""

    def __init__(self, command: str) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(shlex.split(command), stdin=pipe, stdout=pipe)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout

    def build(
        self, key: Tensor, value: Tensor, queries: list[Tensor], text: str, capacity: int | None,
        positions: Tensor | None = None,
    ) -> Sequence[Tensor]:  # fmt: skip
        counted = _operands((key, value)) + struct.pack("<q", len(queries)) + _operands(queries)
        found = self._ask("build", text, counted + _operands((capacity, positions)))
        if found is None:
            args = (key, value, queries, text, capacity, positions)
            return torch.ops.spark_reference.build(*args)
        return found

    def step(self, *args: Any) -> Tensor:
        return self._step("step", args)

    def step_partial(self, *args: Any) -> tuple[Tensor, Tensor]:
        return self._step("step_partial", args)

    def _step(self, name: str, args: tuple[Any, ...]) -> Any:
        found = self._ask(name, args[-1], _operands(args[:-1]))
        if found is None:
            return getattr(torch.ops.spark_reference, name)(*args)
        for mine, theirs in zip(args[3:7], found[:4], strict=True):
            mine.copy_(theirs)
        return found[4] if name == "step" else tuple(found[4:])

    def _ask(self, name: str, text: str, operands: bytes) -> list[Tensor] | None:
        """The tensors that come of an operator; nothing if native code cannot do it."""
        self._to.write(struct.pack("<qq", WANTED[name], len(text)) + text.encode() + operands)
        self._to.flush()
        count = self._number()
        if count < 0:
            raise ValueError(self._from.read(self._number()).decode())
        return [self._tensor() for _ in range(count)] or None

    def _number(self) -> int:
        data = self._from.read(8)
        assert len(data) == 8, f"the foreign kernels have ended: {self._process.wait()}"
        return int.from_bytes(data, "little", signed=True)

    def _tensor(self) -> Tensor:
        dtype = {code: dtype for dtype, code in DTYPES.items()}[self._number()]
        shape = torch.Size(self._number() for _ in range(self._number()))
        if not shape.numel():
            return torch.empty(shape, dtype=dtype)
        data = bytearray(self._from.read(shape.numel() * dtype.itemsize))
        return torch.frombuffer(data, dtype=dtype).view(shape)


def _operands(operands: Operands) -> bytes:
    return b"".join(map(_operand, operands))


def _operand(operand: Tensor | int | None) -> bytes:
    if operand is None:
        return struct.pack("<q", -1)
    tensor = torch.tensor([operand]) if isinstance(operand, int) else operand.contiguous()
    head = struct.pack(f"<{2 + tensor.dim()}q", DTYPES[tensor.dtype], tensor.dim(), *tensor.shape)
    return head + tensor.flatten().view(torch.uint8).numpy().tobytes()


def pytest_configure() -> None:
    """Let them be the native kernels."""
    emulated = Emulated(os.environ[VARIABLE])
    library = torch.library.Library("spark", "IMPL")
    loaded: list[bool] = []

    def load() -> bool:
        if not loaded:  # the schemas are there now
            for name in WANTED:
                library.impl(name, getattr(emulated, name), "CPU")
            loaded.append(True)
        return True

    cpu.load = load
