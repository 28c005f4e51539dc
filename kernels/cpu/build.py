"""Compile the kernels for one level of instruction set; the result is cached on disk."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from filelock import FileLock

from ..cache_dir import cache_dir

_SOURCES = Path(__file__).resolve().parent
_VECTORS = ("avx2", "f16c", "fma", "bmi", "bmi2", "popcnt")
_WIDE = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi2")
_TILES = ("avx512bf16", "amx-tile", "amx-bf16", "amx-int8")
_EMULATED_TILES = "-DSPARK_EMULATED_TILES"
"""In $SPARK_COMPILE_CXXFLAGS: plain C++ stands in for the tile registers, for tests alone."""
LEVELS: dict[str, tuple[str, ...]] = {
    "amx": (*_VECTORS, *_WIDE, *_TILES),
    "avx512": (*_VECTORS, *_WIDE),
    "avx2": _VECTORS,
    "plain": (),
}
"""Instruction sets of each level, best first, as compilers name them; "plain" runs anywhere."""

_CAPABILITIES = {
    "fma": "fma3", "avx512f": "avx512_f", "avx512bw": "avx512_bw", "avx512dq": "avx512_dq",
    "avx512vl": "avx512_vl", "avx512vbmi2": "avx512_vbmi2", "avx512bf16": "avx512_bf16",
    "amx-tile": "amx_tile", "amx-bf16": "amx_bf16", "amx-int8": "amx_int8",
}  # fmt: skip


class BuildFailed(RuntimeError):
    """The kernels cannot be compiled here; the message says why."""


def supported() -> tuple[str, ...]:
    """The levels that this CPU and operating system can run, best first."""
    if not hasattr(torch.cpu, "get_capabilities"):  # before torch 2.13
        known = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        return ("avx2", "plain") if known else ("plain",)
    has, emulated = dict(torch.cpu.get_capabilities()), _EMULATED_TILES in _extra_flags()
    if emulated:
        has |= {_CAPABILITIES[name]: True for name in _TILES if name.startswith("amx")}
    runs = [
        name
        for name, sets in LEVELS.items()
        if all(has.get(_CAPABILITIES.get(s, s), False) for s in sets)
    ]
    # The kernel of the operating system has to grant the tile registers to this process.
    if "amx" in runs and not emulated and not torch.cpu._init_amx():
        runs.remove("amx")
    return tuple(runs)


def level() -> str:
    """The level to use: $SPARK_COMPILE_CPU, which may be "off", else the best supported one.

    Raises:
        ValueError: the variable names something else, or a level that this CPU cannot run.
    """
    runs, asked = supported(), os.environ.get("SPARK_COMPILE_CPU")
    if asked and asked not in (*runs, "off"):
        allowed = ", ".join((*runs, "off"))
        raise ValueError(f"SPARK_COMPILE_CPU is {asked!r}: allowed on this machine is {allowed}")
    return asked or runs[0]


def library(level: str) -> Path:
    """The shared library of a level, compiled if it is not in the cache yet.

    Several processes may ask at once: one compiles, the others wait for it.

    Raises:
        BuildFailed: there is no working compiler, or no folder to write to.
    """
    command = _command(level)
    folder = cache_dir() / "cpu"
    path = folder / f"{level}-{_key(command)}.so"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The system drops the lock of a process that dies, so nobody waits for a dead one.
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                _compile(command, path, level)
    except OSError as error:
        raise BuildFailed(f"cannot write to {folder}: {error}") from error
    return path


def _command(level: str) -> list[str]:
    """The compiler's command line without the output."""
    root = Path(torch.__file__).parent
    flags = [f"-m{name}" for name in LEVELS[level]]
    if level == "amx":
        flags.append("-DSPARK_AMX")
    return [
        _compiler(), "-O3", "-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden", *flags,
        f"-I{root / 'include'}", str(_SOURCES / "spark.cpp"),
        f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", *_extra_flags(),
    ]  # fmt: skip


def _extra_flags() -> list[str]:
    return os.environ.get("SPARK_COMPILE_CXXFLAGS", "").split()


def _compiler() -> str:
    """The compiler that Inductor uses."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return get_cpp_compiler()
    except Exception as error:
        raise BuildFailed(f"no C++ compiler: {error}") from error


def _key(command: list[str]) -> str:
    """A name for everything that the compiled library depends on."""
    digest = hashlib.sha256(repr((command, torch.__version__)).encode())
    digest.update(_run([command[0], "--version"]).encode())
    for source in sorted((*_SOURCES.glob("*.h"), *_SOURCES.glob("*.cpp"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(command: list[str], path: Path, level: str) -> None:
    print(f"spark-compile: building the CPU kernels ({level}), once ...", file=sys.stderr, end=" ")
    sys.stderr.flush()
    start = time.monotonic()
    half_done = path.with_suffix(f".{os.getpid()}")
    try:
        _run([*command, "-o", str(half_done)])
        half_done.replace(path)
    except BuildFailed:
        print("failed", file=sys.stderr)
        raise
    finally:
        half_done.unlink(missing_ok=True)
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)


def _run(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except OSError as error:
        raise BuildFailed(f"{command[0]} cannot be run: {error}") from error
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or [str(error)]
        raise BuildFailed(f"{command[0]}: {lines[0]}") from error
    return result.stdout
