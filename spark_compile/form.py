"""What is constant about a state, whatever tokens it holds."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .kernels.spec import Side, Spec
from .kernels.spread import Spread


class StateForm(NamedTuple):
    """What is constant about a state: what Dynamo guards on besides its stored tensors."""

    spec: Spec
    static: bool = False
    """Whether it has a fixed capacity and is changed in place."""
    tokens_dim: int = 2
    """Dimension of the sequence: 2 in [B, Hkv, S, D], 1 in [B, S, Hkv, D] and [B, S, Hkv * D]."""
    strict: bool = False  # an operator that needs the dense tensor raises in place of a warning
    ranks: int = 1
    """How many ranks the context is spread over."""
    rank: int = 0
    """Which one this is, of those."""
    merged: bool = False
    """Whether heads and channels are one dimension: [B, S, Hkv * D]."""

    def shape(self, side: Side, head: Tensor, length: int) -> tuple[int, ...]:
        """The logical shape of ``length`` tokens."""
        heads, dim = head.shape[1], self.spec.format(side).head_dim
        if self.merged:
            return head.shape[0], length, heads * dim
        middle = (heads, length) if self.tokens_dim == 2 else (length, heads)
        return head.shape[0], *middle, dim

    def rows(self, tokens: Tensor, heads: int) -> Tensor:
        """Tokens of the logical layout as [B, Hkv, L, D]."""
        if self.merged:
            tokens = tokens.unflatten(2, (heads, -1))
        return tokens if self.tokens_dim == 2 else tokens.transpose(1, 2)

    def arranged(self, rows: Tensor) -> Tensor:
        """Tokens [B, Hkv, L, D] in the logical layout, contiguous."""
        if self.tokens_dim == 2:
            return rows
        tokens = rows.transpose(1, 2).contiguous()
        return tokens.flatten(2) if self.merged else tokens

    @property
    def spread(self) -> Spread:
        """Which tokens of the context are stored here."""
        return Spread(self.ranks, self.rank, self.spec.window)

    def own(self, tokens: int) -> int:
        """Number of tokens that are stored here, of the first ones of a context."""
        return tokens if self.ranks == 1 else int(self.spread.own(tokens))

    def taken(self, rows: Tensor, first: int) -> Tensor:
        """Those of tokens [B, H, L, D] from token ``first`` on that are stored here."""
        return rows if self.ranks == 1 else self.spread.taken(rows, first)
