"""What every test shares: a sys.path without the repository root, and a fresh compiler and seed."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# From the root, `import kernels` would find our folder instead of the PyPI package.
sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != ROOT]

import pytest  # noqa: E402
import torch  # noqa: E402

from spark_compile.report import forget_warnings  # noqa: E402

# Two workers of two threads each, all waiting for one another, take many times longer.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_compiler_and_seed() -> None:
    """Forget compiled graphs and given warnings, and seed the random numbers, before each test."""
    torch._dynamo.reset()
    forget_warnings()
    torch.manual_seed(0)
