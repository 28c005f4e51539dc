"""States of caches that slide: their first tokens leave as new ones come.

What has left stays in the storage, in front, until there is as much of it as a handle has room to
grow: then the rest moves to the front of new buffers. A step copies nothing but every so often.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .cache import PrunedKeys, StoredValues, count_tensor
from .kernels.layout import value_fields
from .sharing import Rows, grown, slack


class SlidingKeys(PrunedKeys):
    """Keys of which the ``first`` (int64 scalar) stored ones are no longer part of the cache.

    There are no sink tokens: what comes first leaves first.
    """

    STORED = ("kept", "bits", "scale", "norms", "packed_length", "first", "stats", "tail")
    first: Tensor

    def stored_tokens(self) -> int:
        return int(self.shape[2]) + int(self.first)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> PrunedKeys:
        return self.trimmed().mapped(change) if int(self.first) else super().mapped(change)

    def trimmed(self) -> SlidingKeys:
        """The same tokens in buffers that begin with them."""
        packed_rows, _ = self._shares()
        stale = min(int(self.first), packed_rows.count)
        packed, dense = packed_rows.count - stale, self.shape[2] - packed_rows.count + stale
        room, left = slack(self.shape[2], self.config.window), int(self.first) - stale
        stored = self.stored()
        for name in ("kept", "bits", "scale"):
            stored[name] = grown(stored[name][:, :, stale:], packed, packed + room)
        stored["tail"] = grown(self.tail[:, :, left:], dense, dense + self.config.window)
        stored["packed_length"], stored["first"] = count_tensor(packed), count_tensor(0)
        handle = SlidingKeys(tuple(self.shape), self.config, stored)
        handle._packed_rows, handle._tail_rows = Rows(packed), Rows(dense)
        return handle


class SlidingValues(StoredValues):
    """Values of which the ``first`` (int64 scalar) stored ones are no longer part of the cache."""

    STORED = ("first", *value_fields(pruned=True, quantized=True))
    first: Tensor

    def stored_tokens(self) -> int:
        return int(self.shape[2]) + int(self.first)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> StoredValues:
        return self.trimmed().mapped(change) if int(self.first) else super().mapped(change)

    def trimmed(self) -> SlidingValues:
        """The same tokens in buffers that begin with them."""
        stale, length = int(self.first), self.shape[2]
        room = length + slack(length, self.config.window)
        stored = self.stored() | {"first": count_tensor(0)}
        for name, tensor in self._growing().items():
            stored[name] = grown(tensor[:, :, stale:], length, room)
        handle = SlidingValues(tuple(self.shape), self.config, stored)
        handle._rows = Rows(length)
        return handle


def dropped(state: PrunedKeys | StoredValues, tokens: int) -> SlidingKeys | SlidingValues:
    """A handle on a state's storage without its first ``tokens`` tokens."""
    stale = state.stored_tokens() - state.shape[2] + tokens
    length = state.shape[2] - tokens
    shape = (*state.shape[:2], length, state.shape[3])
    stored = state.stored() | {"first": count_tensor(stale)}
    handle: SlidingKeys | SlidingValues
    if isinstance(state, PrunedKeys):
        handle = SlidingKeys(shape, state.config, stored)
        handle._packed_rows, handle._tail_rows = (
            Rows(rows.count, shared_with=rows) for rows in state._shares()
        )
    else:
        handle = SlidingValues(shape, state.config, stored)
        rows = state._share()
        handle._rows = Rows(rows.count, shared_with=rows)
    return handle.trimmed() if stale >= slack(length, state.config.window) else handle
