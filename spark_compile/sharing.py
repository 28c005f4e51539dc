"""Who may write where in a buffer that several cache handles read: Go slices with a memory.

A buffer is shared by every handle that was made from it. A handle may write into pages in place
only while no other living handle sees a page after its own last one; otherwise it takes a copy
first. Two continuations of one prefix therefore never see each other's tokens, while `crop` and
append, as speculative decoding does them, still copy nothing.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

_LARGE_BYTES = 1 << 17
_BLANK = "_spark_blank"
"""Attribute of pages that many caches share: what keeps the storage known as long as one lives."""
_blanks: weakref.WeakValueDictionary[tuple[Any, ...], Tensor] = weakref.WeakValueDictionary()

lock = threading.RLock()
"""Held from asking whether a buffer may be written to until the writer has its share."""


class Share:
    """One handle's share of a buffer: what it sees of it is its first ``count`` entries."""

    __slots__ = ("__weakref__", "_borrowed", "_latest", "_sharers", "count")

    def __init__(
        self, count: int, shared_with: Share | None = None, *, borrowed: bool = False
    ) -> None:
        """
        Args:
            count: entries that this handle sees.
            shared_with: a share of the same buffer; None where the buffer is new.
            borrowed: the buffer came from elsewhere: who shares it is not known.
        """
        self.count = count
        # A set of references that leave it by themselves: a WeakSet, at a third of the time.
        self._sharers: set[weakref.ref[Share]]
        self._latest: list[weakref.ref[Share]]
        if shared_with is None:
            self._borrowed, self._sharers, self._latest = borrowed, set(), []
        else:
            self._borrowed = shared_with._borrowed
            self._sharers, self._latest = shared_with._sharers, shared_with._latest
        self._sharers.add(weakref.ref(self, self._sharers.discard))

    def is_newest(self) -> bool:
        """Whether no other living handle sees an entry after these."""
        if self._borrowed or len(self._sharers) == 1:
            return not self._borrowed
        shares = [reference() for reference in self._sharers.copy()]
        return all(share is None or share.count <= self.count for share in shares)

    def is_alone(self) -> bool:
        """Whether no other handle on this buffer is alive."""
        return not self._borrowed and len(self._sharers) == 1

    def wrote(self) -> None:
        """Note that the buffer's counters are this handle's now."""
        self._latest[:] = [weakref.ref(self)]

    def is_current(self) -> bool:
        """Whether the buffer's counters are this handle's."""
        return self._borrowed or not self._latest or self._latest[0]() is self


def slack(count: int, least: int) -> int:
    """Entries to leave room for after ``count``, or to leave unused before them."""
    # A 1/32 share bounds the slack at 3 % and the copying at 32 entries per appended one.
    return max(least, count // 32)


def copied_pages(pages: Tensor, filled: int, needed: int) -> Tensor:
    """A copy of the first ``filled`` pages with room for ``needed`` ones and some more."""
    room = max(needed + slack(needed, 1), 2)  # Dynamo holds a size of one for constant
    copied = _new_pages(pages, (*pages.shape[:2], room, pages.shape[3]))
    copied[:, :, :filled] = pages[:, :, :filled]
    return copied


def _new_pages(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros, many from the system: `new_pages` in kernels/cpu/operands.h has the reason."""
    count = math.prod(shape)
    if type(like) is not Tensor or like.device.type != "cpu" or count < _LARGE_BYTES:
        return like.new_zeros(shape)
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return like.new_zeros(shape)
    room = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(room, dtype=torch.uint8).view(shape)


def blank_pages(like: Tensor) -> Tensor:
    """Pages of caches that have packed nothing: as good as ``like``, and all share one storage."""
    shape = (*like.shape[:2], 2, like.shape[3])  # Dynamo holds a size of one for constant
    # Dynamo guards on whether a tensor was made in inference mode.
    key = shape, like.device, torch.is_inference_mode_enabled()
    with lock:
        blank = _blanks.get(key)
        if blank is None:
            blank = _blanks[key] = like.new_zeros(shape)
    # A tensor of its own: Dynamo guards on which of its inputs are the same object.
    pages = like.new_empty(0).set_(blank.untyped_storage(), 0, blank.shape, blank.stride())
    setattr(pages, _BLANK, blank)
    return pages


def unshared(buffer: Tensor) -> Tensor:
    """The same bytes in a storage that no other cache has, as a file has to have them."""
    return buffer.clone() if hasattr(buffer, _BLANK) else buffer


def is_writable(buffer: Tensor) -> bool:
    """Whether a buffer may be written to by the one handle that sees what will be written.

    A tensor made in inference mode cannot be written to outside it.
    """
    if hasattr(buffer, _BLANK):
        return False
    return torch.is_inference_mode_enabled() or not buffer.is_inference()
