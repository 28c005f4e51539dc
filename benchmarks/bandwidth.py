"""The read-bandwidth limit: how fast all threads together read memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .measure import Contender

_WAYS: dict[str, Callable[[Tensor], object]] = {
    "sum": torch.sum,
    "amax": torch.amax,
    "dot": lambda buffer: torch.dot(buffer, buffer),
    "matrix-vector": lambda buffer: torch.mv(buffer.view(-1, 4096), buffer[:4096]),
}


def fastest_reader(buffer_bytes: int, tries: int = 3) -> Contender:
    """The fastest of some ways to read a float32 buffer once, as a contender to be timed again.

    The buffer should be larger than the last-level cache.
    """
    buffer = torch.ones(max(buffer_bytes // 4 // 4096, 1) * 4096)
    best_ms = {}
    for name, way in _WAYS.items():
        reader = Contender(name, [lambda way=way: way(buffer)], buffer.nbytes)
        best_ms[name] = min(reader.time_ms(1) for _ in range(tries))
    name = min(best_ms, key=best_ms.__getitem__)
    way = _WAYS[name]
    return Contender(f"read ({name})", [lambda: way(buffer)], buffer.nbytes)


def read_bytes_per_s(reader: Contender) -> float:
    """The best bandwidth a reader reached: a limit, so not the median."""
    return reader.moved_bytes / min(reader.times_ms) * 1000
