"""The numerical tests of the Triton kernels where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
NUMERICS = Path(__file__).with_name("test_triton_numerics.py")


def test_numerics_in_the_interpreter() -> None:
    """In a process of its own: Triton looks at the variable when it is imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(NUMERICS)],
        env={**environment, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=NUMERICS.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-2000:]
