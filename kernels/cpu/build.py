"""Compile the kernels for one level of instruction set; the result is cached on disk."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from filelock import FileLock

from ...torch_private import can_tile, inductor_config
from ..cache_dir import check_private, private_folder

_SOURCES = Path(__file__).resolve().parent
_VECTORS = ("avx2", "f16c", "fma", "bmi", "bmi2", "popcnt")
_WIDE = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi2", "avx512vnni")
_TILES = ("avx512bf16", "amx-tile", "amx-bf16", "amx-int8")
_EMULATED_TILES = "-DSPARK_EMULATED_TILES"
"""In $SPARK_COMPILE_CXXFLAGS: plain C++ stands in for the tile registers, for tests alone."""
_STANDALONE = "-DSPARK_DEFINE_OPERATORS"
LEVELS: dict[str, tuple[str, ...]] = {
    "amx": (*_VECTORS, *_WIDE, *_TILES),
    "avx512": (*_VECTORS, *_WIDE),
    "avxvnni": (*_VECTORS, "avxvnni"),
    "avx2": _VECTORS,
    "neon": ("dotprod",),
    "plain": (),
}
"""Instruction sets of each level, best first, as compilers name them: "neon" is ARM's, "plain" runs
anywhere."""

_CAPABILITIES = {
    "fma": "fma3", "avx512f": "avx512_f", "avx512bw": "avx512_bw", "avx512dq": "avx512_dq",
    "avx512vl": "avx512_vl", "avx512vbmi2": "avx512_vbmi2", "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16", "avxvnni": "avx_vnni",
    "amx-tile": "amx_tile", "amx-bf16": "amx_bf16", "amx-int8": "amx_int8", "dotprod": "dot",
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
    if "amx" in runs and not emulated and not can_tile():
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


@contextlib.contextmanager
def library(level: str, *, standalone: bool = False) -> Iterator[Path]:
    """The shared library of a level, compiled if it is not in the cache yet.

    A standalone one has the operators' schemas too, for programs without Python.

    Several processes may ask at once: one compiles, the others wait for it. Where the cache cannot
    be used, which a warning says, the library is there for as long as the context lasts.

    Raises:
        BuildFailed: there is no working compiler, or no folder at all to write to.
        ValueError: $SPARK_COMPILE_CXX_TIMEOUT is not a number of seconds.
    """
    if os.name != "posix":
        raise BuildFailed(f"they are for Linux and macOS, this is {sys.platform}")
    limit, compiler = compile_seconds(), compiler_command()
    command = [*compiler, *_arguments(level), *([_STANDALONE] if standalone else [])]
    name = f"{level}-{_key(compiler, command)}"
    with contextlib.ExitStack() as temporary:
        yield _kept_library(name, limit, lambda: _compile(command, level, temporary))


def compile_seconds() -> float:
    """After how many seconds a compiler is given up: $SPARK_COMPILE_CXX_TIMEOUT, else 300.

    Raises:
        ValueError: the variable is no number, or out of range.
    """
    text = os.environ.get("SPARK_COMPILE_CXX_TIMEOUT") or "300"
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 86400:
        raise ValueError(
            f"SPARK_COMPILE_CXX_TIMEOUT is {text!r}: allowed is a number of seconds up to 86400"
        )
    return seconds


def _kept_library(name: str, limit: float, compiled: Callable[[], Path]) -> Path:
    """The library in the cache; the compiled one itself where that cannot be used."""
    built = None
    try:
        folder = private_folder("cpu")
        if path := _find(folder, name):
            return path
        lock = folder / f"{name}.lock"
        if os.path.lexists(lock):
            check_private(lock)
        # The system drops the lock of a process that dies, so nobody waits for a dead one.
        with FileLock(lock, timeout=limit + 10, mode=0o600):
            if path := _find(folder, name):
                return path
            built = compiled()
            return _keep(built, folder, name)
    except (OSError, NotImplementedError) as error:  # the latter: no locks on this file system
        warnings.warn(
            f"the native CPU kernels cannot be kept, every process compiles its own: {error}. "
            "Set SPARK_COMPILE_CACHE for another folder",
            RuntimeWarning,
            stacklevel=2,
        )
    return built or compiled()


def _find(folder: Path, name: str) -> Path | None:
    """A library with the bytes that were compiled: a truncated one would kill the process."""
    for path in folder.glob(f"{name}-*.so"):
        with contextlib.suppress(FileNotFoundError):  # another process has just removed it
            check_private(path)
            if path.stem == f"{name}-{hashlib.sha256(path.read_bytes()).hexdigest()}":
                return path
    return None


def _keep(built: Path, folder: Path, name: str) -> Path:
    """Copy a library to the cache, where its name has its checksum, in place of damaged ones."""
    data = built.read_bytes()
    path = folder / f"{name}-{hashlib.sha256(data).hexdigest()}.so"
    descriptor, half_done = tempfile.mkstemp(prefix=f"{name}.", dir=folder)  # mode 0600
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        for damaged in folder.glob(f"{name}-*.so"):
            damaged.unlink()
        os.replace(half_done, path)
    finally:
        Path(half_done).unlink(missing_ok=True)
    return path


def _arguments(level: str) -> list[str]:
    """Those of the compiler, without the output."""
    root = Path(torch.__file__).parent
    return [
        "-O3", "-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden", *machine_flags(level),
        f"-I{root / 'include'}", str(_SOURCES / "spark.cpp"),
        f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", *_extra_flags(),
    ]  # fmt: skip


def machine_flags(level: str) -> list[str]:
    """What a compiler is told of a level."""
    if level == "neon":  # some compilers for ARM have its instruction sets at "plain", too
        return ["+".join(("-march=armv8.2-a", *LEVELS[level])), "-DSPARK_NEON"]
    tiles = ["-DSPARK_AMX"] if level == "amx" else []
    return [*(f"-m{name}" for name in LEVELS[level]), *tiles]


def _extra_flags() -> list[str]:
    return os.environ.get("SPARK_COMPILE_CXXFLAGS", "").split()


def compiler_command() -> list[str]:
    """The compiler that Inductor uses; unlike there, $CXX may have arguments ("ccache g++")."""
    config = inductor_config()
    # Not Inductor's own search, which waits for a compiler that hangs.
    asked = config.cpp.cxx if isinstance(config.cpp.cxx, (list, tuple)) else (config.cpp.cxx,)
    for text in filter(None, asked):
        for command in ([text], text.split()):
            if command and shutil.which(command[0]):
                return command
    raise BuildFailed(
        f"no C++ compiler: CXX is {os.environ.get('CXX', 'g++')!r}, which cannot be run"
    )


def _key(compiler: list[str], command: list[str]) -> str:
    """A name for everything that the compiled library depends on."""
    digest = hashlib.sha256(repr((command, torch.__version__)).encode())
    digest.update(_run([*compiler, "--version"]).encode())
    for source in sorted((*_SOURCES.glob("*.h"), *_SOURCES.glob("*.cpp"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(command: list[str], level: str, temporary: contextlib.ExitStack) -> Path:
    """Compile in a private folder, which lasts as long as `temporary`."""
    _tell(f"spark-compile: building the CPU kernels ({level}), once ... ")
    start, outcome = time.monotonic(), "failed\n"
    try:
        scratch = tempfile.TemporaryDirectory(prefix="spark-compile-", ignore_cleanup_errors=True)
        folder = Path(temporary.enter_context(scratch))
        # What the compiler leaves behind when it is killed goes with the folder.
        _run([*command, "-o", str(folder / "spark.so")], TMPDIR=str(folder))
        if not (folder / "spark.so").exists():
            raise BuildFailed(f"{command[0]} made no library")
        outcome = f"{time.monotonic() - start:.0f} s\n"
    except OSError as error:
        raise BuildFailed(f"no folder to compile in: {error}") from error
    finally:
        _tell(outcome)
    return folder / "spark.so"


def _tell(text: str) -> None:
    # A daemon may have closed its error output, or have none.
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(text, file=sys.stderr, end="", flush=True)


def _run(command: list[str], **environment: str) -> str:
    """What a command printed; it and all that it started are ended if this is interrupted."""
    limit = compile_seconds()
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # its processes are a group, which can be killed
            env={**os.environ, "LC_ALL": "C", **environment},  # the error is looked for in English
        )
    except OSError as error:
        raise BuildFailed(f"{command[0]} cannot be run: {error}") from error
    with process:
        try:
            output, errors = process.communicate(timeout=limit)
        except BaseException as error:  # Ctrl-C, too
            with contextlib.suppress(OSError):  # it has just ended by itself
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                said = f"has not ended after {limit:g} s (SPARK_COMPILE_CXX_TIMEOUT)"
                raise BuildFailed(f"{command[0]} {said}") from error
            raise
    if process.returncode:
        # Of the compiler and the linker, and of the assembler.
        lines = [line for line in errors.splitlines() if "error" in line or "Error" in line]
        reason = lines[0] if lines else f"it ended with status {process.returncode}"
        raise BuildFailed(f"{command[0]}: {reason}")
    return output
