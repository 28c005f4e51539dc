"""The operators of exported programs in ATen alone: what torch.export can trace.

The same as :mod:`.operators`, byte for byte, for caches with a capacity, of which nothing is
evicted. Counters stay tensors, and all shapes are fixed but for the length of a prompt, so that a
graph of these functions is right for every number of tokens. What is not due is computed all the
same and not stored, and every step decodes all pages that there is room for.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ...torch_private import assert_async
from ..operands import check_build, check_step
from ..spec import SIDES, Spec, parse_spec
from .attend import attention
from .portable_store import PortableStore


def build(
    key: Tensor, value: Tensor, queries: list[Tensor], spec: str, capacity: int | None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``spark::build`` of a cache with a capacity, for a prompt of at least one token.

    A prompt of a symbolic length has at least two.

    Raises:
        ValueError: operands do not fit.
        NotPortableError: the cache has no capacity, or evicts tokens.
        RuntimeError: there are more tokens than the capacity.
    """
    parsed = _portable(spec)
    check_build(key, value, queries, parsed, capacity, positions)
    if capacity is None:
        _refuse("a cache that grows", "one with a capacity")
    if positions is not None:
        _refuse("a prompt of which tokens are evicted", "one that is stored as a whole")
    tokens = key.shape[2]
    torch._check(tokens <= capacity, lambda: f"{tokens} tokens do not fit into {capacity}")
    pages, tail_rows = map(int, parsed.room(capacity, capacity))
    stored: list[Tensor] = []
    for name, rows in zip(SIDES, (key, value), strict=True):
        shapes = parsed.stored_shapes(name, rows.shape[:2], pages, tail_rows)
        made = [rows.new_zeros(shape, dtype=torch.uint8) for shape in shapes]
        for query in queries:
            PortableStore(made[0], made[1], parsed, name).observe(query)
        PortableStore(made[0], made[1], parsed, name).append_prompt(rows, None)
        stored += made
    return stored[0], stored[1], stored[2], stored[3]


def step(
    query: Tensor, new_key: Tensor, new_value: Tensor, key_pages: Tensor, key_head: Tensor,
    value_pages: Tensor, value_head: Tensor, attn_mask: Tensor | None, sinks: Tensor | None,
    causal_offset: int | None, keep: int | None, position: Tensor | None, spec: str,
) -> Tensor:  # fmt: skip
    """``spark::step`` of one token, or of a prompt of several.

    One token may go to any position that has no gap before it, and forgets what is from there on.
    A prompt goes to position 0. Other positions, and tokens for which there is no room, fail in
    ``aten::_assert_async`` before anything is written.

    Raises:
        ValueError: operands do not fit.
        NotPortableError: a scorer or a window evicts tokens.
    """
    parsed = _portable(spec)
    stored = key_pages, key_head, value_pages, value_head
    check_step(query, new_key, new_value, *stored, attn_mask, sinks, keep, position, parsed)
    keys = PortableStore(key_pages, key_head, parsed, "key")
    values = PortableStore(value_pages, value_head, parsed, "value")
    if keep is not None and not (type(keep) is int and keep >= keys.room):
        _refuse(f"keep {keep}", f"{keys.room} or more, so that none are evicted, or None")
    start = keys.length if position is None else position.flatten()[:1].long()
    tokens = new_key.shape[2]
    one = type(tokens) is int and tokens == 1
    _assert((start >= 0) & (start <= (keys.length if one else 0)), "the position is after a gap")
    for side in (keys, values):
        side.rewind(start) if one else side.empty()
    if keep is not None:
        pages = keys.packed // parsed.window + keys.due(keys.length + tokens)
        _assert(pages <= key_pages.shape[2], "the cache has no room for the tokens")
    if one:
        filled, places = keys.tokens()
        seen = _seen(attn_mask, causal_offset, query, filled, places)
        rows = keys.rows(new_key, filled), values.rows(new_value, filled)
        output = _attention(query, *rows, seen, None, parsed, sinks)
    else:
        if attn_mask is not None and attn_mask.dim() and attn_mask.shape[-1] != 1:
            attn_mask = attn_mask[..., :tokens]
        output = _attention(query, new_key, new_value, attn_mask, causal_offset, parsed, sinks)
    for side, new in ((keys, new_key), (values, new_value)):
        if keep is None:
            side.observe(query)
        elif one:
            side.append(new, query)
        else:
            side.append_prompt(new, query)
    return output.to(new_value.dtype)


class NotPortableError(ValueError):
    """What an operator is asked for cannot be expressed in ATen."""


def _portable(text: str) -> Spec:
    """The spec that a text describes.

    Raises:
        ValueError: it cannot be read.
        NotPortableError: caches of the spec evict tokens.
    """
    spec = parse_spec(text)
    if spec.evict is not None:
        _refuse(f"the scorer {spec.evict.text}", "none: all tokens of a prompt are stored")
    if spec.rolls:
        _refuse(f"a cache that rolls after {spec.rolls} tokens", "one that evicts none")
    if spec.sinks and spec.window + spec.recent < 2:
        _refuse("a window of 1 with sinks and no recent tokens", "a window of 2 or more")
    return spec


def _refuse(what: str, allowed: str) -> NoReturn:
    raise NotPortableError(f"{what} is not portable: allowed is {allowed}")


def _assert(holds: Tensor, message: str) -> None:
    """Fail where a tensor is not all True, when the graph runs."""
    assert_async(holds.all(), message)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal_offset: int | None,
    spec: Spec, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    output, _ = attention(query, key, value, mask, causal_offset, spec.scale, spec.softcap, sinks)
    return output


def _seen(
    mask: Tensor | None, causal_offset: int | None, query: Tensor, filled: Tensor, places: Tensor
) -> Tensor:
    """The mask for rows of which these are tokens, and at these places."""
    if causal_offset is not None:
        latest = torch.arange(query.shape[2], device=query.device) + causal_offset
        filled = filled & (places <= latest.unsqueeze(1))
    if mask is None:
        return filled
    if mask.dim() and mask.shape[-1] != 1:
        mask = mask.index_select(-1, places.clamp(max=mask.shape[-1] - 1))
    if mask.dtype == torch.bool:
        return mask & filled
    return mask.float().masked_fill(~filled, -torch.inf)
