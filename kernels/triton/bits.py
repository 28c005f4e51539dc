"""What the kernels do with bit planes; see ``kernels/layout`` for how they lie in memory."""

# mypy: disable-error-code="import-untyped, untyped-decorator"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def popcount(words: tl.tensor) -> Any:
    """Set bits of uint32 words; LLVM makes one instruction of this (popc, v_bcnt)."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return (words * 0x01010101) >> 24


@triton.jit
def _word(plane: tl.tensor, offsets: tl.tensor, index: tl.constexpr, BITS: tl.constexpr) -> Any:
    """One word of BITS bits of each plane, uint32 [N]; 0 behind the plane's last byte."""
    word = tl.load(plane + (offsets + index)).to(tl.uint32)
    return word if BITS == 32 else word & ((1 << BITS) - 1)


@triton.jit
def flags(
    plane: tl.tensor, offsets: tl.tensor, WORDS: tl.constexpr, BITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> Any:  # fmt: skip
    """Which channels are set in the bit planes at ``offsets`` [N]: bool [N, BLOCK_D]."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    words = tl.zeros((offsets.shape[0], BLOCK_D), tl.uint32)
    for index in tl.static_range(WORDS):
        word = _word(plane, offsets, index, BITS)
        words = tl.where(channel // BITS == index, word[:, None], words)
    return ((words >> (channel % BITS).to(tl.uint32)) & 1) != 0


@triton.jit
def ranks(
    plane: tl.tensor, offsets: tl.tensor, WORDS: tl.constexpr, BITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> Any:  # fmt: skip
    """As ``flags``, and how many set channels are below each: int32 [N, BLOCK_D].

    The rank is a popcount of the bits below in the channel's word and of the words before it. A
    cumulative sum along the channels takes twice the registers; words as a matrix [N, WORDS] that
    is broadcast and reshaped make Triton move the addresses of the kept channels through shared
    memory.
    """
    channel = tl.arange(0, BLOCK_D)[None, :]
    words = tl.zeros((offsets.shape[0], BLOCK_D), tl.uint32)
    before = tl.zeros((offsets.shape[0], BLOCK_D), tl.int32)
    count = tl.zeros((offsets.shape[0],), tl.int32)
    for index in tl.static_range(WORDS):
        word = _word(plane, offsets, index, BITS)
        here = channel // BITS == index
        words = tl.where(here, word[:, None], words)
        before = tl.where(here, count[:, None], before)
        count += popcount(word).to(tl.int32)
    bit = (channel % BITS).to(tl.uint32)
    below = (tl.full((1, BLOCK_D), 1, tl.uint32) << bit) - 1
    rank = before + popcount(words & below).to(tl.int32)
    return ((words >> bit) & 1) != 0, rank


@triton.jit
def store_plane(
    plane: tl.tensor,
    rows: tl.tensor,
    row_stride: tl.tensor,
    valid: tl.tensor,
    set_: tl.tensor,
    plane_bytes: tl.tensor,
) -> None:
    """Write bool [N, BLOCK_D] as a bit plane."""
    count: tl.constexpr = set_.shape[0]
    block_bytes: tl.constexpr = set_.shape[1] // 8
    octets = tl.reshape(set_.to(tl.int32), (count, block_bytes, 8))
    packed = tl.sum(octets << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)
    byte = tl.arange(0, block_bytes)
    inside = valid[:, None] & (byte < plane_bytes)[None, :]
    tl.store(plane + rows[:, None] * row_stride + byte[None, :], packed, mask=inside)
