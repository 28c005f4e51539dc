"""A cache side whose counters stay tensors, for :mod:`.portable`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..formats.base import Stored
from ..layout import LENGTH, PACKED, STEP, Count, counters
from ..spec import Side, Spec
from .store import query_stats


class PortableStore:
    """One side of a cache, as :class:`.store.Store` is, with tensors [1] int64 as counters.

    No token of it is ever evicted.
    """

    def __init__(self, pages: Tensor, head: Tensor, spec: Spec, side: Side) -> None:
        self.pages, self.head, self.spec = pages, head, spec
        self.format, self.of_pages, self.of_head = (
            spec.format(side), spec.pages(side), spec.head(side)
        )  # fmt: skip
        self.constants = self.of_head.constants(head)
        self.stats = self.of_head.stats(head)
        self.tail = self.of_head.tail(head)
        counted = counters(head)[0, 0].clone()  # not a view of what will be written
        self.length, self.packed, self.step = (
            counted[counter : counter + 1] for counter in (LENGTH, PACKED, STEP)
        )

    @property
    def room(self) -> int:
        """As many tokens as there will ever be, or more."""
        return self.pages.shape[2] * self.spec.window + self.tail.shape[2]

    def due(self, length: Tensor) -> Tensor:
        """``Spec.pages_due`` of that many tokens, [1]."""
        waiting = length - self.packed - self.spec.sinks - self.spec.recent
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

    def rows(self, new: Tensor, filled: Tensor) -> Tensor:
        """The rows [B, Hkv, T, D] float32 of tail, pages and a new token, zeros where none is."""
        rows = torch.cat((self.tail.float(), self._decoded, new.float()), dim=2)
        # What is not filled may be NaN, which a weight of zero does not undo.
        return rows.masked_fill(~filled.unsqueeze(1), 0)

    @functools.cached_property
    def _decoded(self) -> Tensor:
        """The tokens [B, Hkv, N * P, D] float32 of all pages that there is room for."""
        return self.format.decode(self.of_pages.views(self.pages), self.constants).flatten(2, 3)

    def rewind(self, length: Tensor) -> None:
        """Forget the tokens from ``length`` on, as ``Store.crop``; for now in this object alone."""
        sinks, window = self.spec.sinks, self.spec.window
        whole = (length - sinks).clamp(min=0) // window * window
        packed = torch.minimum(self.packed, whole)
        cut = packed + torch.arange(window, device=packed.device)
        page = self._decoded.index_select(2, cut.clamp(max=self._decoded.shape[2] - 1))
        page = page.to(self.tail.dtype)
        tail = torch.cat((self.tail[:, :, :sinks], page, self.tail[:, :, sinks + window :]), dim=2)
        self.tail = tail.where(packed < self.packed, self.tail)
        self.length, self.packed = length, packed

    def empty(self) -> None:
        """Forget all tokens, in this object alone."""
        self.length, self.packed = torch.zeros_like(self.length), torch.zeros_like(self.packed)

    def observe(self, query: Tensor) -> None:
        """``Store.observe``."""
        stats = self.stats
        if stats is not None:
            stats = stats.index_add(2, self.step % 2, self._noted(query))
        self._write(self.length, self.packed, self.step, self.constants, stats, self.tail)

    def append(self, new: Tensor, query: Tensor) -> None:
        """Append one token [B, Hkv, 1, D]."""
        spec, length, room = self.spec, self.length + 1, self.pages.shape[2]
        rows = self.tail.index_copy(2, self.length - self.packed, new)
        # So many are dense when the first page is due.
        full = max(spec.sinks + spec.recent + spec.window, spec.min_tokens)
        full = min(full, rows.shape[2])
        most = min((full - spec.sinks - spec.recent) // spec.window, room)
        due = self.due(length)
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
        """Append the tokens [B, Hkv, S, D] of a prompt to an empty cache."""
        spec, count, room = self.spec, rows.shape[2], self.pages.shape[2]
        length = torch.full_like(self.length, count)
        due = self.due(length)
        stats, norms = self._noted_by(query, due)
        body = rows
        if spec.sinks:
            # Two at least, so that no length is a case of its own: if fewer, none is due.
            index = torch.arange(torch.sym_max(count - spec.sinks, 2), device=rows.device)
            body = rows.index_select(2, (index + spec.sinks).clamp(max=count - 1))
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
        pages = torch.arange(most, device=rows.device).unsqueeze(1)  # type: ignore[arg-type]
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
