"""Building, continuing and reading a cache side in its pages and head; see :mod:`..layout`.

The definition of what the operators of ``spark_compile/ops.py`` do, for every format.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import COUNTERS, MOST_TOKENS, counters
from ..operands import check_mask
from ..spec import SIDES, Side, Spec
from .attend import attention

ALL = 2**62
"""Number of latest tokens to keep where none are evicted."""


def query_stats(query: Tensor, kv_heads: int, window: int, *, each: bool = False) -> Tensor:
    """Sum over the last ``window`` queries of the squared mean query of each group.

    Args:
        query: [B, Hq, L, D].
        kv_heads: Hkv, a divisor of Hq.
        window: W; fewer queries than that are all used.
        each: the mean of the squared queries of the group in place of their squared mean.

    Returns:
        [B, Hkv, D] float32. Its square root is the query norm n of the method.
    """
    grouped = query[:, :, -window:].float().unflatten(1, (kv_heads, -1))
    squares = grouped.square().mean(2) if each else grouped.mean(2).square()
    stats: Tensor = squares.sum(2)
    return stats


@dataclass
class Store:
    """One side of a cache: views of its two stored tensors, which the methods change in place."""

    pages: Tensor
    head: Tensor
    spec: Spec
    side: Side

    def __post_init__(self) -> None:
        spec, side = self.spec, self.side
        self.format = spec.format(side)
        self.fields = spec.pages(side).views(self.pages)
        self.constants = spec.head(side).constants(self.head)
        self.stats = spec.head(side).stats(self.head)
        self.tail = spec.head(side).tail(self.head)
        self.counters = counters(self.head)
        filled: list[int] = self.counters[:1, :1].flatten().tolist() or [0] * COUNTERS
        self.length, self.packed, self.first, self.step = filled

    def check(self) -> None:
        """Raise ValueError unless the counters can be those of a cache in these tensors."""
        window, sinks = self.spec.window, self.spec.sinks
        dense = self.length - self.packed
        live = self.packed // window - min(self.first, self.packed) // window
        for name, value, least, most in (
            ("LENGTH", self.length, 0, MOST_TOKENS),
            ("PACKED", self.packed, 0, self.length),
            ("FIRST", self.first, 0, 0 if sinks else self.length),  # sinks are never evicted
            ("STEP", self.step, 0, ALL),
            ("PACKED modulo window", self.packed % window, 0, 0),
            ("LENGTH - PACKED", dense, sinks if self.packed else 0, self.tail.shape[2]),
            ("the number of live pages", live, 0, self.pages.shape[2]),
        ):
            if not least <= value <= most:
                allowed = f"{least} to {most}" if least < most else most
                raise ValueError(
                    f"the {self.side}s of the cache are damaged: {name} is {value}, allowed is "
                    f"{allowed}"
                )

    @property
    def visible(self) -> int:
        """Number of tokens that are part of the cache."""
        return self.length - self.first

    def rows(self) -> Tensor:
        """The dense tokens [B, Hkv, S, D] float32 in their order, evicted ones left out."""
        sinks, stale = self.spec.sinks, min(self.first, self.packed) // self.spec.window
        count = self.packed // self.spec.window
        packed = self._decoded(stale, count)
        tail = self.tail[:, :, : self.length - self.packed].float()
        tokens = torch.cat((tail[:, :, :sinks], packed, tail[:, :, sinks:]), dim=2)
        return tokens[:, :, self.first - stale * self.spec.window :]

    def _decoded(self, first: int, last: int) -> Tensor:
        """The tokens [B, Hkv, n, D] float32 of pages first to last."""
        slots = torch.arange(first, last, device=self.pages.device) % max(self.pages.shape[2], 1)
        stored = {name: field.index_select(2, slots) for name, field in self.fields.items()}
        return self.format.decode(stored, self.constants, first * self.spec.window).flatten(2, 3)

    def due(self, new_tokens: int, start: int | None = None, keep: int = ALL) -> int:
        """Number of pages to pack when ``new_tokens`` tokens are appended.

        Args:
            start: where the first of them is written, after a crop to there; None appends.
            keep: number of latest tokens that stay.

        Raises:
            ValueError: there is no room for the tokens.
        """
        start = self.length if start is None else start
        packed, first = self._packed_below(start), min(self.first, start)
        total = start + new_tokens
        due = int(self.spec.pages_due(total, total - first, packed))
        rows = total - packed - due * self.spec.window
        if rows > self.tail.shape[2]:
            raise ValueError(f"{rows} dense tokens do not fit into a tail of {self.tail.shape[2]}")
        evicted = max(first, total - keep)
        if evicted and self.spec.sinks:
            raise ValueError(
                f"keep is {keep}: a cache that keeps its first {self.spec.sinks} tokens evicts none"
            )
        live = packed // self.spec.window + due - evicted // self.spec.window
        if due and live > self.pages.shape[2]:
            raise ValueError(f"{live} pages do not fit into {self.pages.shape[2]}")
        return due

    def observe(self, query: Tensor) -> None:
        """Add queries [B, Hq, L, D] to the statistics that the next append will find."""
        if self.stats is not None:
            slot = self.stats[:, :, self.step % 2]
            each, heads = self.format.EACH_QUERY, self.head.shape[1]
            slot += query_stats(query, heads, self.spec.window, each=each)

    def append(self, new: Tensor, keep: int, query: Tensor | None = None) -> None:
        """Append dense tokens [B, Hkv, L, D], pack the pages that are full, evict old tokens.

        Args:
            keep: number of latest tokens that stay.
            query: queries [B, Hq, L, D] to add to the statistics.

        Raises:
            ValueError: there is no room; nothing is written.
        """
        due, sinks = self.due(new.shape[2], keep=keep), self.spec.sinks
        rows = torch.cat((self.tail[:, :, : self.length - self.packed], new), dim=2)
        if self.stats is not None:
            self.stats[:, :, (self.step + 1) % 2] = self.stats[:, :, self.step % 2]
        self.step += 1
        if query is not None:
            self.observe(query)
        if due:
            end = sinks + due * self.spec.window
            self._pack(rows, sinks, end)
            rows = torch.cat((rows[:, :, :sinks], rows[:, :, end:]), dim=2)
        self.tail[:, :, : rows.shape[2]] = rows
        self.length += new.shape[2]
        self.packed += due * self.spec.window
        self.first = max(self.first, self.length - keep)
        self._write_counters()

    def _pack(self, rows: Tensor, start: int, end: int) -> None:
        """Encode rows start to end, the first ones after what is packed."""
        norms = None
        if self.stats is not None:
            norms = self.stats[:, :, self.step % 2].sqrt()
        if self.packed == 0:
            # Without the first tokens that stay dense: attention sinks are unlike all others.
            for name, constant in self.format.constants(rows[:, :, start:], norms).items():
                self.constants[name].copy_(constant)
        body = rows[:, :, start:end].unflatten(2, (-1, self.spec.window))
        count, room = body.shape[2], self.pages.shape[2]
        slots = torch.arange(count, device=body.device) + self.packed // self.spec.window
        # More pages than there is room for: the first ones would be written over at once.
        body, slots = body[:, :, -room:], slots[-room:] % room
        for name, field in self.format.encode(body, norms, self.constants).items():
            self.fields[name].index_copy_(2, slots, field)
        if self.stats is not None:
            self.stats[:, :, self.step % 2] = 0

    def crop(self, length: int) -> None:
        """Forget the tokens from ``length`` on, counted from the first page.

        The tokens of a page that is cut become dense ones, as what they are worth.
        """
        sinks, window, packed = self.spec.sinks, self.spec.window, self._packed_below(length)
        if packed < self.packed:
            rows = self.tail[:, :, : min(length, sinks)]
            if length > sinks + packed:
                cut = self._decoded(packed // window, packed // window + 1)
                rows = torch.cat((rows, cut[:, :, : length - sinks - packed]), dim=2)
            self.tail[:, :, : rows.shape[2]] = rows
            self.packed = packed
        self.length, self.first = length, min(self.first, length)
        self._write_counters()

    def _packed_below(self, length: int) -> int:
        """Number of packed tokens after a crop to ``length``."""
        whole = max(length - self.spec.sinks, 0) // self.spec.window * self.spec.window
        return min(self.packed, whole)

    def _write_counters(self) -> None:
        for counter, value in enumerate((self.length, self.packed, self.first, self.step)):
            self.counters[..., counter] = value


def allocate(like: Tensor, spec: Spec, side: Side, pages: int, rows: int) -> Store:
    """An empty side with room for a number of pages and of tail rows, all zeros."""
    shapes = spec.stored_shapes(side, like.shape[:2], pages, rows)
    stored, head = (like.new_zeros(shape, dtype=torch.uint8) for shape in shapes)
    return Store(stored, head, spec, side)


def build(
    key: Tensor, value: Tensor, queries: list[Tensor], spec: Spec, capacity: int | None = None
) -> list[Store]:
    """The sides of a cache of dense tokens, with the room that ``spark::build`` says."""
    sides: list[Store] = []
    pages, tail_rows = map(int, spec.room(key.shape[2], capacity))
    for side, rows in zip(SIDES, (key, value), strict=True):
        store = allocate(rows, spec, side, pages, tail_rows)
        for query in queries:
            store.observe(query)
        store.append(rows, ALL)
        sides.append(store)
    return sides


def step(
    query: Tensor, new_key: Tensor, new_value: Tensor, keys: Store, values: Store,
    attn_mask: Tensor | None, sinks: Tensor | None, causal_offset: int | None, keep: int | None,
    position: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attend over the cache and the new tokens, then append them; see ``spark::step``.

    Raises:
        ValueError: a damaged cache, a short mask, or no room; nothing is written.
    """
    for store in (keys, values):
        store.check()
    if (keys.length, keys.packed, keys.first) != (values.length, values.packed, values.first):
        raise ValueError("keys and values are of other lengths, or packed or evicted otherwise")
    start = keys.length if position is None else position_of(position, keys.length, keys.first)
    if attn_mask is not None:
        first = min(keys.first, start)
        if rolls := keys.spec.rolls:
            first = max(first, start - rolls)
        check_mask(attn_mask, query, start - first + new_key.shape[2])
    if keep is not None:
        for store, new in ((keys, new_key), (values, new_value)):
            store.due(new.shape[2], start, keep)  # before anything is written
    if position is not None:
        rewind(keys, values, position)
    if rolls := keys.spec.rolls:
        for store in (keys, values):
            store.first = max(store.first, store.length - rolls)
    key = torch.cat((keys.rows(), new_key.float()), dim=2)
    value = torch.cat((values.rows(), new_value.float()), dim=2)
    if attn_mask is not None and attn_mask.shape[-1:].numel() > key.shape[2]:
        attn_mask = attn_mask[..., : key.shape[2]]
    spec = keys.spec
    output, _ = attention(
        query, key, value, attn_mask, causal_offset, spec.scale, spec.softcap, sinks
    )
    if keep is None:
        keys.observe(query)
        values.observe(query)
    else:
        keys.append(new_key, keep, query)
        values.append(new_value, keep, query)
    return output.to(new_value.dtype)


def rewind(keys: Store, values: Store, position: Tensor) -> None:
    """Forget the tokens from a position on that is to be written again.

    Raises:
        ValueError: see :func:`position_of`.
    """
    first = position_of(position, keys.length, keys.first)
    if first < keys.length:
        keys.crop(first)
        values.crop(first)


def position_of(position: Tensor, length: int, evicted: int = 0) -> int:
    """The first of the positions where new tokens are written.

    Raises:
        ValueError: they are not consecutive, leave a gap after the ``length`` tokens, or are after
            some of the first ``evicted`` ones only, which the new ones could not attend to.
    """
    positions: list[int] = position.flatten().tolist()
    first = positions[0] if positions else length
    if positions != list(range(first, first + len(positions))):
        raise ValueError(f"positions {positions[:8]} are not consecutive")
    if not 0 <= first <= length:
        raise ValueError(f"position {first} leaves a gap after {length} tokens")
    if 0 < first < evicted:
        raise ValueError(f"position {first} is among {evicted} evicted tokens")
    return first
