"""Building, continuing and reading a cache side in its pages and head; see :mod:`..layout`.

The definition of what the operators of ``spark_compile/ops.py`` do, for every format.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import COUNTERS, MOST_TOKENS, POSITION, counters
from ..spec import Side, Spec
from .evict import evicted_before

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
        self.length, self.packed, self.first, self.step, self.dropped = filled

    def check(self) -> None:
        """Raise ValueError unless the counters can be those of a cache in these tensors."""
        spec, window, sinks = self.spec, self.spec.window, self.spec.sinks
        evicts, chosen = spec.evict is not None, spec.chosen_end if self.dropped else 0
        dense = self.length - self.packed
        live = self.packed // window - min(self.first, self.packed) // window
        for name, value, least, most in (
            ("LENGTH", self.length, 0, MOST_TOKENS),
            ("PACKED", self.packed, 0, self.length),
            # The first tokens never leave where some of them stay whatever comes.
            ("FIRST", self.first, 0, 0 if sinks or evicts else self.length),
            ("STEP", self.step, 0, ALL),
            ("DROPPED", self.dropped, 0, MOST_TOKENS if evicts else 0),
            ("LENGTH of an evicted prompt", self.length, chosen, MOST_TOKENS),
            ("PACKED of an evicted prompt", self.packed, max(chosen - sinks, 0), self.length),
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

    def check_pages(self) -> None:
        """Raise ValueError unless the format can have made what is packed."""
        pages = self._stored(*self._live)
        try:
            self.format.check(pages)
        except ValueError as error:
            raise ValueError(f"the {self.side}s of the cache are damaged: {error}") from error

    @property
    def visible(self) -> int:
        """Number of tokens that are stored and part of the cache."""
        return self.length - self.first

    @property
    def tokens(self) -> int:
        """Number of tokens since the first page as the model counts them."""
        return self.length + self.dropped

    def index_of(self, position: int) -> int:
        """``Spec.stored_index`` of a position in this cache."""
        return self.spec.stored_index(position, self.dropped)

    def positions(self, new_tokens: int = 0) -> Tensor:
        """Which tokens of the model the stored keys and new ones are: [B, Hkv, S] int64."""
        shape, device = self.head.shape[:2], self.head.device
        plain = torch.arange(self.length + new_tokens, device=device).expand(*shape, -1)
        sinks, packed = self.spec.sinks if self.packed else 0, self.packed
        slots = torch.arange(packed // self.spec.window, device=device)
        stored = self.fields[POSITION.name].index_select(2, slots).flatten(2)
        tail = plain[:, :, sinks + packed :] + self.dropped
        return torch.cat((plain[:, :, :sinks], stored, tail), dim=2)

    def rows(self) -> Tensor:
        """The dense tokens [B, Hkv, S, D] float32 in their order, evicted ones left out."""
        sinks, stale = self.spec.sinks, self._live[0]
        packed = self._decoded(*self._live)
        tail = self.tail[:, :, : self.length - self.packed].float()
        tokens = torch.cat((tail[:, :, :sinks], packed, tail[:, :, sinks:]), dim=2)
        return tokens[:, :, self.first - stale * self.spec.window :]

    @property
    def _live(self) -> tuple[int, int]:
        """The first page with a token that is not evicted, and the one after the last."""
        window = self.spec.window
        return min(self.first, self.packed) // window, self.packed // window

    def _stored(self, first: int, last: int) -> dict[str, Tensor]:
        """The fields of pages first to last, in their order."""
        slots = torch.arange(first, last, device=self.pages.device) % max(self.pages.shape[2], 1)
        return {name: field.index_select(2, slots) for name, field in self.fields.items()}

    def _decoded(self, first: int, last: int) -> Tensor:
        """The tokens [B, Hkv, n, D] float32 of pages first to last."""
        stored, before = self._stored(first, last), first * self.spec.window
        return self.format.decode(stored, self.constants, before).flatten(2, 3)

    def due(self, new_tokens: int, start: int | None = None, keep: int = ALL) -> int:
        """Number of pages to pack when ``new_tokens`` tokens are appended.

        Args:
            start: stored tokens in front of the first of them, after a crop; None appends.
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
            raise ValueError(_no_room(rows, self.tail))
        evicted = max(first, total - keep)
        if evicted and (self.spec.sinks or self.spec.evict is not None):
            kept = f"{self.spec.sinks} tokens" if self.spec.sinks else "tokens by a scorer"
            raise ValueError(f"keep is {keep}: a cache that keeps its first {kept} evicts none")
        live = packed // self.spec.window + due - evicted // self.spec.window
        if due and live > self.pages.shape[2]:
            raise ValueError(f"{live} pages do not fit into {self.pages.shape[2]}")
        return due

    def check_crop(self, length: int) -> None:
        """Raise ValueError unless there is room for what is dense after a crop to ``length``."""
        dense = length - self._packed_below(length)
        if dense > self.tail.shape[2]:
            raise ValueError(_no_room(dense, self.tail))

    def observe(self, query: Tensor) -> None:
        """Add queries [B, Hq, L, D] to the statistics that the next append will find."""
        if self.stats is not None:
            slot = self.stats[:, :, self.step % 2]
            each, heads = self.format.EACH_QUERY, self.head.shape[1]
            slot += query_stats(query, heads, self.spec.window, each=each)

    def append(
        self, new: Tensor, keep: int, query: Tensor | None = None, positions: Tensor | None = None
    ) -> None:
        """Append dense tokens [B, Hkv, L, D], pack the pages that are full, evict old tokens.

        Args:
            keep: number of latest tokens that stay.
            query: queries [B, Hq, L, D] to add to the statistics.
            positions: [B, Hkv, L] int64, which tokens of the model these are; by default those
                that come next.

        Raises:
            ValueError: there is no room, or the positions are not those of an evicted prompt;
                nothing is written.
        """
        dropped = self.dropped
        if positions is not None:
            dropped = evicted_before(positions, self.length, self.spec)
        due, sinks = self.due(new.shape[2], keep=keep), self.spec.sinks
        rows = torch.cat((self.tail[:, :, : self.length - self.packed], new), dim=2)
        self.dropped = dropped
        if self.stats is not None:
            self.stats[:, :, (self.step + 1) % 2] = self.stats[:, :, self.step % 2]
        self.step += 1
        if query is not None:
            self.observe(query)
        if due:
            end = sinks + due * self.spec.window
            self._pack(rows, sinks, end, positions)
            rows = torch.cat((rows[:, :, :sinks], rows[:, :, end:]), dim=2)
        self.tail[:, :, : rows.shape[2]] = rows
        self.length += new.shape[2]
        self.packed += due * self.spec.window
        self.first = max(self.first, self.length - keep)
        self._write_counters()

    def _pack(self, rows: Tensor, start: int, end: int, positions: Tensor | None) -> None:
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
        fields = self.format.encode(body, norms, self.constants)
        if POSITION.name in self.fields:
            if positions is None:
                first = self.packed + self.dropped
                positions = torch.arange(first, first + rows.shape[2], device=rows.device)
                positions = positions.expand(*rows.shape[:2], -1)
            by_page = positions[:, :, start:end].unflatten(2, (-1, self.spec.window))
            fields[POSITION.name] = by_page[:, :, -room:].unsqueeze(4).to(POSITION.dtype)
        for name, field in fields.items():
            self.fields[name].index_copy_(2, slots, field)
        if self.stats is not None:
            self.stats[:, :, self.step % 2] = 0

    def crop(self, length: int) -> None:
        """Forget the stored tokens from ``length`` on, counted from the first page.

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
        if not length:
            self.dropped = 0
        self._write_counters()

    def _packed_below(self, length: int) -> int:
        """Number of packed tokens after a crop to ``length``."""
        whole = max(length - self.spec.sinks, 0) // self.spec.window * self.spec.window
        return min(self.packed, whole)

    def _write_counters(self) -> None:
        counted = self.length, self.packed, self.first, self.step, self.dropped
        for counter, value in enumerate(counted):
            self.counters[..., counter] = value


def _no_room(rows: int, tail: Tensor) -> str:
    return f"{rows} dense tokens do not fit into a tail of {tail.shape[2]}"


def allocate(like: Tensor, spec: Spec, side: Side, pages: int, rows: int) -> Store:
    """An empty side with room for a number of pages and of tail rows, all zeros."""
    shapes = spec.stored_shapes(side, like.shape[:2], pages, rows)
    stored, head = (like.new_zeros(shape, dtype=torch.uint8) for shape in shapes)
    return Store(stored, head, spec, side)


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
