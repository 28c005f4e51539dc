"""SparK-g and SparK-p (arXiv 2508.15212): as many channels of a token as its saliency asks for.

A token keeps the least number of channels, among those that are allowed, that hold a share p of
its saliency: .1, .3, .5, .7 or .9 of the channels (SparK-g), or any number (SparK-p, "top-p"). The
paper gives p and lets the bytes be what they become. Here a page has room for T channels per token,
which its tokens share, and p is the largest share that fits: tokens differ, pages do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Field, Format, Stored, bounded, check_choice, per_head
from .selection import check_kept, pack_bits, plane_bytes, unpack_bits
from .spark import floored, mean_of_pruned

GROUPS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class SparkG(Format):
    """T kept channels per token on average, and a sign and a common amplitude for the others.

    Fields of a token: ``amplitude`` (sqrt of the mean saliency of its pruned channels),
    ``channels`` (T of the kept ones of the page, token after token in channel order; the last are
    unused), ``keep`` and ``negative`` (bit planes). Of a head: ``norms``, those that the recovery
    divides by.
    """

    kept: int
    """T."""
    counts: str = "groups"
    """Numbers of channels that a token may keep: "groups" or "all"."""

    NAME = "spark-g"

    def __post_init__(self) -> None:
        check_kept(self, self.kept)
        check_choice(self, "counts", ("groups", "all"))

    @property
    def uses_queries(self) -> bool:
        return True

    def allowed(self) -> list[int]:
        """The numbers of channels that a token may keep, ascending; the least always fits."""
        if self.counts == "all":
            return list(range(1, self.head_dim + 1))
        groups = [round(share * self.head_dim) for share in GROUPS]
        return sorted({min(self.kept, max(groups[0], 1)), *(max(group, 1) for group in groups)})

    def fields(self) -> tuple[Field, ...]:
        plane = plane_bytes(self.head_dim)
        return (
            Field("amplitude", self.dtype, 1),
            Field("channels", self.dtype, self.kept),
            Field("keep", torch.uint8, plane),
            Field("negative", torch.uint8, plane),
            Field("norms", torch.bfloat16, self.head_dim, "head"),
        )

    def constants(self, rows: Tensor, norms: Tensor | None) -> dict[str, Tensor]:
        assert norms is not None
        return {"norms": norms.bfloat16()}

    def encode(self, rows: Tensor, norms: Tensor | None, constants: Stored) -> dict[str, Tensor]:
        assert norms is not None
        saliency = rows.float().square() * per_head(floored(norms), rows)
        ranked = saliency.sort(dim=-1, descending=True, stable=True)
        counts = self._counts(ranked.values)
        rank = torch.empty_like(ranked.indices)
        places = torch.arange(self.head_dim, device=rows.device).expand_as(rank)
        keep = rank.scatter_(-1, ranked.indices, places) < counts.unsqueeze(-1)
        recovered = rows.float().square() * per_head(floored(constants["norms"].float()), rows)
        amplitude = mean_of_pruned(recovered, keep).sqrt()
        # Kept channels in their order are the first ones of the page.
        order = keep.flatten(3).long().sort(dim=-1, descending=True, stable=True).indices
        room = rows.shape[3] * self.kept
        pool = rows.flatten(3).gather(-1, order[..., :room]).unflatten(-1, (-1, self.kept))
        return {
            "amplitude": bounded(amplitude, self.dtype),
            "channels": pool,
            "keep": pack_bits(keep),
            "negative": pack_bits(rows < 0),
        }

    def _counts(self, saliency: Tensor) -> Tensor:
        """How many channels each token keeps, [B, Hkv, N, P], of descending saliencies."""
        allowed = torch.tensor(self.allowed(), device=saliency.device)
        total = saliency.sum(-1, keepdim=True).clamp(min=1e-30)
        held = (saliency.cumsum(-1) / total)[..., allowed - 1]  # [B, Hkv, N, P, n]
        # Every share that matters: a token moves on to more channels when p exceeds one of them.
        shares = held.flatten(-2).nan_to_num(0.0).sort(-1).values  # [B, Hkv, N, P n]
        room = held.shape[-2] * self.kept
        low = torch.zeros_like(shares[..., 0], dtype=torch.long)  # with the least numbers: it fits
        high = torch.full_like(low, shares.shape[-1])
        # The largest share that fits, by bisection; once it is found nothing changes. Numbers that
        # decide when to stop could not be traced.
        for _ in range(shares.shape[-1].bit_length()):
            middle = (low + high) // 2
            share = shares.gather(-1, middle.unsqueeze(-1))
            fits = self._needed(held, share, allowed).sum(-1) <= room
            low, high = middle.where(fits, low), high.where(fits, middle)
        return self._needed(held, shares.gather(-1, low.unsqueeze(-1)), allowed)

    @staticmethod
    def _needed(held: Tensor, share: Tensor, allowed: Tensor) -> Tensor:
        """The least allowed number of channels [..., P] that hold a share [..., 1] of a token."""
        index = (held < share.unsqueeze(-1)).sum(-1).clamp(max=len(allowed) - 1)
        return allowed[index]

    def decode(self, stored: Stored, constants: Stored, first: int = 0) -> Tensor:
        keep = unpack_bits(stored["keep"], self.head_dim)
        pool = stored["channels"].float().flatten(-2)
        # More channels marked than stored, as in a damaged file, repeat the last one.
        rank = (keep.flatten(-2).long().cumsum(-1) - 1).clamp(min=0, max=pool.shape[-1] - 1)
        values = pool.gather(-1, rank).unflatten(-1, keep.shape[-2:])
        negative = unpack_bits(stored["negative"], self.head_dim)
        weight = per_head(floored(constants["norms"].float()).rsqrt(), keep)
        amplitude = stored["amplitude"].float() * weight
        return torch.where(keep, values, torch.where(negative, -amplitude, amplitude))
