"""Comparing what two kernels store in the format quantized, whose codes are roundings of sums."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spark_compile.kernels.formats import Quantized
from spark_compile.kernels.formats.codes import code_bytes, unpack_codes

Fields = Mapping[str, Tensor]
ULPS = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
"""Two of an amplitude, which is a rounded sum; a few more in float32."""


def assert_same_tokens(format: Quantized, mine: Fields, theirs: Fields, same: Tensor) -> None:
    """Raise unless fields per token agree, where ``same`` [B, Hkv] says that the constants do.

    Amplitudes agree but for rounding; in one token of 100 a channel may be next to another level.
    """
    numbers = [fields["amplitude"][same] for fields in (mine, theirs)]
    torch.testing.assert_close(*numbers, rtol=ULPS[format.dtype], atol=1e-7)
    codes = [unpacked(format, fields["codes"][same]) for fields in (mine, theirs)]
    apart = (codes[0].int() - codes[1].int()).abs()
    assert apart.numel() == 0 or apart.max() <= 1, "levels that are not next to each other"
    differ = apart.any(-1)
    assert differ.sum() <= max(2, differ.numel() // 100), f"{differ.sum()} of {differ.numel()}"


def unpacked(format: Quantized, codes: Tensor) -> Tensor:
    """The code of every channel by rank; raises where bits of no channel are set."""
    parts, first = [], 0
    for part in format.parts:
        size = code_bytes(part.channels, part.bits)
        parts.append(unpack_codes(codes[..., first : first + size], part.channels, part.bits))
        first += size
    return torch.cat(parts, dim=-1)


def same_constants(mine: Fields, theirs: Fields) -> Tensor:
    """Which heads [B, Hkv] have equal constants; raises where they differ by more than rounding.

    A mean may round to the next bfloat16, and channels of almost equal rank may change places:
    then all codes of the head may be others.
    """
    for name in ("center", "factor", "gain"):
        torch.testing.assert_close(mine[name], theirs[name], equal_nan=True)
    order, other = mine["order"].long(), theirs["order"].long()
    moved = (order.argsort(-1) - other.argsort(-1)).abs()
    assert moved.max() <= 1, "channels of other ranks"
    assert moved.sum() <= moved.shape[-1] // 8 + 2
    return torch.stack([(mine[name] == theirs[name]).all(-1) for name in mine]).all(0)
