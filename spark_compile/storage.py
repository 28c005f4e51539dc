"""What a state stores, and how it grows: handles that share pages, and states of a capacity."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from .form import StateForm
from .kernels.layout import COUNTERS, FIRST, counters
from .kernels.reference.store import ALL, Store
from .kernels.spec import Side, Spec
from .report import SparkError
from .sharing import Share, blank_pages, copied_pages, is_writable, lock, slack
from .torch_private import is_fake, make_wrapper_subclass, maybe_mark_dynamic

STORED = ("pages", "head")
"""The stored tensors of a state, in the order in which graphs take and return them."""


@functools.cache
def _growing_marks(dim: int) -> dict[str, Any]:
    """What ``maybe_mark_dynamic`` notes on a tensor; on a state it would go through all inside."""
    marked = torch.empty(0, 0, 0)
    maybe_mark_dynamic(marked, dim)
    return dict(marked.__dict__)


class Counts(NamedTuple):
    """The counters of a head without its length, as numbers on the host."""

    packed: int
    first: int
    step: int
    dropped: int


class Storage(torch.Tensor):
    """The storage of one side of a layer's cache: ``pages`` and ``head``.

    A growing state is a handle: it never changes, and a step makes another one. A static state has
    a fixed capacity, zeros where no token is yet, and steps change it in place.
    """

    SIDE: ClassVar[Side]
    form: StateForm
    pages: Tensor
    head: Tensor
    _borrowed: bool = False  # made by tracing machinery from tensors that others may share
    _counts: Counts | None = None
    _page_share: Share | None = None
    _head_share: Share | None = None

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], form: StateForm, stored: Mapping[str, Tensor]) -> Self:
        made: Self = make_wrapper_subclass(
            cls, shape, dtype=form.spec.format(cls.SIDE).dtype, device=stored["head"].device,
            requires_grad=False,
        )  # fmt: skip
        return made

    def __init__(
        self, shape: tuple[int, ...], form: StateForm, stored: Mapping[str, Tensor]
    ) -> None:
        self.form = form
        self.pages, self.head = stored["pages"], stored["head"]
        # A plain tensor is told first: asking costs as much as the rest, at each step.
        if not form.static and (type(self.head) is Tensor or not is_fake(self.head)):
            self._mark_growing()

    @property
    def spec(self) -> Spec:
        """How it is stored and packed."""
        return self.form.spec

    @property
    def static(self) -> bool:
        """Whether it has a fixed capacity and is changed in place."""
        return self.form.static

    @property
    def tokens(self) -> int:
        """S: the length of a growing state, the capacity of a static one."""
        tokens: int = self.shape[self.form.tokens_dim]
        return tokens

    def _mark_growing(self) -> None:
        """Tell Dynamo that lengths and capacities change, so that no graph burns them in."""
        for tensor, dim in ((self, self.form.tokens_dim), (self.pages, 2), (self.head, 2)):
            marks, known = _growing_marks(dim), tensor.__dict__
            if not marks.keys() <= known.keys():
                for name, mark in marks.items():
                    known[name] = copy(mark)

    # What is stored

    def stored(self) -> dict[str, Tensor]:
        """The stored tensors by name, with counters that are this handle's."""
        return {"pages": self.pages, "head": self._current_head()}

    def _read_counts(self) -> Counts:
        """The counters on the host: known of a growing state, read from a static one."""
        with lock:
            if not self.static and self._counts is not None:
                return self._counts
            filled = counters(self.head)[:1, :1].flatten().tolist() or [0] * COUNTERS
            self._counts = Counts(*filled[1:])
            return self._counts

    @property
    def _stored_tokens(self) -> int:
        """Tokens that a growing state stores: not other ranks' and evicted ones of its prompt."""
        return self.form.own(self.tokens) - self._read_counts().dropped

    def _shares(self) -> tuple[Share, Share]:
        """The shares of the pages and of the head, made when first asked for."""
        with lock:
            if self._page_share is None or self._head_share is None:
                pages = self._read_counts().packed // self.spec.window
                self._page_share = Share(pages, borrowed=self._borrowed)
                self._head_share = Share(self._read_counts().step, borrowed=self._borrowed)
            return self._page_share, self._head_share

    def _current_head(self) -> Tensor:
        """The head with this handle's counters; of a growing state a copy, that no step changes."""
        return self.head if self.static or is_fake(self.head) else self._copied_head()

    def _copied_head(self, rows: int | None = None) -> Tensor:
        """A copy of the head with this handle's counters and room for ``rows`` tail rows."""
        layout, head = self.spec.head(self.SIDE), self.head.clone()
        if rows is not None and (size := int(layout.head_bytes(rows))) != head.shape[2]:
            resized = head.new_zeros((*head.shape[:2], size))
            both = min(size, head.shape[2])
            resized[..., :both] = head[..., :both]
            head = resized
        if not self.static:
            counts = self._read_counts()
            values = (counts.first + self._stored_tokens, *counts)
            counters(head).copy_(torch.tensor(values, dtype=torch.int64), non_blocking=True)
        return head

    def _handle(
        self, length: int, counts: Counts, pages: Tensor, head: Tensor,
        page_share: Share | None = None, head_share: Share | None = None,
    ) -> Self:  # fmt: skip
        """Another handle of this kind; without shares its buffers are new."""
        shape = self.form.shape(self.SIDE, head, length)
        handle = type(self)(shape, self.form, {"pages": pages, "head": head})
        handle._counts = counts
        handle._page_share = page_share or Share(counts.packed // self.spec.window)
        handle._head_share = head_share or Share(counts.step)
        return handle

    # What becomes of it

    def grown(
        self, extra: int, keep: int = ALL, *, shared: bool = False, queried: bool = True
    ) -> Self:
        """The handle after a step that appends ``extra`` tokens and keeps the last ``keep``.

        Its buffers are those that the step has to be given: this handle's where nobody is
        disturbed, else copies, with the room that the step needs.

        Args:
            shared: several attentions note their queries in this step.
            queried: there are queries, by which tokens of a prompt are evicted.
        """
        with lock:
            tokens = self.tokens
            own = self.form.own(tokens + extra) - self.form.own(tokens)
            chosen = queried and not tokens
            stored = int(self.spec.stored_tokens(own)) if chosen else own
            return self.trimmed()._grown(extra, stored, own - stored, keep, shared)

    def _grown(self, tokens: int, extra: int, evicted: int, keep: int, shared: bool) -> Self:
        """Likewise with ``extra`` tokens that are stored and others that are evicted at once."""
        spec, window, visible = self.spec, self.spec.window, self._stored_tokens + extra
        pages_share, head_share = self._shares()
        packed, first, step, dropped = self._read_counts()
        total = first + visible
        due = int(spec.pages_due(total, visible, packed))
        after = packed + due * window
        pages, room = self.pages, spec.head(self.SIDE).tail_rows(self.head)
        newest = pages_share.is_newest()
        if due and not (newest and is_writable(pages) and after // window <= pages.shape[2]):
            pages = copied_pages(pages, packed // window, after // window)
            pages_share = Share(packed // window)
            if newest:  # a cache holds this handle until the step is over: not two buffers
                self.pages, self._page_share = pages, pages_share
        new_pages = Share(after // window, shared_with=pages_share)
        in_place = (
            not due and not shared and total - after <= room and head_share.is_alone()
            and head_share.is_current() and is_writable(self.head)
        )  # fmt: skip
        if in_place:
            head, new_head = self.head, Share(step + 1, shared_with=head_share)
        else:
            # The step reads the dense tokens of now before it packs some of them.
            rows = max(int(spec.tail_rows(visible)), total - after, total - extra - packed)
            head, new_head = self._copied_head(rows), Share(step + 1)
        leaves = max(visible - keep, 0)
        counts = Counts(after, first + leaves, step + 1, dropped + evicted)
        length = self.tokens + tokens - leaves
        handle = self._handle(length, counts, pages, head, new_pages, new_head)
        new_head.wrote()
        return handle

    def trimmed(self) -> Self:
        """The same tokens in pages and a tail that begin with them, once much before is stale."""
        window, counts = self.spec.window, self._read_counts()
        packed, stale = counts.packed // window, min(counts.first, counts.packed) // window
        stale_rows = max(counts.first - counts.packed, 0)  # then all that is packed is stale
        if stale <= slack(packed - stale, 1) and stale_rows < window:
            return self
        pages = copied_pages(self.pages[:, :, stale:], packed - stale, packed - stale)
        moved = stale * window
        first = counts.first - moved - stale_rows
        counts = Counts(counts.packed - moved, first, counts.step, 0)
        handle = self._handle(self.tokens, counts, pages, self.head)
        if stale_rows:
            handle.head = handle._copied_head()
            tail = self.spec.head(self.SIDE).tail(handle.head)
            tail[:, :, : self.tokens] = tail[:, :, stale_rows:][:, :, : self.tokens].clone()
        handle.head = handle._copied_head(handle._least_rows(handle._stored_tokens))
        return handle

    def _least_rows(self, length: int) -> int:
        """Room in a tail for what is dense of ``length`` stored tokens, and the next steps."""
        counts = self._read_counts()
        return max(int(self.spec.tail_rows(length)), counts.first + length - counts.packed)

    def fixed(self) -> Self:
        """A static state of the same tokens, of which there are as many as it will ever have."""
        spec, window, counts = self.spec, self.spec.window, self._read_counts()
        stale = min(counts.first, counts.packed) // window
        live = self.pages[:, :, stale : counts.packed // window]
        room = max(int(spec.page_room(self.tokens, self.tokens)), live.shape[2])
        pages = live.new_zeros((*live.shape[:2], room, live.shape[3]))
        pages[:, :, : live.shape[2]] = live
        head = self._copied_head(int(spec.tail_rows(self.tokens, self.tokens)))
        counters(head)[..., : FIRST + 1] -= stale * window
        form = self.form._replace(static=True)
        return type(self)(tuple(self.shape), form, {"pages": pages, "head": head})

    def resized(self, length: int) -> Self:
        """A handle on the first ``length`` tokens, sharing the pages.

        Raises:
            SparkError: they end among those of an evicted prompt.
        """
        counts = self._read_counts()
        try:
            stored = self.spec.stored_index(self.form.own(length), counts.dropped)
        except ValueError as error:
            raise SparkError(f"a cache cannot be cut at {length} tokens: {error}") from error
        head = self._copied_head(self._least_rows(stored))
        store = Store(self.pages, head, self.spec, self.SIDE)
        if length < self.tokens:
            store.crop(counts.first + stored)
        counts = Counts(store.packed, store.first, store.step, store.dropped)
        with lock:
            share = Share(store.packed // self.spec.window, shared_with=self._shares()[0])
            return self._handle(length, counts, self.pages, head, share)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        """A state on storage of its own, with ``change`` done to each stored tensor [B, ...]."""
        counts, pages, head = self._read_counts(), self.pages, self.head
        if not self.static:
            pages = pages[:, :, : max(counts.packed // self.spec.window, 2)]
            head = self._copied_head(self._least_rows(self._stored_tokens))
        is_blank = not self.static and not counts.packed
        pages = blank_pages(change(pages)) if is_blank else change(pages)
        return self._handle(self.tokens, counts, pages, change(head))

    def replace_storage(self, pages: Tensor, head: Tensor) -> None:
        """Hold the same number of tokens in other buffers."""
        self.pages, self.head = pages, head
        self._counts = self._page_share = self._head_share = None
