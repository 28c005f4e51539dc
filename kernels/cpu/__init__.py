"""Native kernels for the CPU."""

from __future__ import annotations


def load() -> bool:
    """Register the kernels with torch; False where they cannot be built."""
    return False
