"""Tokens quantized to few bits, more of them for the channels that decide scores.

Every token has one amplitude. Without query scaling that is the rotated quantizer of QuaRot
(arXiv 2404.00456) and TurboQuant (arXiv 2504.19874): a Hadamard rotation makes the channels alike
and nearly normal, so that the best levels are known beforehand.

With query scaling, for keys, SparK's saliency decides (arXiv 2508.15212). An error e_j of channel j
costs n_j e_j in a score, n_j being the query norm of the channel, and the error is as large as the
channel's spread c_j. So, per key head and fixed when the first page is packed:

    x_j = (k_j - m_j) * sqrt(n_j / c_j)      m_j the mean of the keys, c_j their spread around it

whose spread is sqrt(n_j c_j): channels are ranked by that, and those of high rank get more bits. A
query takes the inverse factors once, and q.m once: nothing is paid per token.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from .base import Field, Format, Stored
from .codes import (
    DEVIATION,
    code_bytes,
    even_grid,
    levels_of,
    nearest,
    normal_grid,
    pack_codes,
    unpack_codes,
)  # fmt: skip
from .rotation import rotated

FLOOR = 0.01
"""Of the mean: least norm and spread of a channel, and size of a part; no factor is extreme."""
EVEN_BITS = 5
"""From so many bits on a uniform grid up to the largest channel errs less than a normal one."""
REFITS = 2


class Part(NamedTuple):
    """Channels of consecutive ranks with equal bits."""

    first: int
    channels: int
    bits: int


@dataclass(frozen=True)
class Quantized(Format):
    """Every channel as one of 2^bits levels in units of the token's amplitude.

    Fields of a token: ``amplitude`` and ``codes``, part after part. Of a head, with query scaling:
    ``center`` (m), ``factor`` (sqrt(n / c)), ``order`` (the channels by falling rank) and ``gain``
    (what a level of a part is worth beside one of the others).
    """

    bits: str = "4"
    """Bits per channel, 1 to 6, or of equal shares of the channels by falling rank: "4-2-2-1"."""
    scaled: bool = False
    """Query scaling; for keys."""
    rotated: bool = True
    """Whether channels of equal bits are rotated."""

    NAME = "quantized"
    EACH_QUERY = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", str(self.bits))  # a text may give it as a number
        words = self.bits.split("-")
        if any(word not in {"1", "2", "3", "4", "5", "6"} for word in words):
            allowed = "1 to 6, or several of them as in 4-2-2-1"
            raise ValueError(f"option 'bits' of {self.NAME!r} is {self.bits}: allowed is {allowed}")
        if len(words) > 1 and not self.scaled:
            raise ValueError(
                f"option 'bits' of {self.NAME!r} is {self.bits}: without scaled=True, which ranks "
                "the channels, allowed is one number"
            )
        if self.head_dim % len(words):
            raise ValueError(
                f"option 'bits' of {self.NAME!r} is {self.bits}: {self.head_dim} channels have no "
                f"{len(words)} equal shares"
            )
        for name in ("scaled", "rotated"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(
                    f"option {name!r} of {self.NAME!r} is {value!r}: allowed is True or False"
                )

    @property
    def uses_queries(self) -> bool:
        return self.scaled

    @functools.cached_property
    def parts(self) -> tuple[Part, ...]:
        """The channels by falling rank; neighbours of equal bits are one part."""
        words, first, parts = self.bits.split("-"), 0, []
        for bits, equal in groupby(words):
            channels = len(list(equal)) * self.head_dim // len(words)
            parts.append(Part(first, channels, int(bits)))
            first += channels
        return tuple(parts)

    def fields(self) -> tuple[Field, ...]:
        dim, codes = self.head_dim, sum(code_bytes(part.channels, part.bits) for part in self.parts)
        constants = (
            Field("center", torch.bfloat16, dim, "head"),
            Field("factor", torch.bfloat16, dim, "head"),
            Field("order", torch.int16, dim, "head"),
            Field("gain", torch.bfloat16, len(self.parts), "head"),
        )
        return (
            Field("amplitude", self.dtype, 1),
            Field("codes", torch.uint8, codes),
            *(constants if self.scaled else ()),
        )

    def grid(self, bits: int) -> tuple[int, ...]:
        """The levels of a part."""
        return even_grid(bits) if self._is_even else normal_grid(bits)

    @property
    def _is_even(self) -> bool:
        return len(self.parts) == 1 and self.parts[0].bits >= EVEN_BITS

    def constants(self, rows: Tensor, norms: Tensor | None) -> dict[str, Tensor]:
        if not self.scaled:
            return {}
        assert norms is not None
        center = rows.float().mean(2).bfloat16()
        centered = rows.float() - center.float().unsqueeze(2)
        spread = centered.square().mean(2).sqrt()
        factor = (_floored(norms) / _floored(spread)).sqrt().bfloat16()
        order = (spread * factor.float()).sort(dim=-1, descending=True, stable=True).indices
        scaled = centered * factor.float().unsqueeze(2)
        ranked = scaled.gather(3, order.unsqueeze(2).expand_as(scaled))
        sizes = [self._turned(ranked, part).square().mean((2, 3)).sqrt() for part in self.parts]
        units = [1.0 if self._is_even else DEVIATION[part.bits] for part in self.parts]
        gain = _floored(torch.stack(sizes, dim=-1)) / ranked.new_tensor(units)
        return {
            "center": center,
            "factor": factor,
            "order": order.short(),
            "gain": gain.bfloat16(),
        }

    def encode(self, rows: Tensor, norms: Tensor | None, constants: Stored) -> dict[str, Tensor]:
        spread = self._ranked(rows.float(), constants)
        gains = self._gains(constants, rows)
        # In units of the part's gain: what is next to amplitude * level.
        parts = [
            self._turned(spread, part) / gain for part, gain in zip(self.parts, gains, strict=True)
        ]
        amplitude = self._amplitude(parts, gains)
        codes = self._codes(parts, amplitude)
        packed = [pack_codes(code, part.bits) for code, part in zip(codes, self.parts, strict=True)]
        return {"amplitude": amplitude.to(self.dtype), "codes": torch.cat(packed, dim=-1)}

    def _amplitude(self, parts: list[Tensor], gains: list[Tensor]) -> Tensor:
        """Of each token, [..., 1], as it is stored, in float32."""
        if self._is_even:
            largest = self.grid(self.parts[0].bits)[-1]
            return self._stored(parts[0].abs().amax(-1, keepdim=True) / largest)
        energy = [(gain * part).square().sum(-1, keepdim=True)
                  for part, gain in zip(parts, gains, strict=True)]  # fmt: skip
        expected = [(gain * DEVIATION[part.bits]).square() * part.channels
                    for part, gain in zip(self.parts, gains, strict=True)]  # fmt: skip
        amplitude = self._stored((sum(energy) / sum(expected)).sqrt())  # type: ignore[union-attr]
        for _ in range(REFITS):
            # The least squares for the levels that it has led to.
            with_level, with_itself = torch.zeros_like(amplitude), torch.zeros_like(amplitude)
            for numbers, code, part, gain in zip(
                parts, self._codes(parts, amplitude), self.parts, gains, strict=True
            ):
                level = levels_of(code, self.grid(part.bits)) * gain
                with_level += (numbers * gain * level).sum(-1, keepdim=True)
                with_itself += level.square().sum(-1, keepdim=True)
            amplitude = self._stored(with_level / with_itself)
        return amplitude

    def _stored(self, amplitude: Tensor) -> Tensor:
        return amplitude.clamp(max=torch.finfo(self.dtype).max).to(self.dtype).float()

    def _codes(self, parts: list[Tensor], amplitude: Tensor) -> list[Tensor]:
        scale = amplitude.where(amplitude > 0, 1.0)
        return [
            nearest(numbers / scale, self.grid(part.bits))
            for numbers, part in zip(parts, self.parts, strict=True)
        ]

    def decode(self, stored: Stored, constants: Stored, first: int = 0) -> Tensor:
        amplitude, codes = stored["amplitude"].float(), stored["codes"]
        ranked, at = [], 0
        for part, gain in zip(self.parts, self._gains(constants, codes), strict=True):
            size = code_bytes(part.channels, part.bits)
            own = unpack_codes(codes[..., at : at + size], part.channels, part.bits)
            level = levels_of(own, self.grid(part.bits)) * (amplitude * gain)
            ranked.append(rotated(level) if self.rotated else level)
            at += size
        return self._restored(torch.cat(ranked, dim=-1), constants)

    def _turned(self, ranked: Tensor, part: Part) -> Tensor:
        """The channels [..., n] of a part, rotated if that is wanted."""
        own = ranked[..., part.first : part.first + part.channels]
        return rotated(own) if self.rotated else own

    def _gains(self, constants: Stored, rows: Tensor) -> list[Tensor]:
        """What a level is worth, for each part, to be multiplied with [B, Hkv, N, P, n]."""
        if not self.scaled:
            return [torch.ones((), device=rows.device)]
        return list(constants["gain"].float()[:, :, None, None].split(1, dim=-1))

    def _ranked(self, rows: Tensor, constants: Stored) -> Tensor:
        """Channels centered, scaled, and by falling rank."""
        if not self.scaled:
            return rows
        center, factor, order = _constants(constants)
        return ((rows - center) * factor).gather(-1, order.expand(rows.shape))

    def _restored(self, ranked: Tensor, constants: Stored) -> Tensor:
        """Undo :meth:`_ranked`."""
        if not self.scaled:
            return ranked
        center, factor, order = _constants(constants)
        index = order.expand(ranked.shape)
        return torch.zeros_like(ranked).scatter(-1, index, ranked) / factor + center


def _constants(constants: Stored) -> tuple[Tensor, Tensor, Tensor]:
    """Center, factor and order with the dimensions of rows [B, Hkv, N, P, D]."""
    center, factor, order = (
        constants[name][:, :, None, None] for name in ("center", "factor", "order")
    )
    return center.float(), factor.float(), order.long()


def _floored(numbers: Tensor) -> Tensor:
    """At least FLOOR of the mean over the last dimension, and positive."""
    floor = (numbers.mean(-1, keepdim=True) * FLOOR).clamp(min=1e-12)
    return torch.maximum(numbers, floor)
