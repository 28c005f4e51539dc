"""The parts of ``quantized`` and ``int8``: what kernels read of them, and queries that meet codes.

PARTS is a number with PART_BITS bits for each part: from the lowest on, its channels, the bits of
a code, the rank of its first channel, where its codes begin in a token's row, and the logarithm of
the channels that a tile has for it, a power of two (:func:`packed_parts`). ``int8`` is one part of
8 bits. Where a format is QUANTIZED, amplitudes are codes in units of the gain, and channels are
ranked, scaled and rotated; ``int8`` has a step.
"""

# mypy: disable-error-code="import-untyped, untyped-decorator"

from __future__ import annotations

from collections.abc import Iterable

import triton
import triton.language as tl

from .codes import amplitudes, levels_of, rotated, tile_channels, tiles
from .fields import as_type

PART_BITS = 44
"""A literal in the kernels: shifts by a global constant are not known to Triton's interpreter."""


def packed_parts(parts: Iterable[tuple[int, int, int, int, int]]) -> int:
    """PARTS of (channels, bits, first, codes, channels of a tile) of each part."""
    packed = 0
    for place, (channels, bits, first, codes, block) in enumerate(parts):
        log = block.bit_length() - 1
        part = channels | bits << 12 | first << 16 | codes << 28 | log << 40
        packed |= part << PART_BITS * place
    return packed


@triton.jit
def part_numbers(
    page: tl.tensor, row: tl.tensor, part: tl.constexpr, PARTS: tl.constexpr, CODES: tl.constexpr,
    CODE_BYTES: tl.constexpr, WORDS: tl.constexpr, PTX: tl.constexpr, DTYPE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """``codes.tiles`` of a part of rows [N] of pages [N]."""
    THIS: tl.constexpr = PARTS >> 44 * part
    FIRST: tl.constexpr = CODES + ((THIS >> 28) & 0xFFF)
    return tiles(
        page + FIRST + row * CODE_BYTES, THIS & 0xFFF, (THIS >> 12) & 15, WORDS, PTX, DTYPE,
        1 << ((THIS >> 40) & 15),
    )  # fmt: skip


@triton.jit
def part_amplitudes(
    page: tl.tensor, row: tl.tensor, part: tl.constexpr, PART_COUNT: tl.constexpr,
    QUANTIZED: tl.constexpr, AMOUNT: tl.constexpr, STEP: tl.constexpr, DTYPE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """What the levels of a part are worth, in units of the gain: float32 [N]."""
    if QUANTIZED:
        worth = amplitudes(tl.load(page + AMOUNT + row * PART_COUNT + part))
    else:
        worth = tl.load(as_type(page + STEP, DTYPE) + row).to(tl.float32)
    return worth


@triton.jit
def part_rows(
    page: tl.tensor, row: tl.tensor, head: tl.tensor, part: tl.constexpr, PARTS: tl.constexpr,
    PART_COUNT: tl.constexpr, CODES: tl.constexpr, CODE_BYTES: tl.constexpr, AMOUNT: tl.constexpr,
    ROTATED: tl.constexpr, GAIN: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """A part of ``quantized`` rows [N] of pages [N], by rank, not restored: float32."""
    numbers = part_numbers(page, row, part, PARTS, CODES, CODE_BYTES, False, False, tl.float32)
    ones = tl.full((row.shape[0],), 1.0, tl.float32)
    numbers = part_levels(numbers, ones, part, PARTS, False, tl.float32)
    worth = part_amplitudes(page, row, part, PART_COUNT, True, AMOUNT, 0, tl.float32)
    numbers *= (worth * part_gain(head, part, GAIN))[:, None]
    return rotated(numbers, (PARTS >> 44 * part) & 0xFFF) if ROTATED else numbers


@triton.jit
def part_levels(
    sums: tl.tensor, total: tl.tensor, part: tl.constexpr, PARTS: tl.constexpr,
    PTX: tl.constexpr, DTYPE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """``codes.levels_of`` a part."""
    return levels_of(sums, total, (PARTS >> (44 * part + 12)) & 15, PTX, DTYPE)


@triton.jit
def part_query(
    rows: tl.tensor, real: tl.tensor, part: tl.constexpr, PARTS: tl.constexpr, WORDS: tl.constexpr
) -> tl.tensor:
    """The channels of a part of the queries that pointers [M] begin, in the order of its numbers;
    zeros after them."""
    THIS: tl.constexpr = PARTS >> 44 * part
    CHANNELS: tl.constexpr = THIS & 0xFFF
    channel = tile_channels(CHANNELS, (THIS >> 12) & 15, WORDS, 1 << ((THIS >> 40) & 15))
    inside = real[:, None] & (channel < CHANNELS)[None, :]
    place = rows[:, None] + ((THIS >> 16) & 0xFFF) + channel[None, :]
    return tl.load(place, mask=inside, other=0)


@triton.jit
def ranked_channels(
    head: tl.tensor, part: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr,
    SCALED: tl.constexpr, CENTER: tl.constexpr, FACTOR: tl.constexpr, ORDER: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """The channels of a part by rank, which of them there are, and their centers and factors."""
    THIS: tl.constexpr = PARTS >> 44 * part
    BLOCK: tl.constexpr = 1 << ((THIS >> 40) & 15)
    place = tl.arange(0, BLOCK)
    inside = place < (THIS & 0xFFF)
    channel = place + ((THIS >> 16) & 0xFFF)
    center, factor = tl.zeros((BLOCK,), tl.float32), tl.full((BLOCK,), 1.0, tl.float32)
    if SCALED:
        channel = tl.load(as_type(head + ORDER, tl.int16) + channel, mask=inside, other=0)
        # A damaged cache may say anything.
        channel = tl.minimum(tl.maximum(channel.to(tl.int32), 0), DIM - 1)
        center = tl.load(as_type(head + CENTER, tl.bfloat16) + channel).to(tl.float32)
        factor = tl.load(as_type(head + FACTOR, tl.bfloat16) + channel).to(tl.float32)
    return channel, inside, center, factor


@triton.jit
def part_gain(head: tl.tensor, part: tl.constexpr, GAIN: tl.constexpr) -> tl.tensor:
    """The gain of a part."""
    return tl.load(as_type(head + GAIN, tl.bfloat16) + part).to(tl.float32)


@triton.jit(do_not_specialize=["queries"])
def turn_queries(
    query: tl.tensor, turned: tl.tensor, bias: tl.tensor, heads: tl.tensor, group: tl.tensor,
    queries: tl.tensor, query_b: tl.tensor, query_h: tl.tensor, query_s: tl.tensor,
    head: tl.tensor, head_b: tl.tensor, head_h: tl.tensor, DIM: tl.constexpr, PARTS: tl.constexpr,
    PART_COUNT: tl.constexpr, SCALED: tl.constexpr, ROTATED: tl.constexpr, GAIN: tl.constexpr,
    CENTER: tl.constexpr, FACTOR: tl.constexpr, ORDER: tl.constexpr, BLOCK_M: tl.constexpr,
) -> None:  # fmt: skip
    """Queries in the space of the keys' codes, [B * Hkv, G * L, D], and q.m: [B * Hkv, G * L].

    A score of a packed key is then bias + sum over parts of amplitude * (turned . levels).
    """
    row_blocks = tl.cdiv(group * queries, BLOCK_M)
    at = tl.program_id(0) // row_blocks
    b, h = (at // heads).to(tl.int64), (at % heads).to(tl.int64)
    m = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    real = m < group * queries
    rows = query + b * query_b + (h * group + m // queries) * query_h + m % queries * query_s
    head += b * head_b + h * head_h
    place = at.to(tl.int64) * group * queries + m
    biases = tl.zeros((BLOCK_M,), tl.float32)
    for part in tl.static_range(PART_COUNT):
        channel, inside, center, factor = ranked_channels(
            head, part, PARTS, DIM, SCALED, CENTER, FACTOR, ORDER
        )
        there = real[:, None] & inside[None, :]
        row = tl.load(rows[:, None] + channel[None, :], mask=there, other=0).to(tl.float32)
        biases += tl.sum(row * center[None, :], axis=1)
        row = tl.div_rn(row, tl.broadcast_to(factor[None, :], row.shape))
        if ROTATED:
            row = rotated(row, (PARTS >> 44 * part) & 0xFFF)
        row = (row * part_gain(head, part, GAIN)).to(turned.dtype.element_ty)
        target = place[:, None] * DIM + ((PARTS >> (44 * part + 16)) & 0xFFF)
        target += tl.arange(0, row.shape[1])[None, :]
        tl.store(turned + target, row, mask=there)
    tl.store(bias + place, biases, mask=real)
