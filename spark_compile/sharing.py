"""Who may write where in a buffer that several cache handles read: Go slices with a memory.

A growing buffer is shared by every handle that was made from it. A handle of n rows may append in
place only while no other living handle sees a row behind its own n-th; otherwise the append takes
a copy first. Two continuations of one prefix therefore never see each other's tokens, while
`crop` and append, as speculative decoding does them, still copy nothing.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


class Rows:
    """One handle's share of a growable buffer: its first ``count`` rows."""

    __slots__ = ("__weakref__", "_borrowed", "_sharers", "count")

    def __init__(
        self, count: int, shared_with: Rows | None = None, *, borrowed: bool = False
    ) -> None:
        self.count = count
        # The buffer came from elsewhere: who shares it is not known, not even through other rows.
        self._borrowed: bool = borrowed if shared_with is None else shared_with._borrowed
        self._sharers: weakref.WeakSet[Rows] = (
            weakref.WeakSet() if shared_with is None else shared_with._sharers
        )
        self._sharers.add(self)

    def is_newest(self) -> bool:
        """Whether no other living handle sees a row behind these."""
        if self._borrowed:
            return False
        return all(other is self or other.count <= self.count for other in self._sharers)

    def reserve(
        self, buffers: tuple[Tensor, ...], extra: int, least: int
    ) -> tuple[tuple[Tensor, ...], Rows]:
        """Buffers [B, H, C, ...] whose rows ``count`` to ``count + extra`` may be written.

        Returns:
            The buffers themselves or, where they are too small or somebody else's, copies with
            room for at least ``least`` rows more, and the share of ``count + extra`` rows.
        """
        needed = self.count + extra
        if needed <= buffers[0].shape[2] and self.is_newest() and _writable(buffers[0]):
            return buffers, Rows(needed, shared_with=self)
        capacity = needed + slack(needed, least)
        return tuple(grown(buffer, self.count, capacity) for buffer in buffers), Rows(needed)


def slack(count: int, least: int) -> int:
    """Rows to leave room for behind ``count``, or to leave unused in front of them."""
    # A 1/32 share bounds the slack at 3 % and the copying at 32 rows per appended row.
    return max(least, count // 32)


def _writable(buffer: Tensor) -> bool:
    """A tensor made in inference mode cannot be written to outside it."""
    return torch.is_inference_mode_enabled() or not buffer.is_inference()


def grown(buffer: Tensor, count: int, capacity: int) -> Tensor:
    """A copy of the first ``count`` rows of [B, H, C, ...] with room for ``capacity`` rows."""
    copy = buffer.new_zeros((*buffer.shape[:2], capacity, *buffer.shape[3:]))
    copy[:, :, :count] = buffer[:, :, :count]
    return copy
