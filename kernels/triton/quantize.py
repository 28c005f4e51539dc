"""Encoding in the format ``quantized``, and its constants (``kernels/formats/quantized``)."""

# mypy: disable-error-code="import-untyped, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ..formats.quantized import FLOOR, NOT_FINITE, OCTAVE, REFITS, UNIT_CODE
from .codes import amplitudes, deviation, looked_up, nearest, rotated
from .fields import as_type, dense_rows, floored, rounded
from .parts import part_gain, ranked_channels

_REFITS, _FLOOR = tl.constexpr(REFITS), tl.constexpr(FLOOR)
_OCTAVE, _UNIT_CODE = tl.constexpr(OCTAVE), tl.constexpr(UNIT_CODE)
_NOT_FINITE = tl.constexpr(NOT_FINITE)


@triton.jit
def _positive(amplitude: tl.tensor) -> tl.tensor:
    return tl.where(amplitude > 0, amplitude, 1.0)


@triton.jit
def _finite(numbers: tl.tensor) -> tl.tensor:
    return tl.abs(numbers) < float("inf")


@triton.jit
def _divided(numbers: tl.tensor, by: tl.tensor) -> tl.tensor:
    """Rows [N, BLOCK] over a number of each row [N], as torch divides."""
    return tl.div_rn(numbers, tl.broadcast_to(by[:, None], numbers.shape))


@triton.jit
def _amplitude_codes(
    numbers: tl.tensor, inside: tl.tensor, CHANNELS: tl.constexpr, BITS: tl.constexpr
) -> tl.tensor:
    """The codes of the amplitudes of rows [N, BLOCK]: int32 [N]."""
    steps = 0.0
    if BITS >= 5:
        LARGEST: tl.constexpr = 127.0 if BITS == 8 else 2.0**BITS - 1
        amplitude = tl.div_rn(tl.max(tl.abs(numbers), axis=1), LARGEST)
        steps = tl.ceil(tl.log2(amplitude) * _OCTAVE + _UNIT_CODE)
    else:
        mean = tl.div_rn(tl.sum(numbers * numbers, axis=1), CHANNELS * 1.0)
        amplitude = tl.div_rn(tl.sqrt_rn(mean), deviation(BITS))
        for _ in tl.static_range(_REFITS):
            # The least squares for the levels that it has led to.
            level = looked_up(nearest(_divided(numbers, _positive(amplitude)), BITS), BITS)
            level = tl.where(inside[None, :], level.to(tl.float32), 0.0)
            fit = tl.sum(numbers * level, axis=1)
            amplitude = tl.div_rn(fit, tl.sum(level * level, axis=1))
        steps = rounded(tl.log2(amplitude) * _OCTAVE + _UNIT_CODE)
    code = tl.minimum(tl.maximum(steps, 1.0), _NOT_FINITE - 1.0)
    # A maximum passes over NaN, a sum does not.
    spoiled = tl.sum(tl.where(_finite(numbers), 0, 1), axis=1) > 0
    code = tl.where(amplitude == 0, 0.0, code).to(tl.int32)
    return tl.where(spoiled | ~_finite(amplitude), _NOT_FINITE, code)


@triton.jit
def _store_plane(
    codes: tl.tensor, code: tl.tensor, valid: tl.tensor, FROM: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """Write bits FROM to FROM + WIDTH of codes [N, BLOCK] as the planes that pointers [N] begin."""
    COUNT: tl.constexpr = code.shape[0]
    BYTES: tl.constexpr = (CHANNELS * WIDTH + 7) // 8
    BLOCK: tl.constexpr = triton.next_power_of_2(BYTES)
    bits, byte = (code >> FROM) & (2**WIDTH - 1), tl.arange(0, BLOCK)
    packed = tl.zeros((COUNT, BLOCK), tl.int32)
    for over in tl.static_range(8 // WIDTH):
        channel = over * BYTES + byte
        there = (byte < BYTES) & (channel < CHANNELS)
        place = tl.broadcast_to(tl.where(there, channel, 0)[None, :], (COUNT, BLOCK))
        taken = tl.where(there[None, :], tl.gather(bits, place, 1), 0)
        packed |= taken << (WIDTH * over)
    inside = valid[:, None] & (byte < BYTES)[None, :]
    tl.store(codes[:, None] + byte[None, :], packed.to(tl.uint8), mask=inside)


@triton.jit
def encode_parts(
    source: tl.tensor, valid: tl.tensor, page: tl.tensor, row: tl.tensor, head: tl.tensor,
    DIM: tl.constexpr, PARTS: tl.constexpr, PART_COUNT: tl.constexpr, SCALED: tl.constexpr,
    ROTATED: tl.constexpr, AMOUNT: tl.constexpr, CODES: tl.constexpr, CODE_BYTES: tl.constexpr,
    GAIN: tl.constexpr, CENTER: tl.constexpr, FACTOR: tl.constexpr, ORDER: tl.constexpr,
) -> None:  # fmt: skip
    """Write the dense tokens at pointers [N] as rows [N] of pages [N]."""
    for part in tl.static_range(PART_COUNT):
        channel, inside, center, factor = ranked_channels(
            head, part, PARTS, DIM, SCALED, CENTER, FACTOR, ORDER
        )
        there = valid[:, None] & inside[None, :]
        numbers = tl.load(source[:, None] + channel[None, :], mask=there, other=0).to(tl.float32)
        numbers = tl.where(there, (numbers - center[None, :]) * factor[None, :], 0.0)
        if ROTATED:
            numbers = rotated(numbers, (PARTS >> 44 * part) & 0xFFF)
        gain = tl.full((row.shape[0],), 1.0, tl.float32) * part_gain(head, part, GAIN)
        numbers = _divided(tl.where(inside[None, :], numbers, 0.0), gain)
        amount = _amplitude_codes(
            numbers, inside, (PARTS >> 44 * part) & 0xFFF, (PARTS >> (44 * part + 12)) & 15
        )
        tl.store(page + AMOUNT + row * PART_COUNT + part, amount.to(tl.uint8), mask=valid)
        _store_codes(
            page + CODES + row * CODE_BYTES + ((PARTS >> (44 * part + 28)) & 0xFFF),
            _divided(numbers, _positive(amplitudes(amount))), valid,
            (PARTS >> 44 * part) & 0xFFF, (PARTS >> (44 * part + 12)) & 15,
        )  # fmt: skip


@triton.jit
def _store_codes(
    codes: tl.tensor, numbers: tl.tensor, valid: tl.tensor, CHANNELS: tl.constexpr,
    BITS: tl.constexpr,
) -> None:  # fmt: skip
    """Write the codes of numbers [N, BLOCK], in units of the amplitude, at pointers [N]."""
    LOW: tl.constexpr = 8 if BITS == 8 else (4 if BITS >= 4 else (2 if BITS >= 2 else 1))
    AFTER: tl.constexpr = (CHANNELS * LOW + 7) // 8
    code = nearest(numbers, BITS)
    _store_plane(codes, code, valid, 0, LOW, CHANNELS)
    if BITS > LOW:
        _store_plane(codes + AFTER, code, valid, LOW, BITS - LOW, CHANNELS)


@triton.jit
def quantized_constants(
    head: tl.tensor, tail: tl.tensor, new: tl.tensor, filled: tl.tensor, first: tl.tensor,
    end: tl.tensor, new_s: tl.tensor, stats: tl.tensor, DIM: tl.constexpr, PARTS: tl.constexpr,
    PART_COUNT: tl.constexpr, SCALED: tl.constexpr, GAIN: tl.constexpr, CENTER: tl.constexpr,
    FACTOR: tl.constexpr, ORDER: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Write ``Quantized.constants`` of one head, of its tokens from ``first`` to ``end``.

    The gains need no tokens: a rotation keeps the sum of the squares of a part's channels.
    """
    channel = tl.arange(0, BLOCK)
    inside = channel < DIM
    center = tl.zeros((BLOCK,), tl.float32)
    if SCALED:
        total = _sums(tail, new, filled, first, end, new_s, center, DIM, 1, BLOCK_S, BLOCK)
        center = (total / (end - first)).to(tl.bfloat16).to(tl.float32)
    total = _sums(tail, new, filled, first, end, new_s, center, DIM, 2, BLOCK_S, BLOCK)
    spread = tl.sqrt_rn(total / (end - first))
    if SCALED:
        norms = tl.where(_finite(stats), tl.sqrt_rn(stats), 0.0)
        factor = floored(norms, inside, DIM, _FLOOR) / floored(spread, inside, DIM, _FLOOR)
        factor = tl.sqrt_rn(factor).to(tl.bfloat16)
        spread *= factor.to(tl.float32)
        tl.store(as_type(head + CENTER, tl.bfloat16) + channel, center.to(tl.bfloat16), mask=inside)
        tl.store(as_type(head + FACTOR, tl.bfloat16) + channel, factor, mask=inside)
        # Floats that are not negative sort as their bits do; of equal ones the first comes first.
        order = (spread.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (BLOCK - 1 - channel)
        order = tl.sort(tl.where(inside, order, -1), descending=True)
        ranked = BLOCK - 1 - (order & 0xFFFFFFFF).to(tl.int32)
        tl.store(as_type(head + ORDER, tl.int16) + channel, ranked.to(tl.int16), mask=inside)
        spread = tl.where(inside, (order >> 32).to(tl.int32).to(tl.float32, bitcast=True), 0.0)
    mean = 0.0
    for part in tl.static_range(PART_COUNT):
        mean += _size(spread, inside, part, PARTS) / PART_COUNT
    for part in tl.static_range(PART_COUNT):
        size = tl.maximum(_size(spread, inside, part, PARTS), tl.maximum(mean * _FLOOR, 1e-12))
        gain = size / deviation((PARTS >> (44 * part + 12)) & 15)
        tl.store(as_type(head + GAIN, tl.bfloat16) + part, gain.to(tl.bfloat16))


@triton.jit
def _size(
    spread: tl.tensor, inside: tl.tensor, part: tl.constexpr, PARTS: tl.constexpr
) -> tl.tensor:
    """The root mean square of the channels of a part; ``spread`` [BLOCK] has that of each rank."""
    CHANNELS: tl.constexpr = (PARTS >> 44 * part) & 0xFFF
    FIRST: tl.constexpr = (PARTS >> (44 * part + 16)) & 0xFFF
    rank = tl.arange(0, spread.shape[0])
    own = inside & (rank >= FIRST) & (rank < FIRST + CHANNELS)
    return tl.sqrt_rn(tl.sum(tl.where(own, spread * spread, 0.0), axis=0) / CHANNELS)


@triton.jit
def _sums(
    tail: tl.tensor, new: tl.tensor, filled: tl.tensor, first: tl.tensor, end: tl.tensor,
    new_s: tl.tensor, center: tl.tensor, DIM: tl.constexpr, POWER: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Sums [BLOCK] over tokens ``first`` to ``end`` of (row - center) or its square."""
    index, channel = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, end, BLOCK_S):
        source = dense_rows(tail, new, start + index, filled, new_s, DIM)
        inside = (start + index < end)[:, None] & (channel < DIM)[None, :]
        row = tl.load(source[:, None] + channel[None, :], mask=inside, other=0).to(tl.float32)
        # Channels that are not finite spoil their own token and no other.
        row = tl.where(_finite(row), row, 0.0) - center[None, :]
        row = tl.where(inside, row, 0.0)
        total += tl.sum(row * row if POWER == 2 else row, axis=0)
    return total
