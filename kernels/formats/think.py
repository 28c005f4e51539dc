"""ThinK's structured channels (arXiv 2407.21018): the same ones are kept of all tokens of a head.

With the queries of the window Q [W, D] and the keys K [S, D], channel j weighs the Frobenius norm
of its part of the scores, |Q_j K_j^T| = |Q_j| |K_j|; the T largest are kept, the others are zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Field, Format, Stored
from .selection import check_kept


@dataclass(frozen=True)
class Think(Format):
    """T channels per token, the same for all tokens of a key head.

    Fields of a token: ``channels``. Of a head: ``order``, which channels those are, ascending.
    """

    kept: int
    """T."""

    NAME = "think"
    EACH_QUERY = True

    def __post_init__(self) -> None:
        check_kept(self, self.kept)

    @property
    def uses_queries(self) -> bool:
        return True

    def fields(self) -> tuple[Field, ...]:
        return (
            Field("channels", self.dtype, self.kept),
            Field("order", torch.int16, self.kept, "head"),
        )

    def constants(self, rows: Tensor, norms: Tensor | None) -> dict[str, Tensor]:
        assert norms is not None
        weight = norms * rows.float().square().sum(2).sqrt()
        ranked = weight.sort(dim=-1, descending=True, stable=True).indices
        return {"order": ranked[..., : self.kept].sort(dim=-1).values.short()}

    def encode(self, rows: Tensor, norms: Tensor | None, constants: Stored) -> dict[str, Tensor]:
        return {"channels": rows.gather(-1, self._index(constants, rows))}

    def decode(self, stored: Stored, constants: Stored, first: int = 0) -> Tensor:
        channels = stored["channels"].float()
        rows = channels.new_zeros((*channels.shape[:-1], self.head_dim))
        return rows.scatter(-1, self._index(constants, channels), channels)

    def _index(self, constants: Stored, rows: Tensor) -> Tensor:
        # A damaged file may name channels that there are not.
        order = constants["order"].long().clamp(0, self.head_dim - 1)
        return order[:, :, None, None].expand(*rows.shape[:-1], -1)
