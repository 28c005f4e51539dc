"""Where the fields of a format lie in pages and heads: derived from the declaration, written once.

A cache side (the keys or the values of one layer) is two byte tensors.

- ``pages`` [B, Hkv, N, page bytes], uint8. A page holds P tokens that were packed at once, field by
  field: the P rows of the first field per token, then those of the next one, then the fields per
  page. A field begins at a multiple of the largest power of two, up to ``ALIGNMENT``, that divides
  its bytes in a page, so that a kernel loads whole vectors of it. Page i lies in slot i % N.
- ``head`` [B, Hkv, head bytes], uint8: five int64 counters, the fields per head, with a format that
  uses queries two slots of query statistics [D] float32, and the tail: rows of dense tokens.

The counters (the same for all batch entries and heads today):

- ``LENGTH``  tokens stored since the first page, evicted ones included;
- ``PACKED``  those of them that are in pages, a multiple of P;
- ``FIRST``   those of them, from the first on, that are no longer part of the cache;
- ``STEP``    appends so far: statistics are read from slot STEP % 2 and written to the other one,
  so that a handle of one append ago still finds its own;
- ``DROPPED`` tokens of the prompt that were not stored, because a scorer evicted them; they count
  as part of the cache, which has LENGTH - FIRST + DROPPED tokens for the model.

Where a scorer may evict, the pages of the keys have one more field, each token's ``position``:
which one of the tokens of the model it is. It may be another one in each key head. The first
``sinks`` tokens and the tail need none: token i of the tail is the model's i + DROPPED.

The order of the tokens is: the first ``sinks`` rows of the tail | packed | the rest of the tail.
Only FIRST = 0 goes with sinks. While nothing is packed the tail alone holds all tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import SymInt, Tensor

from .formats import Field, Format

VERSION = 4
"""To be raised with every change of what lies where, of how much room is made, or of a format: it
is part of each graph's text, so that no cache of compiled graphs serves one of another version, and
of each saved state."""
LENGTH, PACKED, FIRST, STEP, DROPPED = range(5)
COUNTERS = 5
MOST_TOKENS = 2**40
"""That a cache can count: sums of a few counters stay far from the ends of int64."""
ALIGNMENT = 16
"""Bytes; the widest load of a GPU."""
Count = int | SymInt
POSITION = Field("position", torch.int32, 1)
"""Which one of the tokens of the model a packed one is."""


def round_up(number: int, multiple: int) -> int:
    """The least multiple that is not smaller."""
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class PageLayout:
    """Pages of ``tokens`` tokens of a format."""

    format: Format
    tokens: int
    """P."""
    more: tuple[Field, ...] = ()
    """Fields after those of the format."""

    @functools.cached_property
    def offsets(self) -> dict[str, int]:
        """First byte of each field in a page."""
        return {field.name: first for field, first, _ in self._places}

    @property
    def token_bytes(self) -> int:
        """Bytes of the fields of one token."""
        return sum(field.nbytes for field in self._fields if field.per == "token")

    @functools.cached_property
    def page_bytes(self) -> int:
        """Bytes of one page, a multiple of 8."""
        return round_up(max((first + size for _, first, size in self._places), default=0), 8)

    def views(self, pages: Tensor) -> dict[str, Tensor]:
        """The fields of pages [B, Hkv, N, page bytes] by name, as views.

        [B, Hkv, N, P, width] per token, [B, Hkv, N, width] per page.
        """
        views = {}
        for field, first, size in self._places:
            view = pages[..., first : first + size].view(field.dtype)
            views[field.name] = (
                view.unflatten(3, (-1, field.width)) if field.per == "token" else view
            )
        return views

    def joined(self, fields: Mapping[str, Tensor]) -> Tensor:
        """Pages [B, Hkv, N, page bytes] of the fields that :meth:`views` gives; gaps are zeros."""
        placed = [(first, _as_bytes(fields[field.name], 3)) for field, first, _ in self._places]
        return _joined(placed, self.page_bytes)

    @functools.cached_property
    def _places(self) -> list[tuple[Field, int, int]]:
        """The fields in their order, with first byte and bytes of each."""
        places, end = [], 0
        for field in self._fields:
            size = field.nbytes * (self.tokens if field.per == "token" else 1)
            first = round_up(end, math.gcd(size, ALIGNMENT))
            places.append((field, first, size))
            end = first + size
        return places

    @property
    def _fields(self) -> list[Field]:
        """Those per token, then those per page."""
        own = [field for field in (*self.format.fields(), *self.more) if field.per != "head"]
        return sorted(own, key=lambda field: field.per != "token")


@dataclass(frozen=True)
class HeadLayout:
    """The head of a cache side."""

    format: Format

    @functools.cached_property
    def offsets(self) -> dict[str, int]:
        """First byte of each field per head, of "stats" and of "tail"."""
        offsets, end = {}, 8 * COUNTERS
        for field in self._fields:
            end = round_up(end, field.dtype.itemsize)
            offsets[field.name] = end
            end += field.nbytes
        offsets["tail"] = round_up(end, ALIGNMENT)
        return offsets

    @functools.cached_property
    def row_bytes(self) -> int:
        """Bytes of one dense token."""
        return self.format.head_dim * self.format.dtype.itemsize

    def head_bytes(self, rows: Count) -> Count:
        """Bytes of a head whose tail has room for ``rows`` tokens, a multiple of 8."""
        return self.offsets["tail"] + (rows * self.row_bytes + 7) // 8 * 8

    def tail_rows(self, head: Tensor) -> int:
        """Number of tokens that a head has room for in its tail."""
        return (head.shape[2] - self.offsets["tail"]) // self.row_bytes

    def tail(self, head: Tensor) -> Tensor:
        """The tail [B, Hkv, rows, D] as a view, all the rows that there is room for."""
        first, rows = self.offsets["tail"], self.tail_rows(head)
        stored = head[..., first : first + rows * self.row_bytes].view(self.format.dtype)
        tail: Tensor = stored.unflatten(2, (rows, self.format.head_dim))
        return tail

    def constants(self, head: Tensor) -> dict[str, Tensor]:
        """The fields per head [B, Hkv, width] by name, as views."""
        fields = [field for field in self._fields if field.name != "stats"]
        return {field.name: typed(head, self.offsets[field.name], field) for field in fields}

    def stats(self, head: Tensor) -> Tensor | None:
        """The two slots of statistics [B, Hkv, 2, D] as a view; None if the format has none."""
        field = next((field for field in self._fields if field.name == "stats"), None)
        if field is None:
            return None
        slots: Tensor = typed(head, self.offsets["stats"], field).unflatten(2, (2, -1))
        return slots

    def joined(
        self, counted: Tensor, constants: Mapping[str, Tensor], stats: Tensor | None, tail: Tensor
    ) -> Tensor:
        """A head [B, Hkv, head bytes] of its parts, as the methods give them; gaps are zeros.

        Args:
            counted: the counters, [B, Hkv, 5] int64.
        """
        parts = dict(constants) if stats is None else {**constants, "stats": stats}
        placed = [(0, _as_bytes(counted, 2))]
        placed += [
            (self.offsets[field.name], _as_bytes(parts[field.name], 2)) for field in self._fields
        ]
        placed.append((self.offsets["tail"], _as_bytes(tail, 2)))
        return _joined(placed, int(self.head_bytes(tail.shape[2])))

    @property
    def _fields(self) -> tuple[Field, ...]:
        own = tuple(field for field in self.format.fields() if field.per == "head")
        stats = Field("stats", torch.float32, 2 * self.format.head_dim, "head")
        return (*own, stats) if self.format.uses_queries else own


def _as_bytes(part: Tensor, dims: int) -> Tensor:
    """The bytes [..., n] uint8 of a tensor, of which ``dims`` dimensions stay."""
    return part.flatten(dims).contiguous().view(torch.uint8)


def _joined(placed: list[tuple[int, Tensor]], total: int) -> Tensor:
    """Bytes [..., total] of parts [..., n] that begin at ascending bytes; gaps are zeros."""
    pieces, end = [], 0
    for first, part in placed:
        pieces += [part.new_zeros((*part.shape[:-1], first - end))] if first > end else []
        pieces.append(part)
        end = first + part.shape[-1]
    last = pieces[-1]
    pieces += [last.new_zeros((*last.shape[:-1], total - end))] if total > end else []
    return torch.cat(pieces, dim=-1)


def counters(head: Tensor) -> Tensor:
    """The counters [B, Hkv, 5] int64 of a head, as a view."""
    return head[..., : 8 * COUNTERS].view(torch.int64)


def typed(stored: Tensor, first: int, field: Field) -> Tensor:
    """A field of bytes [..., n] that begins at byte ``first``, as a view [..., width]."""
    return stored[..., first : first + field.nbytes].view(field.dtype)
