"""Levels of codes, and rotations, in registers (``kernels/formats/codes`` and ``rotation``).

A *part* is what ``quantized`` calls one: CHANNELS channels whose codes have BITS bits; those of 8
bits are the levels, and ``int8`` is such a part. ``tiles`` gives numbers that a matrix product
takes, and ``levels_of`` what levels would have given: that costs less per query or token than per
channel.
"""

# mypy: disable-error-code="import-untyped, no-redef, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ..formats.codes import DEVIATION
from ..formats.quantized import EVEN_BITS, NOT_FINITE, OCTAVE, UNIT_CODE
from . import ptx
from .fields import as_type

_EVEN = tl.constexpr(EVEN_BITS)
_OCTAVE, _UNIT_CODE = tl.constexpr(OCTAVE), tl.constexpr(UNIT_CODE)
_NOT_FINITE = tl.constexpr(NOT_FINITE)


def _packed(numbers: list[int], width: int) -> int:
    return sum(number << width * place for place, number in enumerate(numbers))


# The positive levels of the grids of 1 to 4 bits, a byte each; those of b bits from 2^(b-1)-1 on.
_LEVELS = tl.constexpr(_packed([m for bits in range(1, 5) for m in ptx.magnitudes(bits)], 8))
_DEVIATIONS = tl.constexpr(
    _packed([round(DEVIATION.get(bits, 0) * 100) for bits in range(1, 9)], 16)
)
_NIBBLES_BF16, _NIBBLES_FP16 = map(tl.constexpr, ptx.NIBBLES)
_1_BF16, _1_FP16 = map(tl.constexpr, ptx.LOOKUP[1])
_2_BF16, _2_FP16 = map(tl.constexpr, ptx.LOOKUP[2])
_3_BF16, _3_FP16 = map(tl.constexpr, ptx.LOOKUP[3])
_EVEN_BF16, _EVEN_FP16 = map(tl.constexpr, ptx.EVEN)
_INT8_BF16, _INT8_FP16 = map(tl.constexpr, ptx.INT8)


@triton.jit
def levels_of(
    sums: tl.tensor, total: tl.tensor, BITS: tl.constexpr, PTX: tl.constexpr, DTYPE: tl.constexpr
) -> tl.tensor:
    """Sums [M, X] of factors times levels, of those of factors times numbers and of factors [M].

    Codes of even levels are numbers as they are, or in PTX as what makes a float of them.
    """
    if BITS == 5 or BITS == 6:
        base: tl.constexpr = 0 if not PTX else (1024 if DTYPE == tl.float16 else 128)  # noqa: SIM300
        sums = sums * 2.0 + total[:, None] * (1.0 - 2**BITS - 2.0 * base)
    return sums


@triton.jit
def amplitudes(codes: tl.tensor) -> tl.tensor:
    """``formats.quantized.amplitude_of`` codes [N], float32."""
    worth = tl.exp2((codes.to(tl.float32) - _UNIT_CODE) * (1.0 / _OCTAVE))
    worth = tl.where(codes > 0, worth, 0.0)
    return tl.where(codes == _NOT_FINITE, float("nan"), worth)


@triton.jit
def rotated(rows: tl.tensor, CHANNELS: tl.constexpr) -> tl.tensor:
    """``formats.rotation.rotated`` of the first CHANNELS channels of [M, BLOCK]; the others spoil
    none of them, since a block ends with them."""
    COUNT: tl.constexpr = rows.shape[0]
    BLOCK: tl.constexpr = rows.shape[1]
    SIZE: tl.constexpr = CHANNELS & -CHANNELS
    for stage in tl.static_range(0, 10):
        if 2 << stage <= SIZE:
            pairs = tl.reshape(rows, (COUNT, BLOCK // (2 << stage), 2, 1 << stage))
            low, high = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
            pairs = tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2))
            rows = tl.reshape(pairs, (COUNT, BLOCK))
    return rows * (SIZE**-0.5)


@triton.jit
def _plane(
    codes: tl.tensor, WIDTH: tl.constexpr, SLICES: tl.constexpr, CHANNELS: tl.constexpr
) -> tl.tensor:
    """The codes of a plane, a byte each: words [N, CHANNELS / 4] of uint32.

    Its m bytes are all SLICES parts of a token's channels beside, or over, each other.
    """
    COUNT: tl.constexpr = codes.shape[0]
    WORDS: tl.constexpr = CHANNELS * WIDTH // 32
    BESIDE: tl.constexpr = SLICES * WIDTH // 8
    word = tl.load(as_type(codes, tl.uint32)[:, None] + tl.arange(0, WORDS)[None, :])
    word = tl.reshape(word, (COUNT, 1, BESIDE, WORDS // BESIDE))
    over = (tl.arange(0, SLICES // BESIDE) * WIDTH).to(tl.uint32)[None, :, None, None]
    word = (word >> over) & (0x01010101 * (2**WIDTH - 1))
    return tl.reshape(word, (COUNT, CHANNELS // 4))


@triton.jit
def _words(codes: tl.tensor, BITS: tl.constexpr, CHANNELS: tl.constexpr) -> tl.tensor:
    """Codes, a byte each, of a part whose planes are whole words: uint32 [N, CHANNELS / 4]."""
    LOW: tl.constexpr = 4 if BITS >= 4 else (2 if BITS >= 2 else 1)
    HIGH: tl.constexpr = BITS - LOW
    if BITS == 8:
        word = tl.load(as_type(codes, tl.uint32)[:, None] + tl.arange(0, CHANNELS // 4)[None, :])
    elif HIGH == 0:
        word = _plane(codes, LOW, 8 // LOW, CHANNELS)
    else:
        word = _plane(codes, LOW, 8 // HIGH, CHANNELS)
        word |= _plane(codes + CHANNELS * LOW // 8, HIGH, 8 // HIGH, CHANNELS) << LOW
    return word


@triton.jit
def _plane_codes(
    codes: tl.tensor, channel: tl.tensor, WIDTH: tl.constexpr, CHANNELS: tl.constexpr
) -> tl.tensor:
    """The codes of a plane of channels [BLOCK]: int32 [N, BLOCK]."""
    BYTES: tl.constexpr = (CHANNELS * WIDTH + 7) // 8
    byte = tl.load(codes[:, None] + (channel % BYTES)[None, :]).to(tl.int32)
    return (byte >> (channel // BYTES * WIDTH)[None, :]) & (2**WIDTH - 1)


@triton.jit
def _codes(
    codes: tl.tensor, BITS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """Codes of any part, channel by channel: int32 [N, BLOCK]."""
    channel = tl.minimum(tl.arange(0, BLOCK), CHANNELS - 1)
    LOW: tl.constexpr = 4 if BITS >= 4 else (2 if BITS >= 2 else 1)
    HIGH: tl.constexpr = BITS - LOW
    AFTER: tl.constexpr = (CHANNELS * LOW + 7) // 8
    if BITS == 8:
        code = tl.load(codes[:, None] + channel[None, :]).to(tl.int8, bitcast=True).to(tl.int32)
    else:
        code = _plane_codes(codes, channel, LOW, CHANNELS)
        if HIGH > 0:
            code |= _plane_codes(codes + AFTER, channel, HIGH, CHANNELS) << LOW
    return code


@triton.jit
def looked_up(code: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """The levels, int32, of codes of a grid for normal numbers."""
    HALF: tl.constexpr = 2 ** (BITS - 1)
    negative = code < HALF
    index = tl.where(negative, HALF - 1 - code, code - HALF)
    level = tl.zeros_like(code)
    for place in tl.static_range(0, HALF):
        level = tl.where(index == place, (_LEVELS >> 8 * (HALF - 1 + place)) & 0xFF, level)
    return tl.where(negative, -level, level)


@triton.jit
def nearest(numbers: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """``formats.codes.nearest`` of numbers in units of the amplitude: int32 codes."""
    HALF: tl.constexpr = 2 ** (BITS - 1)
    if BITS == 8:
        code = tl.floor(numbers + 0.5)
        code = tl.minimum(tl.maximum(code, -128.0), 127.0).to(tl.int32)
    elif BITS >= _EVEN:
        # Between two levels is an even number.
        code = tl.floor(numbers * 0.5) + HALF
        code = tl.minimum(tl.maximum(code, 0.0), 2.0 * HALF - 1).to(tl.int32)
    else:
        code = (numbers >= 0).to(tl.int32)
        for place in tl.static_range(0, HALF - 1):
            middle = 0.5 * (
                ((_LEVELS >> 8 * (HALF - 1 + place)) & 0xFF)
                + ((_LEVELS >> 8 * (HALF + place)) & 0xFF)
            )
            code += (numbers >= middle).to(tl.int32) + (numbers >= -middle).to(tl.int32)
    return code


@triton.jit
def deviation(BITS: tl.constexpr) -> tl.tensor:
    """``formats.codes.DEVIATION``."""
    return ((_DEVIATIONS >> 16 * (BITS - 1)) & 0xFFFF) / 100.0


@triton.jit
def _numbers(code: tl.tensor, BITS: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """What ``tiles`` gives for some codes."""
    if BITS < _EVEN:
        code = looked_up(code, BITS)
    return code.to(tl.float32).to(DTYPE)


@triton.jit
def _beside(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """Two tensors [N, W] beside each other: [N, 2 W]."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def _four(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tensor:
    """Four tensors [N, W] beside each other: [N, 4 W]."""
    return _beside(_beside(a, b), _beside(c, d))


@triton.jit
def tile_channels(
    CHANNELS: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """Which channel of a part each column of ``tiles`` is: [BLOCK].

    Of words, first the first codes of all words, then the second ones: so numbers of neighbouring
    words are neighbours in a register. Words of nibbles have the second half of the channels in the
    high halves of their bytes.
    """
    column = tl.arange(0, BLOCK)
    if WORDS:
        SPAN: tl.constexpr = CHANNELS // 2 if BITS == 4 else CHANNELS
        within = column % SPAN
        column = column - within + within % (SPAN // 4) * 4 + within // (SPAN // 4)
    return column


@triton.jit
def tiles(
    codes: tl.tensor, CHANNELS: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr,
    PTX: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The channels (``tile_channels``) of a part of tokens [N] as numbers of DTYPE, [N, BLOCK].

    Args:
        codes: pointers [N] to the first byte of the part of each token.
        WORDS: whether its planes are whole words, and so many that each slice is of words.
        PTX: whether it may be written out; DTYPE is of 16 bits then.
    """
    HALF: tl.constexpr = DTYPE == tl.bfloat16  # noqa: SIM300
    if not WORDS:
        numbers = _numbers(_codes(codes, BITS, CHANNELS, BLOCK), BITS, DTYPE)
    elif BITS == 4:
        word = tl.load(as_type(codes, tl.uint32)[:, None] + tl.arange(0, CHANNELS // 8)[None, :])
        if PTX:
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                _NIBBLES_BF16 if HALF else _NIBBLES_FP16, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
                [word],
                dtype=(
                    tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16
                ), is_pure=True, pack=2,
            )  # fmt: skip
            numbers = _beside(_four(a, b, c, d), _four(e, f, g, h)).to(DTYPE, bitcast=True)
        else:
            word = word.to(tl.int32, bitcast=True)
            low = _four(word & 15, (word >> 8) & 15, (word >> 16) & 15, (word >> 24) & 15)
            word = word >> 4
            high = _four(word & 15, (word >> 8) & 15, (word >> 16) & 15, (word >> 24) & 15)
            numbers = _numbers(_beside(low, high), BITS, DTYPE)
    elif PTX:
        if BITS == 8:
            text: tl.constexpr = _INT8_BF16 if HALF else _INT8_FP16
        elif BITS >= _EVEN:
            text: tl.constexpr = _EVEN_BF16 if HALF else _EVEN_FP16
        elif BITS == 3:
            text: tl.constexpr = _3_BF16 if HALF else _3_FP16
        elif BITS == 2:
            text: tl.constexpr = _2_BF16 if HALF else _2_FP16
        else:
            text: tl.constexpr = _1_BF16 if HALF else _1_FP16
        word = _words(codes, BITS, CHANNELS)
        a, b, c, d = tl.inline_asm_elementwise(
            text, "=&r,=&r,=&r,=&r,r,r", [word], dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True, pack=2,
        )  # fmt: skip
        numbers = _four(a, b, c, d).to(DTYPE, bitcast=True)
    else:
        word = _words(codes, BITS, CHANNELS).to(tl.int32, bitcast=True)
        if BITS == 8:
            four = _four((word << 24) >> 24, (word << 16) >> 24, (word << 8) >> 24, word >> 24)
        else:
            four = _four(word & 255, (word >> 8) & 255, (word >> 16) & 255, (word >> 24) & 255)
        numbers = _numbers(four, BITS, DTYPE)
    return numbers
