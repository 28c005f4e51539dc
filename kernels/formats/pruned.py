"""Pruned values, by the rule of the SparK authors' code (``compress_values``).

A channel's score is 0.7 |v_j| + 0.3 d_j, where d is the mean of the channel's variance over the
tokens and of the token's variance over the channels, divided by its maximum over both. The second
variance is the same for all channels of a token, so what ranks them is |v_j| plus a bias per head
and channel. Pruned channels are filled with their mean ("mean fill").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Field, Format, Stored, check_choice, per_head
from .int8 import dequantize, quantize
from .selection import (
    check_kept,
    check_marked,
    expand,
    pack_bits,
    plane_bytes,
    select,
    unpack_bits,
)


@dataclass(frozen=True)
class Pruned(Format):
    """T kept channels per token, the others filled with their mean.

    Fields of a token: ``fill``, ``step`` (of int8 channels), ``channels`` and ``keep`` as
    :class:`.spark.Spark` has them. Of a head: ``bias``, what a channel's magnitude is raised by
    when the channels to keep are chosen.
    """

    kept: int
    """T."""
    stored: str = "model"
    """Kept channels in the model's dtype, or "int8" with one step per token and head."""

    NAME = "pruned"

    def __post_init__(self) -> None:
        check_kept(self, self.kept)
        check_choice(self, "stored", ("model", "int8"))

    def fields(self) -> tuple[Field, ...]:
        is_int8 = self.stored == "int8"
        return (
            Field("fill", self.dtype, 1),
            *((Field("step", self.dtype, 1),) if is_int8 else ()),
            Field("channels", torch.int8 if is_int8 else self.dtype, self.kept),
            Field("keep", torch.uint8, plane_bytes(self.head_dim)),
            Field("bias", torch.float32, self.head_dim, "head"),
        )

    def constants(self, rows: Tensor, norms: Tensor | None) -> dict[str, Tensor]:
        over_tokens, over_channels = _variance(rows.float(), 2), _variance(rows.float(), 3)
        largest = over_tokens.amax(-1, keepdim=True) + over_channels.amax(-1, keepdim=True)
        return {"bias": (0.3 / 0.7) * over_tokens / (largest + 2e-8)}

    def encode(self, rows: Tensor, norms: Tensor | None, constants: Stored) -> dict[str, Tensor]:
        salient = rows.float().abs() + per_head(constants["bias"], rows)
        channels, keep = select(rows, salient, self.kept)
        pruned = (~keep).sum(-1, keepdim=True).clamp(min=1)
        fill = rows.float().masked_fill(keep, 0).sum(-1, keepdim=True) / pruned
        stored = {"fill": fill.to(rows.dtype), "keep": pack_bits(keep)}
        if self.stored == "int8":
            channels, stored["step"] = quantize(channels)
        return stored | {"channels": channels}

    def check(self, stored: Stored) -> None:
        check_marked(self, stored["keep"], self.kept)

    def decode(self, stored: Stored, constants: Stored, first: int = 0) -> Tensor:
        channels = stored["channels"]
        values = dequantize(channels, stored["step"]) if "step" in stored else channels.float()
        keep = unpack_bits(stored["keep"], self.head_dim)
        return torch.where(keep, expand(values, keep), stored["fill"].float())


def _variance(value: Tensor, dim: int) -> Tensor:
    """The unbiased variance along ``dim``; 0 where there is one entry."""
    centered = value - value.mean(dim, keepdim=True)
    return centered.square().sum(dim) / max(value.shape[dim] - 1, 1)
