"""The stored tensors of random keys and values, as ``spark_compile/ops.py`` takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spark_compile import ops


@dataclass(frozen=True)
class Store:
    """Buffers with unused rows, and the dense keys and values that they are worth."""

    query: Tensor
    packed: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    """kept, bits, scale, norms, packed_length."""
    tail: Tensor
    values: Tensor
    length: int
    key: Tensor
    value: Tensor
    sink_tokens: int
    recovery: str
    saliency: str
    packed_values: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    """value_bits, value_scale, value_bias."""

    @property
    def method(self) -> tuple[int, str, str]:
        return self.sink_tokens, self.recovery, self.saliency

    def buffers(self) -> tuple[Any, ...]:
        """What ``attend`` takes between the query and the mask; tail and values are copies."""
        return *self.packed, self.tail.clone(), self.values.clone(), self.length

    def value_buffers(self) -> tuple[Any, ...]:
        """What ``attend`` takes behind ``return_lse``; bits and scale are copies."""
        bits, scale, bias = self.packed_values
        return *(None if t is None else t.clone() for t in (bits, scale)), bias


def store(
    dtype: torch.dtype = torch.float32,
    *,
    queries: int = 1,
    packed: int = 6,
    dense: int = 5,
    room: int = 4,
    dims: tuple[int, int] = (12, 10),
    heads: tuple[int, int] = (4, 2),
    kept: int = 5,
    sink_tokens: int = 1,
    recovery: str = "degenerate",
    saliency: str = "squared",
    poison: float = 0.0,
    quantized: tuple[bool, bool] = (False, False),
    value_kept: int | None = None,
) -> Store:
    """``packed`` and ``dense`` tokens, with ``room`` unused rows of ``poison`` in each buffer.

    Args:
        quantized: whether keys and whether values are int8.
        value_kept: Tv of pruned values; None keeps every channel.
    """
    batch, (query_heads, kv_heads), (key_dim, value_dim) = 2, heads, dims
    query = torch.randn(batch, query_heads, queries, key_dim, dtype=dtype)
    body = torch.randn(batch, kv_heads, packed, key_dim, dtype=dtype)
    ends = torch.randn(batch, kv_heads, dense, key_dim, dtype=dtype)
    value = torch.randn(batch, kv_heads, packed + dense, value_dim, dtype=dtype)
    norms = torch.rand(batch, kv_heads, key_dim) + 0.1
    rows = ops.prune(body, norms, norms, kept, recovery, saliency, quantized[0])
    tail = with_room(ends, room, poison)
    filled = (*(with_room(t, room, poison) for t in rows), norms, torch.tensor(packed))
    length = packed + dense
    key = ops.recover(*filled, tail, length, sink_tokens, recovery, saliency)  # type: ignore[call-arg]
    stored, packed_values = value, (None, None, None)
    if quantized[1] or value_kept:
        bias = torch.rand(batch, kv_heads, value_dim) if value_kept else None
        stored, bits, step = ops.pack_values(value, bias, value_kept or value_dim, quantized[1])
        value = ops.first_rows(stored, length, bits if value_kept else None, step, bias)
        bits = with_room(bits, room, poison) if value_kept else None
        packed_values = (bits, with_room(step, room, poison), bias)
    return Store(
        query, filled, tail, with_room(stored, room, poison), length, key, value,
        sink_tokens, recovery, saliency, packed_values,
    )  # type: ignore[arg-type]  # fmt: skip


def with_room(rows: Tensor, room: int, poison: float) -> Tensor:
    """Rows [B, H, S, ...] with ``room`` more, full of ``poison`` (the largest integer for NaN)."""
    unused = rows.new_empty((*rows.shape[:2], room, *rows.shape[3:]))
    unused.fill_(poison if rows.is_floating_point() else torch.iinfo(rows.dtype).max)
    return torch.cat((rows, unused), dim=2)
