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

from ..formats.base import Stored
from ..layout import LENGTH, PACKED, STEP, Count, counters
from ..operands import check_build, check_step
from ..spec import SIDES, Side, Spec, parse_spec
from .attend import attention
from .store import query_stats


def build(
    key: Tensor, value: Tensor, queries: list[Tensor], spec: str, capacity: int | None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``spark::build`` of a cache with a capacity, for a prompt of at least one token.

    A prompt of a symbolic length has at least two.

    Raises:
        ValueError: operands do not fit, or what they ask for is not portable.
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
            _Store(made[0], made[1], parsed, name).observe(query)
        _Store(made[0], made[1], parsed, name).append_prompt(rows, None)
        stored += made
    return stored[0], stored[1], stored[2], stored[3]


def step(
    query: Tensor, new_key: Tensor, new_value: Tensor, key_pages: Tensor, key_head: Tensor,
    value_pages: Tensor, value_head: Tensor, attn_mask: Tensor | None, sinks: Tensor | None,
    causal_offset: int | None, keep: int | None, position: Tensor | None, spec: str,
) -> Tensor:  # fmt: skip
    """``spark::step`` of one token after all that are in the cache, or of a prompt of several.

    It does not rewind, but for a prompt: that goes to position 0 and replaces what is in the cache.
    The position of one token is the number of tokens in the cache. Other positions, and tokens for
    which there is no room, fail in ``aten::_assert_async`` before anything is written.

    Raises:
        ValueError: operands do not fit, or what they ask for is not portable.
    """
    parsed = _portable(spec)
    stored = key_pages, key_head, value_pages, value_head
    check_step(query, new_key, new_value, *stored, attn_mask, sinks, keep, position, parsed)
    keys = _Store(key_pages, key_head, parsed, "key")
    values = _Store(value_pages, value_head, parsed, "value")
    if keep is not None and not (type(keep) is int and keep >= keys.room):
        _refuse(f"keep {keep}", f"{keys.room} or more, so that none are evicted, or None")
    start = keys.length if position is None else position.flatten()[:1].long()
    tokens = new_key.shape[2]
    one = type(tokens) is int and tokens == 1
    after = keys.length if one else torch.zeros_like(keys.length)
    _assert(start == after, "position is not the number of cached tokens, or 0 of a prompt")
    if keep is not None:
        packed = keys.packed if one else after
        pages = packed // parsed.window + keys.due(after + tokens, packed)
        _assert(pages <= key_pages.shape[2], "the cache has no room for the tokens")
    if one:
        seen, rows = (
            _seen(attn_mask, causal_offset, query, keys),
            [side.rows(new) for side, new in ((keys, new_key), (values, new_value))],
        )
        output = _attention(query, *rows, seen, None, parsed, sinks)
    else:
        seen = attn_mask
        if seen is not None and seen.dim() and seen.shape[-1] != 1:
            seen = seen[..., :tokens]
        output = _attention(query, new_key, new_value, seen, causal_offset, parsed, sinks)
    for side, new in ((keys, new_key), (values, new_value)):
        if keep is None:
            side.observe(query, empties=not one)
        elif one:
            side.append(new, query)
        else:
            side.append_prompt(new, query)
    return output.to(new_value.dtype)


def _portable(text: str) -> Spec:
    """The spec that a text describes.

    Raises:
        ValueError: it cannot be read or is not portable.
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
    raise ValueError(f"{what} is not portable: allowed is {allowed}")


def _assert(holds: Tensor, message: str) -> None:
    """Fail where a tensor is not all True, when the graph runs."""
    torch._assert_async(holds.all(), message)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal_offset: int | None,
    spec: Spec, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    output, _ = attention(query, key, value, mask, causal_offset, spec.scale, spec.softcap, sinks)
    return output


def _seen(mask: Tensor | None, causal_offset: int | None, query: Tensor, keys: _Store) -> Tensor:
    """The mask of the rows that :meth:`_Store.rows` gives, which have another order than tokens."""
    filled, places = keys.tokens()
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


class _Store:
    """One side of a cache, as :class:`.store.Store`, with counters [1] int64 that are tensors."""

    def __init__(self, pages: Tensor, head: Tensor, spec: Spec, side: Side) -> None:
        self.pages, self.head, self.spec = pages, head, spec
        self.format, self.of_pages, self.of_head = (
            spec.format(side), spec.pages(side), spec.head(side)
        )  # fmt: skip
        self.constants = self.of_head.constants(head)
        self.stats = self.of_head.stats(head)
        self.tail = self.of_head.tail(head)
        counted = counters(head)[0, 0]
        self.length, self.packed, self.step = (
            counted[counter : counter + 1] for counter in (LENGTH, PACKED, STEP)
        )

    @property
    def room(self) -> int:
        """As many tokens as there will ever be, or more."""
        return self.pages.shape[2] * self.spec.window + self.tail.shape[2]

    def due(self, length: Tensor, packed: Tensor) -> Tensor:
        """``Spec.pages_due`` as a tensor [1]."""
        waiting = length - packed - self.spec.sinks - self.spec.recent
        due: Tensor = waiting.clamp(min=0) // self.spec.window
        return due * (length >= self.spec.min_tokens) if self.spec.min_tokens else due

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Which rows of tail, pages and one new token are tokens: [T] bool, and where [T] int64."""
        in_tail = torch.arange(self.tail.shape[2], device=self.head.device)
        in_pages = torch.arange(self.pages.shape[2] * self.spec.window, device=self.head.device)
        new = torch.ones_like(self.length, dtype=torch.bool)
        filled = (in_tail < self.length - self.packed, in_pages < self.packed, new)
        behind = in_tail + (in_tail >= self.spec.sinks) * self.packed
        return torch.cat(filled), torch.cat((behind, in_pages + self.spec.sinks, self.length))

    def rows(self, new: Tensor) -> Tensor:
        """The rows [B, Hkv, T, D] float32 of tail, pages and a new token, zeros where none is."""
        packed = self.format.decode(self.of_pages.views(self.pages), self.constants).flatten(2, 3)
        rows = torch.cat((self.tail.float(), packed, new.float()), dim=2)
        # What is not filled may be NaN, which a weight of zero does not undo.
        return rows.masked_fill(~self.tokens()[0].unsqueeze(1), 0)

    def observe(self, query: Tensor, *, empties: bool = False) -> None:
        """``Store.observe``; the cache may lose all tokens, too."""
        stats, length, packed = self.stats, self.length, self.packed
        if stats is not None:
            slot = self.step % 2
            stats = stats.index_add(2, slot, self._noted(query))
        if empties:
            length, packed = torch.zeros_like(length), torch.zeros_like(packed)
        self._write(length, packed, self.step, self.constants, stats, self.tail)

    def append(self, new: Tensor, query: Tensor) -> None:
        """Append one token [B, Hkv, 1, D]."""
        spec, length, room = self.spec, self.length + 1, self.pages.shape[2]
        rows = self.tail.index_copy(2, self.length - self.packed, new)
        # So many are dense when the first page is due.
        full = max(spec.sinks + spec.recent + spec.window, spec.min_tokens)
        full = min(full, rows.shape[2])
        most = min((full - spec.sinks - spec.recent) // spec.window, room)
        due = self.due(length, self.packed)
        stats, norms = self._noted_by(query, due)
        is_first = (self.packed == 0) & (due > 0)
        constants = self._fixed(rows[:, :, spec.sinks : full], norms, is_first)
        pages, is_due = self._encoded(rows, most, norms, constants, due)
        numbers = torch.arange(most, device=rows.device)
        slots = (self.packed // spec.window + numbers) % room
        self.pages.index_copy_(2, slots, pages.where(is_due, self.pages.index_select(2, slots)))
        packed = self.packed + due * spec.window
        self._write(length, packed, self.step + 1, constants, stats, self._dense(rows, due))

    def append_prompt(self, rows: Tensor, query: Tensor | None) -> None:
        """Put the tokens [B, Hkv, S, D] of a prompt in place of all that are in the cache."""
        spec, count, room = self.spec, rows.shape[2], self.pages.shape[2]
        length = torch.full_like(self.length, count)
        due = self.due(length, torch.zeros_like(length))
        stats, norms = self._noted_by(query, due)
        body = rows
        if spec.sinks:
            # Two at least, so that no length is a case of its own: if fewer, none is due.
            body = _taken(rows, torch.sym_max(count - spec.sinks, 2), spec.sinks)
        constants = self._fixed(body, norms, due > 0)
        # Two more than there can be, for the same reason.
        pages, is_due = self._encoded(rows, count // spec.window + 2, norms, constants, due)
        pages = pages.masked_fill(~is_due, 0)
        self.pages.copy_(torch.nn.functional.pad(pages, (0, 0, 0, room))[:, :, :room])
        packed, dense = due * spec.window, self._dense(rows, due)
        filled = torch.arange(dense.shape[2], device=rows.device) < length - packed
        dense = dense.masked_fill(~filled.unsqueeze(1), 0)
        self._write(length, packed, self.step + 1, constants, stats, dense)

    def _noted(self, query: Tensor) -> Tensor:
        """What queries [B, Hq, L, D] add to a slot of the statistics, [B, Hkv, 1, D]."""
        window, count, heads = self.spec.window, query.shape[2], self.head.shape[1]
        if type(count) is not int:
            # A slice of the latest ones would burn in whether there are so many.
            latest = torch.arange(window, device=query.device) + (count - window)
            query = query.index_select(2, latest.clamp(min=0))
            query = query.masked_fill((latest < 0).unsqueeze(1), 0)
        return query_stats(query, heads, window, each=self.format.EACH_QUERY).unsqueeze(2)

    def _noted_by(self, query: Tensor | None, due: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The statistics after an append, and the norms [B, Hkv, D] for what it packs."""
        if self.stats is None:
            return None, None
        now = self.stats.index_select(2, self.step % 2)
        if query is not None:
            now = now + self._noted(query)
        after = now.masked_fill(due > 0, 0)
        return self.stats.index_copy(2, (self.step + 1) % 2, after), now.squeeze(2).sqrt()

    def _fixed(self, rows: Tensor, norms: Tensor | None, is_first: Tensor) -> Stored:
        """The constants after an append, of these rows [B, Hkv, S, D] if ``is_first``."""
        fixed = self.format.constants(rows, norms)
        return {name: new.where(is_first, self.constants[name]) for name, new in fixed.items()}

    def _encoded(
        self, rows: Tensor, most: Count, norms: Tensor | None, constants: Stored, due: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pages [B, Hkv, most, page bytes] of dense rows, and which are due: [most, 1] bool."""
        pages = torch.arange(most, device=rows.device).unsqueeze(1)
        index = pages * self.spec.window + torch.arange(self.spec.window, device=rows.device)
        # Not taken in a row and reshaped: that would burn in which numbers divide their number.
        body = rows[:, :, (index + self.spec.sinks).clamp(max=rows.shape[2] - 1)]
        fields = self.format.encode(body, norms, constants)
        return self.of_pages.joined(fields), pages < due

    def _dense(self, rows: Tensor, due: Tensor) -> Tensor:
        """The tail without the pages that are due."""
        index = torch.arange(self.tail.shape[2], device=rows.device)
        index = index + (index >= self.spec.sinks) * (due * self.spec.window)
        return rows.index_select(2, index.clamp(max=rows.shape[2] - 1))

    def _write(
        self, length: Tensor, packed: Tensor, step: Tensor, constants: Stored,
        stats: Tensor | None, tail: Tensor,
    ) -> None:  # fmt: skip
        """Write the head."""
        none = torch.zeros_like(length)  # FIRST and DROPPED
        counted = torch.cat((length, packed, none, step, none))
        counted = counted.expand(*self.head.shape[:2], -1)
        self.head.copy_(self.of_head.joined(counted, constants, stats, tail))


def _taken(rows: Tensor, count: Count, first: int) -> Tensor:
    """``count`` rows from a first one on; after the last one that one again."""
    index = torch.arange(count, device=rows.device) + first
    return rows.index_select(2, index.clamp(max=rows.shape[2] - 1))
