"""The CPU kernels for ARM in an emulator: on ARM itself the other tests of the kernels run them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import foreign_kernels
import pytest

from spark_compile.kernels.cpu import build

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [name for name in (COMPILER, EMULATOR) if not shutil.which(name)]
OF_THIS_MACHINE = ("every_other_level", "memory_of_their_own")
"""Tests that have nothing to do with what the emulator runs."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The command that starts them."""
    program = foreign_kernels.compile_driver(COMPILER, "neon", tmp_path_factory.mktemp("neon"))
    return f"{EMULATOR} -cpu max {program}"


@pytest.mark.parametrize("name", ["test_cpu", "test_cpu_edges"])
def test_they_do_as_the_reference_does(kernels: str, name: str) -> None:
    file = Path(__file__).with_name(f"{name}.py")
    left_out = " and ".join(f"not {test}" for test in OF_THIS_MACHINE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "foreign_kernels", "-k", left_out, str(file)]
    support = str(Path(foreign_kernels.__file__).parent)
    environment = {**os.environ, "PYTHONPATH": support, foreign_kernels.VARIABLE: kernels}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


@pytest.mark.parametrize("level", ["neon", "plain"])
def test_the_library_can_be_compiled(level: str) -> None:
    """Not linked: torch's libraries are those of this machine."""
    build._run([COMPILER, *build._arguments(level), "-O0", "-fsyntax-only"])
