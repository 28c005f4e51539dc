"""SparK's pruned keys in few bytes: kept channels quantized, and no bit twice.

What is kept and what the pruned channels recover to is as in :mod:`.spark` (squared saliency). Kept
channels are query-scaled before they are quantized: multiplied by sqrt(n_j / c_j), with n_j the
query norm of channel j and c_j the size of the keys, so that errors are small where queries look.
Where the kept channels are is a bit plane or a list of their numbers, whichever is shorter, and
only pruned channels have a sign.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Field, Format, Stored, bounded, per_head
from .codes import code_bytes, even_grid, levels_of, nearest, pack_codes, unpack_codes
from .selection import check_kept, expand, pack_bits, plane_bytes, select, unpack_bits
from .spark import floored, mean_of_pruned

LEAST_SIZE = 0.01
"""Of the mean size: a channel that is always small is not scaled up without end."""


@dataclass(frozen=True)
class SparkTight(Format):
    """T kept channels per token in few bits, and a sign and a common amplitude for the others.

    Fields of a token: ``amplitude`` (sqrt of the mean saliency of the pruned channels), ``step``
    and ``codes`` (the kept channels), ``where`` (which they are) and ``negative`` (signs of the
    pruned ones in channel order). Of a head: ``norms`` (n) and ``factor`` (sqrt(n / c)).
    """

    kept: int
    """T."""
    bits: int = 4
    """Of a kept channel: 4, 5, 6 or 8."""

    NAME = "spark-tight"

    def __post_init__(self) -> None:
        check_kept(self, self.kept)
        if self.bits not in (4, 5, 6, 8) or isinstance(self.bits, bool):
            raise ValueError(
                f"option 'bits' of format {self.NAME!r} is {self.bits!r}: allowed is 4, 5, 6, 8"
            )

    @property
    def uses_queries(self) -> bool:
        return True

    @property
    def _number_bits(self) -> int:
        """Bits of a channel's number."""
        return max(self.head_dim - 1, 1).bit_length()

    @property
    def _is_listed(self) -> bool:
        """Whether a list of the kept channels is shorter than a bit plane."""
        return plane_bytes(self.kept * self._number_bits) < plane_bytes(self.head_dim)

    def fields(self) -> tuple[Field, ...]:
        where = self.kept * self._number_bits if self._is_listed else self.head_dim
        return (
            Field("amplitude", self.dtype, 1),
            Field("step", self.dtype, 1),
            Field("codes", torch.uint8, code_bytes(self.kept, self.bits)),
            Field("where", torch.uint8, plane_bytes(where)),
            Field("negative", torch.uint8, plane_bytes(self.head_dim - self.kept)),
            Field("norms", torch.bfloat16, self.head_dim, "head"),
            Field("factor", torch.bfloat16, self.head_dim, "head"),
        )

    def constants(self, rows: Tensor, norms: Tensor | None) -> dict[str, Tensor]:
        assert norms is not None
        size = floored(rows.float().square().mean(2).sqrt(), LEAST_SIZE)
        return {
            "norms": norms.bfloat16(), "factor": (floored(norms) / size).sqrt().bfloat16(),
        }  # fmt: skip

    def encode(self, rows: Tensor, norms: Tensor | None, constants: Stored) -> dict[str, Tensor]:
        assert norms is not None
        magnitude, factor = rows.float().abs(), per_head(constants["factor"].float(), rows)
        salient = magnitude * per_head(floored(norms).sqrt(), rows)
        channels, keep = select(rows.float() * factor, salient, self.kept)
        weight = per_head(floored(constants["norms"].float()).sqrt(), rows)
        amplitude = mean_of_pruned((magnitude * weight).square(), keep).sqrt()
        grid = even_grid(self.bits)
        step = bounded(channels.abs().amax(-1, keepdim=True) / grid[-1], self.dtype)
        codes = nearest(channels / step.float().where(step > 0, 1.0), grid)
        pruned = keep.long().sort(dim=-1, stable=True).indices[..., : self.head_dim - self.kept]
        return {
            "amplitude": bounded(amplitude, self.dtype),
            "step": step,
            "codes": pack_codes(codes, self.bits),
            "where": self._placed(keep),
            "negative": pack_bits((rows < 0).gather(-1, pruned)),
        }

    def decode(self, stored: Stored, constants: Stored, first: int = 0) -> Tensor:
        codes = unpack_codes(stored["codes"], self.kept, self.bits)
        channels = levels_of(codes, even_grid(self.bits)) * stored["step"].float()
        keep = self._found(stored["where"])
        factor = per_head(constants["factor"].float(), keep)
        values = expand(channels, keep) / factor
        amplitude = stored["amplitude"].float()
        amplitude = amplitude / per_head(floored(constants["norms"].float()).sqrt(), keep)
        if self.kept == self.head_dim:
            return values
        negative = expand(unpack_bits(stored["negative"], self.head_dim - self.kept), ~keep)
        return torch.where(keep, values, torch.where(negative, -amplitude, amplitude))

    def _placed(self, keep: Tensor) -> Tensor:
        """The stored form of a mask [..., D] with T channels set."""
        if not self._is_listed:
            return pack_bits(keep)
        numbers = (~keep).long().sort(dim=-1, stable=True).indices[..., : self.kept]
        shifts = torch.arange(self._number_bits, device=keep.device)
        return pack_bits((((numbers.unsqueeze(-1) >> shifts) & 1) > 0).flatten(-2))

    def _found(self, where: Tensor) -> Tensor:
        """Undo :meth:`_placed`."""
        if not self._is_listed:
            return unpack_bits(where, self.head_dim)
        bits = unpack_bits(where, self.kept * self._number_bits)
        shifts = torch.arange(self._number_bits, device=where.device)
        numbers = (bits.unflatten(-1, (self.kept, -1)).long() << shifts).sum(-1)
        mask = torch.zeros(
            (*where.shape[:-1], self.head_dim), dtype=torch.bool, device=where.device
        )
        # A damaged file may name channels that there are not.
        return mask.scatter(-1, numbers.clamp(max=self.head_dim - 1), True)
