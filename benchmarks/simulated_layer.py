"""One layer of a simulated cache: when its keys are packed, and what they are then worth."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from spark_compile import SparkConfig
from spark_compile.kernels.formats import Format
from spark_compile.kernels.reference.store import query_stats


@dataclass
class SimulatedLayer:
    """What the method remembers of one layer, with dense keys in the place of packed ones."""

    config: SparkConfig
    sinks: int
    packed: Tensor | None = None
    """What the packed keys that are still visible are worth."""
    constants: dict[str, Tensor] = field(default_factory=dict)
    stats: Tensor | None = None
    tokens: int = 0
    """Of the cache, before those leave that the next step will not meet."""
    unpacked: int = 0
    """Tokens that are not packed, those that have left a sliding window since included."""
    updates: int = 0
    products: int = 0
    query_heads: int = 0
    _met: Tensor | None = None
    """The keys that the latest step's queries have met."""

    def update(self, keys: Tensor, new_tokens: int, kept_tokens: int) -> None:
        """Begin a step: new tokens have come; those that a sliding window has let go of leave.

        Args:
            keys: that the new tokens' queries meet.
            kept_tokens: of them, those that the queries of the next step will meet.
        """
        self._pack()
        evicted = self.tokens - (keys.shape[2] - new_tokens)
        if self.packed is not None:
            self.packed = self.packed[:, :, evicted:]
        # Of a prompt that is longer than its window only the end is ever stored.
        self.tokens = keys.shape[2] if self.updates else kept_tokens
        self.unpacked += new_tokens if self.updates else kept_tokens
        self.updates += 1

    def seen(self, keys: Tensor) -> Tensor:
        """The keys [B, Hkv, S, D] as the method sees them: sinks, recovered, recent."""
        if self.packed is None:
            return keys
        end = self.sinks + self.packed.shape[2]
        parts = (keys[:, :, : self.sinks], self.packed.to(keys.dtype), keys[:, :, end:])
        return torch.cat(parts, dim=2)

    def note(self, keys: Tensor, queries: Tensor) -> None:
        """Queries [B, Hkv, L, D] have met the keys of this step."""
        self.products += 1
        stats = query_stats(queries, keys.shape[1], self.config.window)
        self.stats = stats if self.stats is None else self.stats + stats
        self._met = keys

    def _pack(self) -> None:
        """Pack the whole pages that wait when a step is done (layers may share a cache)."""
        config, keys, self._met = self.config, self._met, None
        if keys is None or self.stats is None:
            return
        waiting = self.unpacked - self.sinks
        due = max(waiting - config.recent, 0) // config.window * config.window
        if not due or self.tokens < config.min_tokens:
            return
        first = keys.shape[2] - waiting
        block = keys[:, :, max(first, 0) : max(first + due, 0)]  # without what has left already
        fresh = self._worth(block, self.stats.sqrt())
        self.packed = fresh if self.packed is None else torch.cat((self.packed, fresh), dim=2)
        self.unpacked -= due
        self.stats = torch.zeros_like(self.stats)

    def _worth(self, block: Tensor, norms: Tensor) -> Tensor:
        """Keys [B, Hkv, n, D] encoded and decoded."""
        form: Format = self.config.format_for("key", block.shape[3], block.dtype)
        self.constants = self.constants or form.constants(block, norms)
        encoded = form.encode(block.unsqueeze(2), norms, self.constants)  # as one page
        return form.decode(encoded, self.constants).flatten(2, 3)
