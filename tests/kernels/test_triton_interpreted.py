"""The numerical tests of the Triton kernels where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
NUMERICS = Path(__file__).with_name("test_triton_numerics.py")


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_numerics_in_the_interpreter(which: str) -> None:
    """In a process of its own: Triton looks at the variable when it is imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", which]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(NUMERICS)],
        env={**environment, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=NUMERICS.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-2000:]
