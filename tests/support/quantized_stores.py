"""Comparing what two kernels store in the format quantized, where sums are rounded to codes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spark_compile.kernels.formats import Quantized
from spark_compile.kernels.formats.codes import code_bytes, unpack_codes
from spark_compile.kernels.formats.quantized import WHOLE_BITS, as_stored

Fields = Mapping[str, Tensor]


def assert_same_tokens(format: Quantized, mine: Fields, theirs: Fields, same: Tensor) -> None:
    """Raise unless fields per token agree, where ``same`` [B, Hkv] says that the constants do.

    Where rounding decides, an amplitude or a level may be the next one: in one token of 200, or
    of 50 where there are levels of 8 bits, which lie closer.
    """
    amplitudes = _apart(*(fields["amplitude"][same] for fields in (mine, theirs)))
    levels = _apart(*(unpacked(format, fields["codes"][same]) for fields in (mine, theirs)))
    assert (amplitudes <= 1).all(), "amplitudes that are no neighbours"
    assert (levels <= 1 + amplitudes).all(), "levels that are no neighbours"
    differ = (levels > 0) | (amplitudes > 0)
    fine = any(part.bits == WHOLE_BITS for part in format.parts)
    most = max(1, differ.numel() // (50 if fine else 200))
    assert differ.sum() <= most, f"{differ.sum()} of {differ.numel()}"


def _apart(mine: Tensor, theirs: Tensor) -> Tensor:
    """The largest difference of codes [..., n] in each token."""
    return (mine.int() - theirs.int()).abs().amax(-1)


def unpacked(format: Quantized, codes: Tensor) -> Tensor:
    """The code of every channel by rank."""
    parts, first = [], 0
    for part in format.parts:
        size = code_bytes(part.channels, part.bits)
        own = unpack_codes(codes[..., first : first + size], part.channels, part.bits)
        parts.append(as_stored(own, part))
        first += size
    return torch.cat(parts, dim=-1)


def same_constants(mine: Fields, theirs: Fields) -> Tensor:
    """Which heads [B, Hkv] have equal constants; raises where they differ by more than rounding.

    A mean may round to the next bfloat16, and channels of almost equal rank may change places:
    then all codes of the head may be others.
    """
    for name in mine.keys() - {"order"}:
        torch.testing.assert_close(mine[name], theirs[name])
    if "order" in mine:
        ranks = [constants["order"].argsort(-1) for constants in (mine, theirs)]
        moved = (ranks[0] - ranks[1]).abs()
        assert moved.max() <= 1, "channels of other ranks"
        assert moved.sum() <= moved.numel() // 50 + 2
    return torch.stack([(mine[name] == theirs[name]).all(-1) for name in mine]).all(0)
