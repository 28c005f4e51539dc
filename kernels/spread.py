"""A context that is spread over ranks: blocks of tokens go round, and each rank stores its own.

What a rank stores of a layer is a cache like any other, of its own tokens alone. What is here says
which those are, and what masks of the whole context are for them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Count


class Spread(NamedTuple):
    """Token t of a context is rank ``t // block % ranks``'s."""

    ranks: int
    rank: int
    """Whose own tokens these are."""
    block: int
    """Consecutive tokens of one rank."""

    def own(self, tokens: Count) -> Count:
        """Number of own ones among the first tokens of the context."""
        turn = self.block * self.ranks
        whole, rest = tokens // turn * self.block, tokens % turn - self.rank * self.block
        if type(rest) is int:
            return whole + min(max(rest, 0), self.block)
        part: Count = torch.sym_min(torch.sym_max(rest, 0), self.block)
        return whole + part

    def positions(self, first: int, last: int, device: torch.device | None = None) -> Tensor:
        """Where own tokens among those from ``first`` to ``last`` are in the context: [n] int64."""
        numbers = torch.arange(int(self.own(first)), int(self.own(last)), device=device)
        block = numbers // self.block * self.ranks + self.rank
        return block * self.block + numbers % self.block

    def taken(self, rows: Tensor, first: int) -> Tensor:
        """Own tokens [B, H, n, D] among tokens [B, H, L, D], which begin with token ``first``."""
        last = first + rows.shape[2]
        count = int(self.own(last)) - int(self.own(first))
        if count in (0, rows.shape[2]):
            return rows[:, :, :count]
        return rows.index_select(2, self.positions(first, last, rows.device) - first)

    def seen(
        self, mask: Tensor | None, causal_offset: int | None, queries: int, tokens: int,
        device: torch.device,
    ) -> tuple[Tensor | None, int | None]:  # fmt: skip
        """Mask and causal offset of the own tokens among the first ones of the context.

        Args:
            mask: broadcast to [B, Hq, L, tokens], bool (True: visible) or additive.
            causal_offset: query i sees tokens j <= i + causal_offset; None sees all.
            queries: L.
            tokens: of the context, with those that are new.
            device: of the queries.

        Returns:
            Likewise for the own tokens. Causality of several queries is part of the mask.
        """
        if mask is None and causal_offset is None:
            return None, None
        if causal_offset is not None and queries == 1:
            causal_offset = int(self.own(min(max(causal_offset + 1, 0), tokens))) - 1
        if mask is None and queries == 1:
            return None, causal_offset
        positions = self.positions(0, tokens, device)
        if mask is not None and mask.shape[-1:].numel() > 1:
            mask = mask.index_select(-1, positions)
        if causal_offset is None or queries == 1:
            return mask, causal_offset
        latest = torch.arange(queries, device=device) + max(-queries, min(causal_offset, tokens))
        visible = positions <= latest.unsqueeze(1)
        if mask is None:
            return visible, None
        if mask.dtype == torch.bool:
            return mask & visible, None
        return mask.masked_fill(~visible, -torch.inf), None


def merged(parts: Tensor, ranks: int, dtype: torch.dtype) -> Tensor:
    """The attention over all tokens, of what each rank has of it, by log-sum-exp.

    Args:
        parts: [ranks * B, Hq, L, Dv + 1] float32: the output over a rank's own tokens, and the
            log-sum-exp, -inf where a query sees none of them.

    Returns:
        [B, Hq, L, Dv]. A query that sees nothing has output 0.
    """
    each = parts.unflatten(0, (ranks, parts.shape[0] // ranks))
    output, lse = each[..., :-1], each[..., -1:]
    top = lse.amax(0, keepdim=True)
    weights = torch.exp(lse - top.masked_fill(top == -torch.inf, 0))
    total = weights.sum(0)
    sums: Tensor = (weights * output).sum(0) / total.masked_fill(total == 0, 1)
    return sums.to(dtype)
