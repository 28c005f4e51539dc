"""Tokens quantized to few bits, more of them for the channels that decide scores.

Without query scaling that is the rotated quantizer of QuaRot (arXiv 2404.00456) and TurboQuant
(arXiv 2504.19874): a Hadamard rotation makes the channels alike and nearly normal, so that the best
levels are known beforehand, and a token has one amplitude.

With query scaling, for keys, SparK's saliency decides (arXiv 2508.15212). An error e_j of channel j
costs n_j e_j in a score, n_j being the query norm of the channel, and the error is as large as the
channel's spread c_j. So, per key head and fixed when the first page is packed:

    x_j = (k_j - m_j) * sqrt(n_j / c_j)      m_j the mean of the keys, c_j their spread around it

whose spread is sqrt(n_j c_j): channels are ranked by that, and those of high rank get more bits.
Channels of equal bits are a part: rotated together, with one amplitude per token. A query takes the
inverse factors and the rotations once, and q.m once: nothing is paid per token.
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
    int8_grid,
    levels_of,
    nearest,
    normal_grid,
    pack_codes,
    unpack_codes,
)  # fmt: skip
from .rotation import rotated
from .spark import floored

FLOOR = 0.01
"""Of the mean: least norm and spread of a channel, and size of a part; no factor is extreme."""
EVEN_BITS = 5
"""From so many bits on a uniform grid up to the largest channel errs less than a normal one."""
WHOLE_BITS = 8
"""Levels of so many bits are int8, and stored as they are."""
REFITS = 2
OCTAVE = 16
"""Steps of an amplitude's code per factor of two."""
UNIT_CODE = 81
"""The code of an amplitude that is the gain; the codes reach from 1/32 to 1,800 times that."""
NOT_FINITE = 255
"""The code of a token with channels that are infinite or NaN: it is worth NaN."""


class Part(NamedTuple):
    """Channels of consecutive ranks with equal bits."""

    first: int
    channels: int
    bits: int


@dataclass(frozen=True)
class Quantized(Format):
    """Every channel as one of 2^bits levels in units of the token's amplitude.

    Fields of a token: ``amplitude`` (a code per part, in steps of 2^(1/16) around the gain; 0 is
    zero) and ``codes``, part after part. Of a head: ``gain`` (what a level of a part is worth for a
    token of mean size); with query scaling ``center`` (m), ``factor`` (sqrt(n / c)) and ``order``
    (the channels by falling rank).
    """

    bits: str = "4"
    """Bits per channel, 1 to 6 and 8, or of equal shares of the channels by falling rank, as in
    4-2-2-1."""
    scaled: bool = False
    """Query scaling; for keys."""
    rotated: bool = True
    """Whether channels of equal bits are rotated."""

    NAME = "quantized"
    EACH_QUERY = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", str(self.bits))  # a text may give it as a number
        words = self.bits.split("-")
        if any(word not in {"1", "2", "3", "4", "5", "6", "8"} for word in words):
            allowed = "1 to 6 and 8, or several of them as in 4-2-2-1"
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
        of_queries = (
            Field("center", torch.bfloat16, dim, "head"),
            Field("factor", torch.bfloat16, dim, "head"),
            Field("order", torch.int16, dim, "head"),
        )
        return (
            Field("amplitude", torch.uint8, len(self.parts)),
            Field("codes", torch.uint8, codes),
            Field("gain", torch.bfloat16, len(self.parts), "head"),
            *(of_queries if self.scaled else ()),
        )

    def grid(self, part: Part) -> tuple[int, ...]:
        """The levels of a part."""
        if part.bits == WHOLE_BITS:
            return int8_grid()
        return even_grid(part.bits) if self._is_even(part) else normal_grid(part.bits)

    def _is_even(self, part: Part) -> bool:
        return part.bits >= EVEN_BITS

    def constants(self, rows: Tensor, norms: Tensor | None) -> dict[str, Tensor]:
        # Channels that are not finite spoil their own token and no other.
        rows, constants = rows.float().nan_to_num(0.0, 0.0, 0.0), {}
        ranked = rows.unsqueeze(2)
        if self.scaled:
            assert norms is not None
            center = rows.mean(2).bfloat16()
            spread = (rows - center.float().unsqueeze(2)).square().mean(2).sqrt()
            norms = floored(norms.nan_to_num(0.0, 0.0, 0.0), FLOOR)
            factor = (norms / floored(spread, FLOOR)).sqrt().bfloat16()
            order = (spread * factor.float()).sort(dim=-1, descending=True, stable=True).indices
            constants = {"center": center, "factor": factor, "order": order.short()}
            ranked = self._ranked(ranked, constants)
        sizes = [self._turned(ranked, part).square().mean((2, 3, 4)) for part in self.parts]
        units = ranked.new_tensor([DEVIATION[part.bits] for part in self.parts])
        gain = floored(torch.stack(sizes, dim=-1).sqrt(), FLOOR) / units
        return constants | {"gain": gain.bfloat16()}

    def encode(self, rows: Tensor, norms: Tensor | None, constants: Stored) -> dict[str, Tensor]:
        ranked, amplitudes, packed = self._ranked(rows.float(), constants), [], []
        for part, gain in zip(self.parts, _gains(constants), strict=True):
            numbers = self._turned(ranked, part) / gain
            amplitude = self._amplitude(numbers, part)
            codes = nearest(numbers / _positive(amplitude_of(amplitude)), self.grid(part))
            amplitudes.append(amplitude)
            packed.append(pack_codes(as_stored(codes, part), part.bits))
        return {"amplitude": torch.cat(amplitudes, dim=-1), "codes": torch.cat(packed, dim=-1)}

    def _amplitude(self, numbers: Tensor, part: Part) -> Tensor:
        """The code [..., 1] of the amplitude of each token's channels [..., n]."""
        grid = self.grid(part)
        if self._is_even(part):
            largest = numbers.abs().amax(-1, keepdim=True) / grid[-1]
            return _code_of(largest, up=True)
        amplitude = numbers.square().mean(-1, keepdim=True).sqrt() / DEVIATION[part.bits]
        for _ in range(REFITS):
            # The least squares for the levels that it has led to.
            level = levels_of(nearest(numbers / _positive(amplitude), grid), grid)
            amplitude = (numbers * level).sum(-1, keepdim=True) / level.square().sum(-1, True)
        return _code_of(amplitude)

    def decode(self, stored: Stored, constants: Stored, first: int = 0) -> Tensor:
        amplitudes = amplitude_of(stored["amplitude"]).split(1, dim=-1)
        sizes = [code_bytes(part.channels, part.bits) for part in self.parts]
        ranked = []
        for part, packed, amplitude, gain in zip(
            self.parts, stored["codes"].split(sizes, -1), amplitudes, _gains(constants), strict=True
        ):
            codes = as_stored(unpack_codes(packed, part.channels, part.bits), part)
            level = levels_of(codes, self.grid(part)) * (amplitude * gain)
            ranked.append(rotated(level) if self.rotated else level)
        return self._restored(torch.cat(ranked, dim=-1), constants)

    def _turned(self, ranked: Tensor, part: Part) -> Tensor:
        """The channels [..., n] of a part, rotated if that is wanted."""
        own = ranked[..., part.first : part.first + part.channels]
        return rotated(own) if self.rotated else own

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


def as_stored(codes: Tensor, part: Part) -> Tensor:
    """Codes, uint8, of int8 levels as the levels themselves, and back; others as they are."""
    return codes ^ 128 if part.bits == WHOLE_BITS else codes


def amplitude_of(codes: Tensor) -> Tensor:
    """The amplitudes, in units of the gain, float32, that codes uint8 stand for."""
    finite = torch.exp2((codes.float() - UNIT_CODE) / OCTAVE) * (codes > 0)
    return finite.where(codes != NOT_FINITE, torch.nan)


def _code_of(amplitude: Tensor, *, up: bool = False) -> Tensor:
    """The code next to an amplitude, or the next higher one."""
    steps = amplitude.log2() * OCTAVE + UNIT_CODE
    code = (steps.ceil() if up else steps.round()).clamp(1, NOT_FINITE - 1)
    code = code.where(amplitude != 0, 0.0).where(amplitude.isfinite(), NOT_FINITE)
    return code.to(torch.uint8)


def _positive(amplitude: Tensor) -> Tensor:
    return amplitude.where(amplitude > 0, 1.0)


def _gains(constants: Stored) -> list[Tensor]:
    """Of each part, with the dimensions of rows [B, Hkv, N, P, n]."""
    return list(constants["gain"].float()[:, :, None, None].split(1, dim=-1))


def _constants(constants: Stored) -> tuple[Tensor, Tensor, Tensor]:
    """Center, factor and order with the dimensions of rows [B, Hkv, N, P, D]."""
    center, factor, order = (
        constants[name][:, :, None, None] for name in ("center", "factor", "order")
    )
    # A damaged cache may say anything.
    return center.float(), factor.float(), order.long().clamp(0, order.shape[-1] - 1)
