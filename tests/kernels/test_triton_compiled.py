"""Every Triton kernel compiled for NVIDIA and AMD GPUs without one: registers, spills, memory.

What is compiled is what ``launch`` starts: its calls are recorded with tensors that have no data.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from spark_compile.kernels.formats import parse
from spark_compile.kernels.reference.store import ALL
from spark_compile.kernels.spec import SIDES, Spec

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from spark_compile.kernels.triton import blocks, launch  # noqa: E402
from spark_compile.kernels.triton.ops import EAGER  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
SHARED_BYTES = {
    "sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx90a": 64 << 10,
    "gfx942": 64 << 10, "gfx950": 160 << 10,
}  # fmt: skip
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8",
    torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
    torch.bool: "i1",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages")
SCALARS = 16
"""Scalar registers that LLVM may be short of on AMD: they go to lanes of vector registers."""


class Call(NamedTuple):
    """One start of a kernel."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


class Usage(NamedTuple):
    """What a compiled kernel takes."""

    registers: int
    spills: int
    """Bytes of stack on NVIDIA; spilled vector registers and bytes of scratch on AMD."""
    scalar_spills: int
    """Scalar registers that AMD moves into lanes of vector registers, not to memory."""
    shared_bytes: int


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Call]]:
    """The kernels that ``launch`` starts, which are not run."""
    recorded: list[Call] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            def start(*arguments: Any, **named: Any) -> None:
                options = {name: named.pop(name) for name in OPTIONS if name in named}
                given = {**dict(zip(self.kernel.arg_names, arguments, strict=False)), **named}
                recorded.append(Call(self.kernel, given, options))

            return start

    monkeypatch.setattr(launch, "wrap_triton", Recorder)
    with torch.device("meta"):
        yield recorded


def compiled(call: Call, target: str) -> Any:
    """The binary for a target, as Triton would make it at that call."""
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(call.kernel.params):
        name, value = parameter.name, call.arguments[parameter.name]
        specialized = not parameter.do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or (specialized and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if specialized and value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(call.kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=call.options)


def used(call: Call, target: str) -> Usage:
    """What the kernel takes on a target."""
    usage = _nvidia if TARGETS[target].backend == "cuda" else _amd
    return usage(compiled(call, target))


def _nvidia(binary: Any) -> Usage:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report)
    assert found, report
    registers, stack, local = map(int, found.groups())
    return Usage(registers, stack + local, 0, binary.metadata.shared)


def _amd(binary: Any) -> Usage:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", binary.asm["amdgcn"])
        assert found, name
        return int(found[1])

    spilled = field("vgpr_spill_count") + field("private_segment_fixed_size")
    scalars = field("sgpr_spill_count")
    return Usage(field("vgpr_count"), spilled, scalars, binary.metadata.shared)


class Step(NamedTuple):
    """A step of a decoder, over a cache of 4096 tokens."""

    key: str = "spark(kept={0})"
    value: str = "dense"
    dim: int = 128
    value_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    group: int = 4
    queries: int = 1
    mask: torch.dtype | None = None
    softcap: float = 0.0
    keep: int | None = ALL

    def start(self) -> None:
        """Start the kernels of 2 sequences of 4 heads."""
        formats = [
            parse(text.format(dim // 5), dim, self.dtype)
            for text, dim in ((self.key, self.dim), (self.value, self.value_dim))
        ]
        spec = Spec(*formats, 32, 32, 4, 0, 0.1, self.softcap)
        sizes = (2, 4, self.queries)
        new = [torch.empty(*sizes, dim, dtype=self.dtype) for dim in (self.dim, self.value_dim)]
        stored = []
        for side in SIDES:
            rows, page = int(spec.head(side).head_bytes(96)), spec.pages(side).page_bytes
            stored += [
                torch.empty(2, 4, 128, page, dtype=torch.uint8),
                torch.empty(2, 4, rows, dtype=torch.uint8),
            ]
        mask = None
        if self.mask is not None:
            mask = torch.empty(2, 1, self.queries, 4300, dtype=self.mask)
        query = torch.empty(2, 4 * self.group, self.queries, self.dim, dtype=self.dtype)
        position = torch.empty(1, dtype=torch.int64)
        sinks = torch.empty(4 * self.group)
        EAGER["step"](query, *new, *stored, mask, sinks, 99, self.keep, position, spec.text)


INT8 = ("spark(kept={0},stored=int8)", "pruned(kept={0},stored=int8)")
FULL: dict[str, Any] = {
    "key": INT8[0], "value": INT8[1], "mask": torch.float32, "softcap": 5.0,
}  # fmt: skip
BITS = {"key": "quantized(bits=6,scaled=True)", "value": "quantized(bits=4)"}
USUAL = (
    Step(), Step(**FULL), Step(**FULL, queries=9), Step(**FULL, dtype=torch.float32),
    Step(**BITS), Step(**BITS, queries=9, mask=torch.bool), Step("int8", "int8"),
)  # fmt: skip
OTHERS = (
    USUAL[1], Step("int8", "spark(kept={0})", dtype=torch.float32), Step(**BITS),
    Step("quantized(bits=4-2-2-1,scaled=True)", "int8", dim=256), Step(keep=None),
)  # fmt: skip
FORMATS = (
    ("dense", "dense"), ("int8", "int8"), ("spark(kept={0})", "pruned(kept={0})"), INT8,
    ("quantized(bits=6,scaled=True)", "quantized(bits=6)"),
    ("quantized(bits=8,scaled=True)", "quantized(bits=8)"),
    ("quantized(bits=4-2-2-1,scaled=True)", "quantized(bits=3)"),
    ("quantized(bits=5-3,scaled=True)", "quantized(bits=4)"),
)  # fmt: skip
EVERY = tuple(
    Step(*formats, dim, dim, dtype, group, queries, torch.bool, 5.0)
    for dim, dtype, (group, queries), formats in itertools.product(
        (32, 64, 80, 128, 256),
        (torch.bfloat16, torch.float32),
        ((1, 1), (7, 1), (4, 9)),
        FORMATS,
    )
    if blocks.fits(dim, dim, dtype)
)


def half_are_fast(steps: tuple[Step, ...]) -> list[Any]:
    """Targets and what is compiled for them; fast is every second step on one target."""
    slow = [("sm_90", steps[1::2]), *((target, steps) for target in TARGETS if target != "sm_90")]
    return [
        pytest.param("sm_90", steps[::2], id="sm_90"),
        *(pytest.param(*case, id=f"{case[0]}-slow", marks=pytest.mark.slow) for case in slow),
    ]


def check(calls: list[Call], target: str) -> None:
    """There is the shared memory, and nothing spills but some scalars of AMD to vector lanes."""
    excess = []
    for call in calls:
        usage = used(call, target)
        print(call.kernel.__name__, target, *usage)
        moved = usage.scalar_spills > SCALARS
        if usage.spills or moved or usage.shared_bytes > SHARED_BYTES[target]:
            excess.append((call.kernel.__name__, usage, call.options, _sizes(call)))
    assert not excess, "\n".join(map(str, excess))


def _sizes(call: Call) -> dict[str, Any]:
    return {n: v for n, v in call.arguments.items() if n.isupper() or n == "group"}


def on(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``launch`` choose as it does on a target."""
    amd = TARGETS[target].backend == "hip"
    monkeypatch.setattr(torch.version, "hip", "7" if amd else None)


@pytest.mark.parametrize(("target", "configurations"), half_are_fast(USUAL))
def test_attention_spills_nothing(
    target: str, configurations: tuple[Step, ...], calls: list[Call],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    on(target, monkeypatch)
    for configuration in configurations:
        configuration.start()
    check([call for call in calls if call.kernel is launch.attend_split], target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_no_configuration_of_attention_spills(
    target: str, calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    on(target, monkeypatch)
    for configuration in EVERY:
        configuration.start()
    check([call for call in calls if call.kernel is launch.attend_split], target)


@pytest.mark.parametrize(("target", "configurations"), half_are_fast(OTHERS))
def test_the_other_kernels_spill_nothing(
    target: str, configurations: tuple[Step, ...], calls: list[Call]
) -> None:
    for configuration in configurations:
        configuration.start()
    check([call for call in calls if call.kernel is not launch.attend_split], target)


def test_ranks_are_one_instruction(calls: list[Call]) -> None:
    """LLVM has to recognise the popcount that is written out for want of a portable one."""
    Step().start()
    call = next(call for call in calls if call.kernel is launch.attend_split)
    for target, instruction in (("sm_90", "popc.b32"), ("gfx942", "v_bcnt_u32_b32")):
        binary = compiled(call._replace(arguments={**call.arguments, "PRECISION": "ieee"}), target)
        text = binary.asm.get("ptx") or binary.asm["amdgcn"]
        assert text.count(instruction) >= 8
        assert "0x33333333" not in text
        assert "858993459" not in text
