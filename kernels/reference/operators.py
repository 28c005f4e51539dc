"""What the operators that build and continue a cache do, for every format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operands import check_mask, check_step
from ..spec import SIDES, Spec, parse_spec
from .attend import attention
from .evict import kept_positions, take
from .store import ALL, Store, allocate, position_of


def build(
    key: Tensor, value: Tensor, queries: list[Tensor], spec: Spec, capacity: int | None = None,
    positions: Tensor | None = None,
) -> list[Store]:  # fmt: skip
    """The sides of a cache of dense tokens, with the room that ``spark::build`` says."""
    sides: list[Store] = []
    pages, tail_rows = map(int, spec.room(key.shape[2], capacity))
    for side, rows in zip(SIDES, (key, value), strict=True):
        store = allocate(rows, spec, side, pages, tail_rows)
        for query in queries:
            store.observe(query)
        store.append(rows, ALL, positions=positions)
        sides.append(store)
    return sides


def checked(
    query: Tensor, new_key: Tensor, new_value: Tensor, key_pages: Tensor, key_head: Tensor,
    value_pages: Tensor, value_head: Tensor, attn_mask: Tensor | None, sinks: Tensor | None,
    causal_offset: int | None, keep: int | None, position: Tensor | None, spec: str,
) -> tuple[Any, ...]:  # fmt: skip
    """The operands of :func:`step_partial`, of those of ``spark::step``.

    Raises:
        ValueError: operands do not fit the spec or each other.
    """
    parsed, stored = parse_spec(spec), (key_pages, key_head, value_pages, value_head)
    check_step(query, new_key, new_value, *stored, attn_mask, sinks, keep, position, parsed)
    keys, values = Store(*stored[:2], parsed, "key"), Store(*stored[2:], parsed, "value")
    return query, new_key, new_value, keys, values, attn_mask, sinks, causal_offset, keep, position


def step(*operands: Any) -> Tensor:
    """The output of :func:`step_partial`, whose operands these are."""
    return step_partial(*operands)[0]


def step_partial(
    query: Tensor, new_key: Tensor, new_value: Tensor, keys: Store, values: Store,
    attn_mask: Tensor | None, sinks: Tensor | None, causal_offset: int | None, keep: int | None,
    position: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend over the cache and the new tokens, then append them; see ``spark::step_partial``.

    Raises:
        ValueError: a damaged cache, a short mask, or no room; nothing is written.
    """
    spec, value_dtype = keys.spec, new_value.dtype
    for store in (keys, values):
        store.check()
    if not torch.equal(_counted(keys), _counted(values)):
        raise ValueError("keys and values are of other lengths, or packed or evicted otherwise")
    start = keys.tokens if position is None else position_of(position, keys.tokens, keys.first)
    stays = new_key.shape[2] if start else int(spec.stored_tokens(new_key.shape[2]))
    if attn_mask is not None:
        first = min(keys.first, start)
        if rolls := spec.rolls:
            first = max(first, start - rolls)
        check_mask(attn_mask, query, start - first + new_key.shape[2])
    for store in (keys, values):  # before anything is written
        index = store.index_of(start)
        store.check_crop(index)
        if keep is not None:
            store.due(stays, index, keep)
    if position is not None:
        rewind(keys, values, position)
    if rolls := spec.rolls:
        for store in (keys, values):
            store.first = max(store.first, store.length - rolls)
    key = torch.cat((keys.rows(), new_key.float()), dim=2)
    value = torch.cat((values.rows(), new_value.float()), dim=2)
    seen, offset = _of_stored(attn_mask, causal_offset, query, keys, new_key.shape[2])
    output, lse = attention(query, key, value, seen, offset, spec.scale, spec.softcap, sinks)
    if keep is None:
        keys.observe(query)
        values.observe(query)
    else:
        positions = None
        if stays < new_key.shape[2]:
            positions = kept_positions(new_key, [query], attn_mask, causal_offset, spec)
            new_key, new_value = take(new_key, positions), take(new_value, positions)
        keys.append(new_key, keep, query, positions)
        values.append(new_value, keep, query, positions)
    return output.to(value_dtype), lse


def _counted(store: Store) -> Tensor:
    """The counters that keys and values have in common."""
    return torch.tensor((store.length, store.packed, store.first, store.dropped))


def _of_stored(
    mask: Tensor | None, causal_offset: int | None, query: Tensor, keys: Store, new_tokens: int
) -> tuple[Tensor | None, int | None]:
    """Mask and causal offset, which are of the tokens of the model, for those that are stored."""
    stored = keys.visible + new_tokens
    if not keys.dropped:
        # A mask may be longer where the cache has a capacity.
        if mask is not None and mask.shape[-1:].numel() > stored:
            mask = mask[..., :stored]
        return mask, causal_offset
    positions = keys.positions(new_tokens)  # [B, Hkv, stored]
    batch, query_heads, length = query.shape[:3]
    each = positions.repeat_interleave(query_heads // positions.shape[1], 1).unsqueeze(2)
    each = each.expand(batch, query_heads, length, stored)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
        mask = mask.expand(batch, query_heads, length, mask.shape[-1])
        mask = mask.gather(3, each if mask.shape[-1] > 1 else torch.zeros_like(each))
    if causal_offset is not None:
        offset = max(-length, min(causal_offset, keys.tokens + new_tokens))
        latest = torch.arange(length, device=query.device) + offset
        seen = each <= latest.unsqueeze(1)
        if mask is None:
            mask = seen
        elif mask.dtype == torch.bool:
            mask = mask & seen
        else:
            mask = mask.masked_fill(~seen, -torch.inf)
    return mask, None


def rewind(keys: Store, values: Store, position: Tensor) -> None:
    """Forget the tokens from a position on that is to be written again.

    Raises:
        ValueError: see :func:`position_of` and :meth:`Store.index_of`.
    """
    first = position_of(position, keys.tokens, keys.first)
    if first < keys.tokens:
        for store in (keys, values):
            store.crop(store.index_of(first))
