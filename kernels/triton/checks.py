"""What the kernels take; everything else raises an error that names the argument.

Sizes that grow are compared only where they are plain numbers: a comparison of symbols would become
a guard of the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layout import plane_bytes
from . import blocks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RECOVERIES = ("degenerate", "none")
SALIENCIES = ("squared", "absolute")


def check_attend(
    query: Tensor, kept: Tensor, bits: Tensor, scale: Tensor, norms: Tensor, tail: Tensor,
    values: Tensor, value_bits: Tensor | None, value_scale: Tensor | None, value_dim: int,
    dtype: torch.dtype, recovery: str, saliency: str, sinks: Tensor | None,
) -> None:  # fmt: skip
    """Raise unless dtypes and the sizes that do not grow go together."""
    batch, query_heads, _, dim = query.shape
    heads, packed_rows, count = kept.shape[1:]
    one_of("query.dtype", query.dtype, DTYPES)
    one_of("recovery", recovery, RECOVERIES)
    one_of("saliency", saliency, SALIENCIES)
    if not blocks.fits(dim, value_dim, query.dtype):
        raise ValueError(f"head sizes are {dim} and {value_dim}: too large for {query.dtype}")
    if heads == 0 or query_heads % heads:
        raise ValueError(f"query has {query_heads} heads: allowed are multiples of {heads}")
    within("kept.shape[3]", count, 1, dim)
    one_of("kept.dtype", kept.dtype, (query.dtype, torch.int8))
    one_of("scale.dtype", scale.dtype, (query.dtype,))
    one_of("tail.dtype", tail.dtype, (query.dtype,))
    one_of("the values' dtype", dtype, (query.dtype,))
    one_of("values.dtype", values.dtype, (query.dtype, torch.int8))
    one_of("norms.dtype", norms.dtype, (torch.float32,))
    entries = 1 + (kept.dtype == torch.int8)
    shaped("kept", kept, (batch, heads, packed_rows, count))
    shaped("bits", bits, (batch, heads, packed_rows, 2, plane_bytes(dim)))
    shaped("scale", scale, (batch, heads, packed_rows, entries))
    shaped("norms", norms, (batch, heads, dim))
    shaped("tail", tail, (batch, heads, tail.shape[2], dim))
    rows = (batch, heads, values.shape[2])
    shaped("values", values, (*rows, values.shape[3]))
    entries = (value_bits is not None) + (values.dtype == torch.int8)
    if value_bits is not None:
        shaped("value_bits", value_bits, (*rows, plane_bytes(value_dim)))
    if entries:
        if value_scale is None:
            raise ValueError("value_scale is None: int8 and pruned values need it")
        shaped("value_scale", value_scale, (*rows, entries))
    if sinks is not None:
        shaped("sinks", sinks, (query_heads,))
    others = (kept, bits, scale, norms, tail, values, value_bits, value_scale, sinks)
    for tensor in others:
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"a tensor is on {tensor.device}: allowed is {query.device}")


def check_filled(
    kept: Tensor, tail: Tensor, values: Tensor, packed: int | Tensor, length: int, sink_tokens: int
) -> None:
    """Raise if a buffer is claimed to hold more rows than it has, where that is known."""
    numbers = (packed, length, kept.shape[2], tail.shape[2], values.shape[2])
    if all(type(number) is int for number in numbers):
        within("packed_length", packed, 0, min(kept.shape[2], length))
        within("length", length, packed, min(values.shape[2], packed + tail.shape[2]))
    within("sink_tokens", sink_tokens, 0, 1 << 30)


def check_room(rows: Tensor, start: int, packed: int | Tensor, tokens: int) -> None:
    """Raise if the rows do not fit, where that is known."""
    capacity = rows.shape[2]
    if all(type(number) is int for number in (start, packed, tokens, capacity)):
        first = start - packed
        if first < 0 or first + tokens > capacity:
            raise ValueError(
                f"rows {first} to {first + tokens} do not fit into a buffer of {capacity}"
            )


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value}: allowed is {', '.join(map(str, allowed))}")


def within(name: str, value: Any, least: Any, most: Any) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}: allowed is {least} to {most}")


def shaped(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}: allowed is {shape}")
