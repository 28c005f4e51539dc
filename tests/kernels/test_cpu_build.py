"""Choosing a level of instruction sets and compiling for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spark_compile.kernels.cpu import build

SUPPORTED = build.supported()


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache."""
    monkeypatch.setenv("SPARK_COMPILE_CACHE", str(tmp_path))
    return tmp_path


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
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has | {"f16c": False})
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
        "sides = 'layout=1;key=dense:4:float32;value=dense:4:float32'\n"
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


def test_two_processes_build_once(folder: Path) -> None:
    code = "from spark_compile.kernels.cpu.build import library; print(library('plain'))"
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    (first, first_log), (second, second_log) = (process.communicate() for process in both)
    assert first == second
    assert Path(first.strip()).exists()
    assert (first_log + second_log).count("building the CPU kernels (plain), once") == 1


def test_a_failed_build_names_the_error_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARK_COMPILE_CXXFLAGS", "-no-such-flag-exists")
    with pytest.raises(build.BuildFailed, match="no-such-flag-exists"):
        build.library("plain")
    assert not [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
