"""Choosing a level of instruction sets and compiling for it."""

from __future__ import annotations

import functools
import io
import platform
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from fake_compiler import FAKE, ended, files, obtain

from spark_compile.kernels import cpu
from spark_compile.kernels.cpu import build

SUPPORTED = build.supported()


def test_the_best_supported_level_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARK_COMPILE_CPU", raising=False)
    assert build.level() == SUPPORTED[0]
    assert SUPPORTED[-1] == "plain"


def test_a_level_that_this_machine_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_COMPILE_CPU", "sse9")
    with pytest.raises(ValueError, match=r"SPARK_COMPILE_CPU is 'sse9': allowed .* plain, off"):
        build.level()


def test_an_older_cpu_gets_a_lower_level(monkeypatch: pytest.MonkeyPatch) -> None:
    has = {"avx2": True, "f16c": True, "fma3": True, "bmi": True, "bmi2": True, "popcnt": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert build.supported() == ("avx2", "plain")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has | {"avx_vnni": True})
    assert build.supported() == ("avxvnni", "avx2", "plain")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has | {"f16c": False})
    assert build.supported() == ("plain",)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"neon": True, "dot": True})
    assert build.supported() == ("neon", "plain")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"neon": True, "dot": False})
    assert build.supported() == ("plain",)


def test_tiles_need_the_permission_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)
    assert "amx" not in build.supported()


def test_tiles_can_be_emulated_for_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = {"amx-tile", "amx-bf16", "amx-int8"}
    needed = [s for s in build.LEVELS["amx"] if s not in tiles]
    has = {build._CAPABILITIES.get(name, name): True for name in needed}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False, raising=False)
    monkeypatch.delenv("SPARK_COMPILE_CXXFLAGS", raising=False)
    assert "amx" not in build.supported()
    monkeypatch.setenv("SPARK_COMPILE_CXXFLAGS", "-O1 -DSPARK_EMULATED_TILES")
    assert build.supported()[0] == "amx"


def test_no_compiler_is_said_once_and_leaves_the_reference(folder: Path) -> None:
    code = (
        "import torch, warnings\n"
        "from spark_compile import ops\n"
        "sides = 'layout=4;key=dense:4:float32;value=dense:4:float32'\n"
        "spec, rows = f'{sides};window=8;recent=0;sinks=0;min_tokens=0', torch.ones(1, 2, 3, 4)\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2):\n"
        "        _, head, _, _ = ops.build(rows, rows, [rows], spec, None)\n"
        "        print(head.view(torch.int64)[0, 0, 0].item())\n"
        "print([str(w.message)[:22] for w in seen])\n"
    )
    environment = {
        "CXX": "/no/such/compiler",
        "PATH": "/nowhere",
        "SPARK_COMPILE_CACHE": str(folder),
    }
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.stdout.split("\n")[:3] == ["3", "3", "['no native CPU kernels,']"], result.stderr


def test_a_failed_build_names_the_error_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARK_COMPILE_CXXFLAGS", "-no-such-flag-exists")
    with pytest.raises(build.BuildFailed, match="no-such-flag-exists"), build.library("plain"):
        pass
    assert files(folder) == []


@pytest.mark.parametrize("command", ["--version", "-o"])
def test_a_compiler_that_hangs_is_given_up(
    folder: Path, fake: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = folder / "child"
    case = f'case "$*" in *{command}*) sleep 600 & echo $! > "{child}"; wait;; esac\n'
    fake.write_text(FAKE.replace("#!/bin/sh\n", "#!/bin/sh\n" + case))
    monkeypatch.setenv("SPARK_COMPILE_CXX_TIMEOUT", "0.5")
    said = r"fake c\+\+ has not ended after 0.5 s \(SPARK_COMPILE_CXX_TIMEOUT\)"
    with pytest.raises(build.BuildFailed, match=said):
        obtain()
    assert ended(int(child.read_text()))


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", "1e9"])
def test_a_limit_that_is_none_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_COMPILE_CXX_TIMEOUT", value)
    with pytest.raises(ValueError, match=f"SPARK_COMPILE_CXX_TIMEOUT is '{value}': allowed is a"):
        obtain()


@pytest.mark.parametrize("stream", [None, "closed"])
def test_a_daemon_without_error_output_can_build(
    folder: Path, fake: Path, stream: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed if stream else None)
    assert obtain()[1]


def test_a_compiler_may_have_arguments(monkeypatch: pytest.MonkeyPatch, fake: Path) -> None:
    for text, command in (
        ("env -u LANG g++", ["env", "-u", "LANG", "g++"]),
        (str(fake), [str(fake)]),  # its name has a space
    ):
        with torch._inductor.config.patch({"cpp.cxx": (None, text)}):
            assert build.compiler_command() == command
    monkeypatch.setenv("CXX", "")
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "")}),
        pytest.raises(build.BuildFailed, match="no C\\+\\+ compiler: CXX is ''"),
    ):
        build.compiler_command()


def test_gcc_before_12_can_compile_the_sources() -> None:
    """It lacks a builtin; names that nothing defines stand for that where the compiler is newer."""
    compiler = build.compiler_command()
    if "clang" in build._run([*compiler, "--version"]):
        pytest.skip("this compiler is not GCC")
    is_arm = platform.machine() in ("aarch64", "arm64")
    levels = ("plain", "neon") if is_arm else ("plain", "avx2", "avxvnni", "avx512")
    for level in levels:
        older = ["-U__GNUC__", "-D__GNUC__=11", "-D__builtin_shufflevector=newer", "-fsyntax-only"]
        build._run([*compiler, *build._arguments(level), "-O0", *older])


def test_a_compiler_that_makes_nothing_is_said(folder: Path, fake: Path) -> None:
    fake.write_text("#!/bin/sh")
    with pytest.raises(build.BuildFailed, match=r"fake c\+\+ made no library"):
        obtain()


def test_why_a_library_cannot_be_loaded_is_said(folder: Path, fake: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"reference runs instead: .*\.so: .*file too short"):
        assert not cpu._load.__wrapped__()


def test_threads_load_one_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def slow(name: str) -> NoReturn:
        asked.append(name)
        time.sleep(0.1)
        raise build.BuildFailed("this is a test")

    monkeypatch.setattr(cpu, "library", slow)
    monkeypatch.setattr(cpu, "_load", functools.cache(cpu._load.__wrapped__))
    with ThreadPoolExecutor(3) as threads, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loaded = list(threads.map(lambda _: cpu.load(), range(3)))
    assert (loaded, asked, len(seen)) == ([False] * 3, [cpu.level()], 1)


def test_the_child_of_a_fork_runs_without_the_threads_of_its_parent() -> None:
    if not cpu.load():
        pytest.skip("there are no native kernels here")
    code = (
        "import os, signal, torch\n"
        "torch.set_num_threads(4)\n"
        "from spark_compile import ops\n"
        "sides = 'layout=4;key=dense:64:float32;value=dense:64:float32'\n"
        "spec = f'{sides};window=32;recent=0;sinks=0;min_tokens=0'\n"
        "rows, query = torch.ones(1, 4, 1024, 64), torch.ones(1, 4, 1, 64)\n"
        "def attend():\n"
        "    built = ops.build(rows, rows, [rows], spec, None)\n"
        "    new, scale = (query, query, query), ';scale=0.1;softcap=0.0'\n"
        "    return ops.step(*new, *built, None, None, None, None, None, spec + scale).tolist()\n"
        "expected, child = attend(), os.fork()\n"
        "if not child:\n"
        "    signal.alarm(20)\n"
        "    os._exit(attend() != expected)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
