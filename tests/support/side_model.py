"""One side of a cache as dense rows: what pages and heads must be worth, without either."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from spark_compile.kernels.reference.store import ALL, query_stats
from spark_compile.kernels.spec import Side, Spec


class SideModel:
    """Every token since the first page in the order of the positions, packed ones as decoded."""

    def __init__(self, spec: Spec, side: Side, batch: int, heads: int) -> None:
        self.spec, self.format = spec, spec.format(side)
        self.all_rows = torch.zeros(batch, heads, 0, self.format.head_dim)
        self.stats = torch.zeros(batch, heads, self.format.head_dim)
        self.constants: dict[str, Tensor] = {}
        self.packed = self.first = 0

    @property
    def length(self) -> int:
        """Number of tokens since the first page."""
        return self.all_rows.shape[2]

    @property
    def rows(self) -> Tensor:
        """The tokens that are part of the cache, [B, Hkv, S, D] float32."""
        return self.all_rows[:, :, self.first :]

    def copy(self) -> SideModel:
        return copy.deepcopy(self)

    def due(self, new_tokens: int) -> int:
        """Number of pages that fill up with ``new_tokens`` more."""
        length = self.length + new_tokens
        if length - self.first < self.spec.min_tokens:
            return 0
        return max(length - self.packed - self.spec.sinks - self.spec.recent, 0) // self.spec.window

    def observe(self, query: Tensor) -> None:
        if self.format.uses_queries:
            each, heads = self.format.EACH_QUERY, self.stats.shape[1]
            self.stats += query_stats(query, heads, self.spec.window, each=each)

    def append(self, new: Tensor, keep: int = ALL, query: Tensor | None = None) -> None:
        due = self.due(new.shape[2])
        self.all_rows = torch.cat((self.all_rows, new.float()), dim=2)
        if query is not None:
            self.observe(query)
        norms = self.stats.sqrt() if self.format.uses_queries else None
        if due and not self.packed:
            rows = self.all_rows[:, :, self.spec.sinks :].to(self.format.dtype)
            self.constants = self.format.constants(rows, norms)
        for _ in range(due):
            self._pack(norms)
        if due:
            self.stats = torch.zeros_like(self.stats)
        self.first = max(self.first, self.length - keep)

    def _pack(self, norms: Tensor | None) -> None:
        start = self.spec.sinks + self.packed
        page = self.all_rows[:, :, start : start + self.spec.window].unsqueeze(2)
        stored = self.format.encode(page.to(self.format.dtype), norms, self.constants)
        decoded = self.format.decode(stored, self.constants, self.packed).squeeze(2)
        self.all_rows = self.all_rows.clone()
        self.all_rows[:, :, start : start + self.spec.window] = decoded
        self.packed += self.spec.window

    def crop(self, length: int) -> None:
        """Forget the tokens from ``length`` on; what is left of a page is dense from then on."""
        sinks, window = self.spec.sinks, self.spec.window
        self.all_rows = self.all_rows[:, :, :length].clone()
        if length < sinks + self.packed:
            self.packed = max(length - sinks, 0) // window * window
            dense = self.all_rows[:, :, sinks + self.packed :]
            dense.copy_(dense.to(self.format.dtype))
        self.first = min(self.first, length)
