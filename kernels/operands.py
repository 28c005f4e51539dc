"""What the operators may be given: the one check of operands, for the reference and for Triton.

No tensor is read, so that Triton can check in a graph; what depends on the counters of a cache is
checked by the :class:`.reference.store.Store`. Sizes that grow are compared only where they are
plain numbers: a comparison of symbols would become a guard of the graph. Native CPU code takes a
call only if all of this holds (``cpu/operands.h``) and otherwise hands it to the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layout import MOST_TOKENS
from .spec import SIDES, Side, Spec

POSITION_DTYPES = (torch.int64, torch.int32)


def check_build(
    key: Tensor, value: Tensor, queries: list[Tensor], spec: Spec, capacity: int | None,
    positions: Tensor | None = None,
) -> None:  # fmt: skip
    """Raise ValueError unless ``spark::build`` can store these: its docstring has the shapes."""
    batch, heads, tokens = _sizes(key, 3)
    for name, rows, format in (("key", key, spec.key), ("value", value, spec.value)):
        _shaped(name, rows, format.dtype, (batch, heads, tokens, format.head_dim), key.device)
    for number, query in enumerate(queries):
        _check_query(f"queries[{number}]", query, key, spec)
    if type(capacity) is int and not 0 <= capacity <= MOST_TOKENS:
        raise ValueError(f"capacity is {capacity}: allowed is 0 to {MOST_TOKENS}, or None")
    if positions is not None:
        _shaped("positions", positions, torch.int64, (batch, heads, tokens), key.device)


def check_evict(key: Tensor, queries: list[Tensor], attn_mask: Tensor | None, spec: Spec) -> None:
    """Raise ValueError unless ``spark::evict`` can choose: its docstring has the shapes."""
    if spec.evict is None:
        raise ValueError(f"spec {spec.text!r} names no scorer: allowed is one with 'evict='")
    shape = (*_sizes(key, 3), spec.key.head_dim)
    _shaped("key", key, spec.key.dtype, shape, key.device)
    for number, query in enumerate(queries):
        _check_query(f"queries[{number}]", query, key, spec)
    if spec.evict.observed and not queries:
        raise ValueError(f"queries is empty: {spec.evict.text} needs those of an attention")
    if attn_mask is not None and queries:
        check_mask(attn_mask, queries[0], shape[2] if type(shape[2]) is int else None)


def check_step(
    query: Tensor, new_key: Tensor, new_value: Tensor, key_pages: Tensor, key_head: Tensor,
    value_pages: Tensor, value_head: Tensor, attn_mask: Tensor | None, sinks: Tensor | None,
    keep: int | None, position: Tensor | None, spec: Spec,
) -> None:  # fmt: skip
    """Raise ValueError unless ``spark::step`` can work on these: its docstring has the shapes.

    How many tokens a mask has to cover depends on the counters: :func:`check_mask`.
    """
    batch, heads = _sizes(key_pages, 2)
    stored = ((key_pages, key_head), (value_pages, value_head))
    for side, (pages, head) in zip(SIDES, stored, strict=True):
        check_side(pages, head, spec, side, (batch, heads), key_pages.device)
    tokens = _sizes(new_key, 3)[2]
    for name, rows, format in (
        ("new_key", new_key, spec.key), ("new_value", new_value, spec.value),
    ):  # fmt: skip
        shape = batch, heads, tokens, format.head_dim
        _shaped(name, rows, format.dtype, shape, key_pages.device)
    _check_query("query", query, new_key, spec)
    if attn_mask is not None:
        check_mask(attn_mask, query)
    if sinks is not None:
        _floating("sinks", sinks)
        _shaped("sinks", sinks, sinks.dtype, query.shape[1:2], query.device)
    if position is not None and position.dtype not in POSITION_DTYPES:
        allowed = " or ".join(map(str, POSITION_DTYPES))
        raise ValueError(f"position is {_described(position)}: allowed is {allowed}")
    if type(keep) is int and keep < 0:
        raise ValueError(f"keep is {keep}: allowed is 0 or more, or None")


def check_side(
    pages: Tensor, head: Tensor, spec: Spec, side: Side, heads: tuple[Any, ...] | None = None,
    device: torch.device | None = None,
) -> None:  # fmt: skip
    """Raise ValueError unless the stored tensors of a side have the sizes of the spec.

    Args:
        heads: B and Hkv; by default those of the pages.
        device: by default that of the pages.
    """
    heads, device = heads or _sizes(pages, 2), device or pages.device
    page_bytes, least = spec.pages(side).page_bytes, spec.head(side).head_bytes(0)
    slots, head_bytes = _sizes(pages, 3)[2], _sizes(head, 3)[2]
    if type(head_bytes) is int:
        head_bytes = max(head_bytes // 8 * 8, least)
    slots = max(slots, 1) if type(slots) is int else slots
    _shaped(f"{side}_pages", pages, torch.uint8, (*heads, slots, page_bytes), device)
    _shaped(f"{side}_head", head, torch.uint8, (*heads, head_bytes), device)


def check_strides(pages: Tensor, head: Tensor, side: Side) -> None:
    """Raise ValueError unless the stored tensors of a side lie as kernels address them."""
    if pages.shape[2] != 1 and pages.stride(2) != pages.shape[3]:
        raise ValueError(f"{side}_pages has pages that do not lie one after the other")
    for name, stored in ((f"{side}_pages", pages), (f"{side}_head", head)):
        if stored.stride(-1) != 1 or any(stride % 8 for stride in stored.stride()[:2]):
            allowed = "multiples of 8, and 1 at last"
            raise ValueError(f"{name} has strides {stored.stride()}: allowed are {allowed}")


def check_mask(mask: Tensor, query: Tensor, tokens: int | None = None) -> None:
    """Raise ValueError unless a mask broadcasts to [B, Hq, L', ``tokens`` or more].

    Args:
        query: [B, Hq, L', D].
        tokens: that are attended to; None leaves that dimension unchecked.
    """
    if mask.dtype.is_complex or mask.device != query.device:
        raise ValueError(
            f"attn_mask is {mask.dtype} on {mask.device}: allowed is a bool or a real dtype on "
            f"{query.device}"
        )
    sizes = mask.shape[::-1]
    fits = mask.dim() <= 4 and all(
        own in (1, other) for own, other in zip(sizes[1:], query.shape[2::-1], strict=False)
    )
    if not fits or (tokens is not None and sizes and sizes[0] != 1 and sizes[0] < tokens):
        allowed = [*query.shape[:3], "S" if tokens is None else tokens]
        raise ValueError(
            f"attn_mask is {list(mask.shape)}: allowed is what broadcasts to "
            f"[{', '.join(map(str, allowed))}]"
        )


def _check_query(name: str, query: Tensor, key: Tensor, spec: Spec) -> None:
    """Raise ValueError unless queries are [B, n * Hkv, L', D] of keys [B, Hkv, L, D]."""
    _floating(name, query)
    batch, heads, _, dim = key.shape
    query_heads, queries = _sizes(query, 3)[1:]
    # n of them for each key head; at least one.
    query_heads = max(query_heads // max(heads, 1), 1) * heads
    _shaped(name, query, query.dtype, (batch, query_heads, queries, dim), key.device)
    if spec.value.uses_queries and spec.value.head_dim != spec.key.head_dim:
        raise ValueError(
            f"values of {spec.value.head_dim} channels are stored by the norms of queries of "
            f"{spec.key.head_dim}: allowed is the same number"
        )


def _sizes(tensor: Tensor, count: int) -> tuple[Any, ...]:
    """The first sizes of a tensor, 1 for dimensions that it does not have."""
    return (*tensor.shape[:count], *(1,) * (count - tensor.dim()))


def _floating(name: str, tensor: Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name} is {_described(tensor)}: allowed is a floating-point dtype")


def _shaped(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[Any, ...], device: torch.device
) -> None:
    """Raise ValueError unless a tensor has a dtype and a shape and is on a device."""
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} is {_described(tensor)}: allowed is {dtype}{list(shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}: allowed is {device}, as the others are")


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype}{list(tensor.shape)}"
