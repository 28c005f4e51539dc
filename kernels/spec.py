"""The spec: how the cache of one site is stored and when it is packed, as one short text.

    layout=4;key=spark(kept=26,stored=int8,recovery=degenerate,saliency=squared):128:bfloat16;
    value=int8:128:bfloat16;window=32;recent=32;sinks=0;min_tokens=0

Operators take it as a string, so that a new format changes no schema. Operators that attend get the
constants of the attention behind it: ``;scale=0.125;softcap=0.0``. Where prompts are evicted the
scorer is one more part: ``;evict=snapkv(tokens=128,window=64,kernel=5,pooling=average)``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NoReturn

import torch

from .eviction import Scorer, parse_scorer
from .formats import Field, Format, parse
from .layout import MOST_TOKENS, POSITION, VERSION, Count, HeadLayout, PageLayout

TAIL_STEP = 8
"""Rows by which the tail of a growing cache grows: a short cache takes no more than its tokens, and
a step in eight copies them."""
Side = Literal["key", "value"]
SIDES: tuple[Side, Side] = ("key", "value")
_NUMBERS = ("window", "recent", "sinks", "min_tokens")
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}


@dataclass(frozen=True)
class Spec:
    """Formats of keys and values, and the rhythm in which both are packed."""

    key: Format
    value: Format
    window: int
    """P, tokens of a page; also the number of queries of a prefill that count."""
    recent: int
    """Latest tokens that stay dense."""
    sinks: int = 0
    """First tokens that stay dense."""
    min_tokens: int = 0
    """Shorter contexts stay dense."""
    scale: float = 1.0
    """What dot products are multiplied with."""
    softcap: float = 0.0
    """Scores s become softcap * tanh(s / softcap); 0 leaves them."""
    rolls: int = 0
    """Number of latest tokens that stay visible to new ones, as in a full buffer that rolls: the
    others are evicted before the attention too. 0: all stay."""
    evict: Scorer | None = None
    """Which tokens of a prompt stay; None: all."""

    def __post_init__(self) -> None:
        for side in SIDES:
            if self.format(side).head_dim < 1:
                _refuse(f"head size of the {side}s", self.format(side).head_dim, "1 or more")
        for name in (*_NUMBERS, "rolls"):
            value, least = getattr(self, name), 1 if name == "window" else 0
            if not least <= value <= MOST_TOKENS:
                _refuse(name, value, f"{least} to {MOST_TOKENS}")
        for name in ("scale", "softcap"):
            if not math.isfinite(getattr(self, name)):
                _refuse(name, getattr(self, name), "a finite number")
        if self.evict is not None:
            self._check_eviction(self.evict)

    def _check_eviction(self, scorer: Scorer) -> None:
        least = self.sinks + max(self.recent + self.window, scorer.observed)
        if scorer.tokens < least:
            stay = f"the first {self.sinks}, the latest {max(self.recent, scorer.observed)}, and a"
            stay += f" page of {self.window} that are chosen"
            _refuse("tokens of " + scorer.text, scorer.tokens, f"{least} or more: {stay}")
        if scorer.BY_LAYER:
            raise ValueError(f"{scorer.text} is for all layers: allowed is what it is in one layer")
        if self.min_tokens or self.rolls:
            name = "min_tokens" if self.min_tokens else "rolls"
            _refuse(name, getattr(self, name), f"0 where {scorer.NAME} evicts")

    def __deepcopy__(self, memo: object) -> Spec:
        # Dynamo copies it for a guard of each state: what is the same object is equal at once.
        return self

    def format(self, side: Side) -> Format:
        return self.key if side == "key" else self.value

    def pages(self, side: Side) -> PageLayout:
        """The layout of a side's pages."""
        more = (POSITION,) if side == "key" and self.evict is not None else ()
        return _page_layout(self.format(side), self.window, more)

    def head(self, side: Side) -> HeadLayout:
        """The layout of a side's head."""
        return _head_layout(self.format(side))

    def stored_tokens(self, tokens: Count) -> Count:
        """Number of tokens of a prompt that are stored."""
        if self.evict is None:
            return tokens
        most = self.evict.tokens
        stored: Count = min(tokens, most) if type(tokens) is int else torch.sym_min(tokens, most)
        return stored

    @functools.cached_property
    def chosen_end(self) -> int:
        """The stored tokens of an evicted prompt without those at its end: they come after what
        was chosen, whole pages of it, and none of them was evicted."""
        if self.evict is None:
            return 0
        return self.sinks + int(self.pages_due(self.evict.tokens, 0)) * self.window

    def stored_index(self, position: int, dropped: int) -> int:
        """Number of stored tokens in front of a position of the model.

        Args:
            dropped: tokens of the prompt that were evicted.

        Raises:
            ValueError: there are evicted tokens on both sides of it, in other heads maybe, so that
                what is in front of it cannot be told.
        """
        index = position - dropped
        if not dropped or position == 0:
            return position
        if index < self.chosen_end:
            raise ValueError(
                f"position {position} is among the first {dropped + self.chosen_end} tokens, of "
                f"which {dropped} are evicted: evicted tokens cannot be recovered"
            )
        return index

    def pages_due(self, stored: Count, visible: Count, packed: Count = 0) -> Count:
        """Number of pages that are full and have to be packed.

        Args:
            stored: tokens since the first page.
            visible: those that are part of the cache.
            packed: those that are in pages.
        """
        waiting = _at_least_0(stored - packed - self.sinks - self.recent)
        due: Count = waiting // self.window
        return due if self.min_tokens == 0 or visible >= self.min_tokens else 0

    def _dense_of(self, tokens: Count) -> Count:
        """Number of tokens that are not packed when all pages that are due are."""
        if self.min_tokens and tokens < self.min_tokens:
            return tokens
        # Written so that torch knows of a symbol that this is not negative.
        least = self.sinks + self.recent
        stay = min(tokens, least) if type(tokens) is int else torch.sym_min(tokens, least)
        dense: Count = stay + _at_least_0(tokens - least) % self.window
        return dense

    def page_room(self, tokens: Count, capacity: Count | None = None) -> Count:
        """Number of pages to make room for, at least one; two where it grows.

        Args:
            tokens: of the cache now.
            capacity: that it will ever have; None lets it grow.
        """
        if capacity is not None:
            # One more for a page of which the first tokens are evicted.
            most = torch.sym_max(capacity - self.sinks - self.recent, 0) // self.window
            room: Count = most + 1
        else:
            # Two: Dynamo holds a size of one for constant.
            room = torch.sym_max(self.pages_due(tokens, tokens), 2)
        return room

    def tail_rows(self, tokens: Count = 0, capacity: Count | None = None) -> Count:
        """Room in a tail for what may stay dense.

        Args:
            tokens: of the cache now.
            capacity: number of tokens that it will ever have; None makes room for those of now.
        """
        if capacity is None:
            return (self._dense_of(tokens) + TAIL_STEP - 1) // TAIL_STEP * TAIL_STEP
        rows: Count = self.most_tail_rows
        if self.min_tokens:
            rows = torch.sym_max(rows, torch.sym_min(capacity, self.min_tokens))
        return rows

    @property
    def most_tail_rows(self) -> int:
        """Tokens that are dense when a page is due, where pages are."""
        return self.sinks + self.recent + self.window

    def room(self, tokens: Count = 0, capacity: Count | None = None) -> tuple[Count, Count]:
        """Pages and tail rows to make room for, as ``page_room`` and ``tail_rows`` say."""
        return self.page_room(tokens, capacity), self.tail_rows(tokens, capacity)

    def stored_shapes(
        self, side: Side, heads: Sequence[Count], pages: Count, rows: Count
    ) -> tuple[tuple[Count, ...], tuple[Count, ...]]:
        """The shapes of ``pages`` and ``head`` of a side.

        Args:
            heads: B and Hkv.
            pages: number of pages that there is room for.
            rows: number of tail rows.
        """
        page_bytes, head_bytes = self.pages(side).page_bytes, self.head(side).head_bytes(rows)
        return (*heads, pages, page_bytes), (*heads, head_bytes)

    def attending(self, scale: float, softcap: float, rolls: int = 0) -> Spec:
        """The same with the constants of an attention."""
        return replace(self, scale=scale, softcap=softcap, rolls=rolls)

    @functools.cached_property
    def text(self) -> str:
        """The spec as :func:`parse_spec` reads it; without scale 1 and softcap 0."""
        parts = [f"layout={VERSION}"]
        parts += [
            f"{side}={self.format(side).text}:{self.format(side).head_dim}:"
            f"{str(self.format(side).dtype).removeprefix('torch.')}"
            for side in SIDES
        ]
        parts += [f"{name}={getattr(self, name)}" for name in _NUMBERS]
        if self.evict is not None:
            parts.append(f"evict={self.evict.text}")
        if (self.scale, self.softcap) != (1.0, 0.0):
            parts += [f"scale={self.scale!r}", f"softcap={self.softcap!r}"]
        if self.rolls:
            parts.append(f"rolls={self.rolls}")
        return ";".join(parts)


@functools.lru_cache(maxsize=1024)
def parse_spec(text: str) -> Spec:
    """Undo ``Spec.text``.

    Raises:
        ValueError: the text does not have the form, is of another version of the layout, or names
            a format that is not known.
    """
    parts = dict(part.partition("=")[::2] for part in text.split(";"))
    if (version := parts.pop("layout", None)) != str(VERSION):
        raise ValueError(f"spec {text!r} is of layout {version}: allowed is {VERSION}")
    try:
        formats = {side: _parse_side(parts.pop(side)) for side in SIDES}
        numbers = {name: int(parts.pop(name)) for name in _NUMBERS}
        rolls = int(parts.pop("rolls", "0"))
        evict = parse_scorer(parts.pop("evict")) if "evict" in parts else None
        floats = {name: float(value) for name, value in parts.items()}
        return Spec(**formats, **numbers, **floats, rolls=rolls, evict=evict)  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"spec {text!r} cannot be read: {error}") from error


def _at_least_0(count: Count) -> Count:
    # sym_max asks many questions, too many for each step of each layer.
    least: Count = max(count, 0) if type(count) is int else torch.sym_max(count, 0)
    return least


def _refuse(name: str, value: float, allowed: str) -> NoReturn:
    raise ValueError(f"{name} is {value}: allowed is {allowed}")


def _parse_side(text: str) -> Format:
    name, dim, dtype = text.rsplit(":", 2)
    return parse(name, int(dim), DTYPES[dtype])


@functools.cache
def _page_layout(format: Format, tokens: int, more: tuple[Field, ...]) -> PageLayout:
    return PageLayout(format, tokens, more)


@functools.cache
def _head_layout(format: Format) -> HeadLayout:
    return HeadLayout(format)
