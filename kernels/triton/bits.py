"""What the kernels do with bit planes: bit j % 8 of byte j // 8 belongs to channel j."""

# mypy: disable-error-code="import-untyped, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def popcount(words: tl.tensor) -> tl.tensor:
    """Set bits of uint32 words; LLVM makes one instruction of this (popc, v_bcnt)."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return (words * 0x01010101) >> 24


@triton.jit
def _word(
    plane: tl.tensor, index: tl.constexpr, UNITS: tl.constexpr, UNIT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Word ``index`` of 32 channels of the planes that begin at pointers [N]: uint32 [N].

    A plane is UNITS loads of UNIT bits, as many as its place in memory is a multiple of; channels
    after its last byte are 0.
    """
    first: tl.constexpr = index * 32 // UNIT
    word = tl.load(plane + first).to(tl.uint32)
    for unit in tl.static_range(1, 32 // UNIT):
        if first + unit < UNITS:
            word = word | (tl.load(plane + (first + unit)).to(tl.uint32) << (unit * UNIT))
    return word


@triton.jit
def flags(
    plane: tl.tensor, UNITS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Which channels are set in the planes that begin at pointers [N]: bool [N, BLOCK]."""
    channel = tl.arange(0, BLOCK)[None, :]
    words = tl.zeros((plane.shape[0], BLOCK), tl.uint32)
    for index in tl.static_range((UNITS * UNIT + 31) // 32):
        word = _word(plane, index, UNITS, UNIT)
        words = tl.where(channel // 32 == index, word[:, None], words)
    return ((words >> (channel % 32).to(tl.uint32)) & 1) != 0


@triton.jit
def ranks(
    plane: tl.tensor, UNITS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """As ``flags``, and how many set channels are below each: int32 [N, BLOCK].

    The rank is a popcount of the bits below in the channel's word and of the words before it. A
    cumulative sum along the channels takes twice the registers; words as a matrix [N, words] that
    is broadcast and reshaped make Triton move the addresses of the kept channels through shared
    memory.
    """
    channel = tl.arange(0, BLOCK)[None, :]
    words = tl.zeros((plane.shape[0], BLOCK), tl.uint32)
    before = tl.zeros((plane.shape[0], BLOCK), tl.int32)
    count = tl.zeros((plane.shape[0],), tl.int32)
    for index in tl.static_range((UNITS * UNIT + 31) // 32):
        word = _word(plane, index, UNITS, UNIT)
        here = channel // 32 == index
        words = tl.where(here, word[:, None], words)
        before = tl.where(here, count[:, None], before)
        count += popcount(word).to(tl.int32)
    bit = (channel % 32).to(tl.uint32)
    below = (tl.full((1, BLOCK), 1, tl.uint32) << bit) - 1
    rank = before + popcount(words & below).to(tl.int32)
    return ((words >> bit) & 1) != 0, rank


@triton.jit
def store_plane(plane: tl.tensor, valid: tl.tensor, set_: tl.tensor, BYTES: tl.constexpr) -> None:
    """Write bool [N, BLOCK] as the bit planes of BYTES bytes that begin at pointers [N]."""
    count: tl.constexpr = set_.shape[0]
    block_bytes: tl.constexpr = set_.shape[1] // 8
    octets = tl.reshape(set_.to(tl.int32), (count, block_bytes, 8))
    packed = tl.sum(octets << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)
    byte = tl.arange(0, block_bytes)
    inside = valid[:, None] & (byte < BYTES)[None, :]
    tl.store(plane[:, None] + byte[None, :], packed, mask=inside)
