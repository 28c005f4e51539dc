"""SparK's pruned keys (arXiv 2508.15212, AAAI 2026), the way the authors' code prunes them.

With n_j the query norm of channel j and p = 1/2 ("squared" saliency) or p = 1 ("absolute"):

    sal_j = (|k_j| * n_j^p)^(1/p)            k_j^2 * n_j, or |k_j| * n_j as the paper has it
    keep the T channels of each token with the largest sal_j
    a     = mean of sal_j over the pruned channels of the token
    k^_j  = sign(k_j) * (a / n_j)^p          for pruned j
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Field, Format, Stored, bounded, check_choice, per_head
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

RECOVERIES = ("degenerate", "none", "exponential", "gaussian")
SALIENCIES = ("squared", "absolute")
NORM_FLOOR = 1e-3
"""Of the mean norm: a channel that no query looks at must not recover to infinity."""


@dataclass(frozen=True)
class Spark(Format):
    """T kept channels per token, and a sign and a common amplitude for the pruned ones.

    Fields of a token: ``amplitude`` (a^p; with "gaussian" recovery also the spread of the pruned
    saliencies, ^p), ``step`` (of int8 channels), ``channels`` (the kept ones in channel order),
    ``keep`` (bit plane: which channels those are) and ``negative`` (bit plane of the signs). Of a
    head: ``norms``, the n_j that the recovery divides by.
    """

    kept: int
    """T."""
    stored: str = "model"
    """Kept channels in the model's dtype, or "int8" with one step per token and head."""
    recovery: str = "degenerate"
    saliency: str = "squared"

    NAME = "spark"

    def __post_init__(self) -> None:
        check_kept(self, self.kept)
        check_choice(self, "stored", ("model", "int8"))
        check_choice(self, "recovery", RECOVERIES)
        check_choice(self, "saliency", SALIENCIES)

    @property
    def uses_queries(self) -> bool:
        return True

    def fields(self) -> tuple[Field, ...]:
        plane, is_int8 = plane_bytes(self.head_dim), self.stored == "int8"
        return (
            Field("amplitude", self.dtype, 2 if self.recovery == "gaussian" else 1),
            *((Field("step", self.dtype, 1),) if is_int8 else ()),
            Field("channels", torch.int8 if is_int8 else self.dtype, self.kept),
            Field("keep", torch.uint8, plane),
            Field("negative", torch.uint8, plane),
            Field("norms", torch.float32, self.head_dim, "head"),
        )

    def constants(self, rows: Tensor, norms: Tensor | None) -> dict[str, Tensor]:
        assert norms is not None
        return {"norms": norms}

    def encode(self, rows: Tensor, norms: Tensor | None, constants: Stored) -> dict[str, Tensor]:
        assert norms is not None
        power, magnitude = exponent(self.saliency), rows.float().abs()
        # sal^p has the order of sal.
        salient = magnitude * per_head(floored(norms).pow(power), rows)
        channels, keep = select(rows, salient, self.kept)
        weight = per_head(floored(constants["norms"]).pow(power), rows)
        amplitude = self._amplitude((magnitude * weight).pow(1 / power), keep).pow(power)
        stored = {
            "amplitude": bounded(amplitude, rows.dtype),
            "keep": pack_bits(keep),
            "negative": pack_bits(rows < 0),
        }
        if self.stored == "int8":
            channels, stored["step"] = quantize(channels)
        return stored | {"channels": channels}

    def _amplitude(self, saliency: Tensor, keep: Tensor) -> Tensor:
        """Mean, and for "gaussian" also the deviation, of pruned saliencies: [..., 1 or 2]."""
        mean = mean_of_pruned(saliency, keep)
        if self.recovery != "gaussian":
            return mean
        return torch.cat((mean, mean_of_pruned((saliency - mean).square(), keep).sqrt()), dim=-1)

    def check(self, stored: Stored) -> None:
        check_marked(self, stored["keep"], self.kept)

    def decode(self, stored: Stored, constants: Stored, first: int = 0) -> Tensor:
        channels, dim = stored["channels"], self.head_dim
        values = dequantize(channels, stored["step"]) if "step" in stored else channels.float()
        keep = unpack_bits(stored["keep"], dim)
        values = expand(values, keep)
        if self.recovery == "none":
            return torch.where(keep, values, 0.0)
        negative, power = unpack_bits(stored["negative"], dim), exponent(self.saliency)
        weight = per_head(floored(constants["norms"]).pow(-power), keep)
        amplitude = self._drawn(stored["amplitude"].float(), keep.shape, first) * weight
        return torch.where(keep, values, torch.where(negative, -amplitude, amplitude))

    def _drawn(self, amplitude: Tensor, shape: torch.Size, first: int) -> Tensor:
        """sal^p of the pruned channels: the mean itself, or a draw from the cached distribution."""
        mean_p, power = amplitude[..., :1], exponent(self.saliency)
        if self.recovery == "degenerate":
            return mean_p
        _, heads, pages, page_tokens, channels = shape
        uniform = _uniform(heads, first, pages * page_tokens, channels, amplitude.device)
        uniform = uniform.unflatten(1, (pages, page_tokens))
        if self.recovery == "exponential":
            exponential: Tensor = mean_p * (-uniform.log()).pow(power)
            return exponential
        normal = (2.0 * uniform - 1.0).erfinv() * 2.0**0.5
        mean, spread = mean_p.pow(1 / power), amplitude[..., 1:].pow(1 / power)
        drawn: Tensor = (mean + spread * normal).clamp(min=0).pow(power)
        return drawn


def mean_of_pruned(saliency: Tensor, keep: Tensor) -> Tensor:
    """Mean [..., 1] over the channels [..., D] that are not kept; 0 if all are."""
    pruned = (~keep).sum(-1, keepdim=True).clamp(min=1)
    return saliency.masked_fill(keep, 0).sum(-1, keepdim=True) / pruned


def exponent(saliency: str) -> float:
    """p of the module's formulas."""
    return 0.5 if saliency == "squared" else 1.0


def floored(norms: Tensor, share: float = NORM_FLOOR) -> Tensor:
    """Norms or sizes [..., D], at least a share of their mean, so that dividing stays finite."""
    floor = (norms.mean(-1, keepdim=True) * share).clamp(min=1e-12)
    return torch.maximum(norms, floor)


def _uniform(heads: int, first: int, tokens: int, channels: int, device: torch.device) -> Tensor:
    """Numbers in (0, 1), [H, S, D], that depend on nothing but their position (the fixed seed).

    A counter-based hash (the 32-bit finalizer of MurmurHash3), so that a kernel can make the
    number of one channel without its neighbours and every step sees the same key.
    """
    head = torch.arange(heads, device=device).view(-1, 1, 1)
    token = torch.arange(first, first + tokens, device=device).view(1, -1, 1)
    channel = torch.arange(channels, device=device)
    low = 0xFFFFFFFF
    mixed = (head * 0x9E3779B1 + token * 0x85EBCA77 + channel * 0xC2B2AE3D) & low
    mixed = ((mixed ^ (mixed >> 16)) * 0x85EBCA6B) & low
    mixed = ((mixed ^ (mixed >> 13)) * 0xC2B2AE35) & low
    mixed = mixed ^ (mixed >> 16)
    return ((mixed >> 8).float() + 0.5) / 2.0**24
