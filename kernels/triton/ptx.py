"""PTX that makes 16-bit floats of codes by permutations of bytes.

Nothing else of an NVIDIA GPU looks up a table in less than an instruction per channel. A text takes
a word of codes and gives its numbers, in order, in registers of 16 bits.
"""

from __future__ import annotations

import struct

import torch

from ..formats.codes import normal_grid

_DTYPES = (torch.bfloat16, torch.float16)


def magnitudes(bits: int) -> tuple[int, ...]:
    """The positive levels of the grid for normal numbers."""
    return normal_grid(bits)[2 ** (bits - 1) :]


def _table(bits: int, dtype: torch.dtype) -> tuple[str, str, str, str]:
    """The positive levels as 16-bit floats: two words of their high bytes and two of their low."""
    levels = torch.tensor(magnitudes(bits), dtype=torch.float32).to(dtype)
    numbers = [n & 0xFFFF for n in levels.view(torch.int16).tolist()]
    numbers += [0] * (8 - len(numbers))
    high, low = bytes(n >> 8 for n in numbers), bytes(n & 255 for n in numbers)
    words = struct.unpack("<2I", high) + struct.unpack("<2I", low)
    return tuple(f"0x{word:08x}" for word in words)  # type: ignore[return-value]


def _nibbles(dtype: torch.dtype) -> str:
    """Eight codes of 4 bits: numbers of the low half of each byte, then of the high half.

    A permutation takes three bits of a nibble for a place in the table: those of a code of 8 or
    more, and their complement for any other, which is negative (``minus`` has its highest bit).
    """
    h0, h1, l0, l1 = _table(4, dtype)

    def four_codes(first: int, signs: str) -> str:
        return f"""
    prmt.b32 high, {h0}, {h1}, index;
    prmt.b32 low, {l0}, {l1}, index;
    prmt.b32 sign, minus, 0, {signs};
    prmt.b32 word, low, high, 0x7351;
    and.b32 some, sign, 0x80008000;
    or.b32 word, word, some;
    mov.b32 {{${first + 4}, ${first + 5}}}, word;
    prmt.b32 word, low, high, 0x6240;
    shl.b32 some, sign, 4;
    and.b32 some, some, 0x80008000;
    or.b32 word, word, some;
    mov.b32 {{${first}, ${first + 1}}}, word;"""

    return f"""{{
    .reg .b32 minus, index, high, low, sign, some, word;
    not.b32 minus, $8;
    and.b32 minus, minus, 0x88888888;
    shr.u32 some, minus, 3;
    sub.u32 some, minus, some;
    xor.b32 index, $8, some;
    and.b32 index, index, 0x77777777;{four_codes(0, "0x1404")}
    shr.u32 index, index, 16;{four_codes(2, "0x3424")}
}}"""


def _lookup(bits: int, dtype: torch.dtype) -> str:
    """Four codes, a byte each, of at most 3 bits; see :func:`_nibbles`."""
    h0, h1, l0, l1 = _table(bits, dtype)
    return f"""{{
    .reg .b32 code, minus, index, high, low, sign, some, word;
    add.u32 code, $4, 0x{0x01010101 * (8 - 2 ** (bits - 1)):08x};
    not.b32 minus, code;
    and.b32 minus, minus, 0x08080808;
    shr.u32 some, minus, 3;
    sub.u32 some, minus, some;
    xor.b32 index, code, some;
    and.b32 index, index, 0x07070707;
    shr.u32 some, index, 4;
    or.b32 index, index, some;
    prmt.b32 index, index, 0, 0x4420;
    prmt.b32 high, {h0}, {h1}, index;
    prmt.b32 low, {l0}, {l1}, index;
    prmt.b32 sign, minus, 0, 0x1404;
    shl.b32 sign, sign, 4;
    and.b32 sign, sign, 0x80008000;
    prmt.b32 some, low, high, 0x5140;
    or.b32 word, some, sign;
    mov.b32 {{$0, $1}}, word;
    prmt.b32 sign, minus, 0, 0x3424;
    shl.b32 sign, sign, 4;
    and.b32 sign, sign, 0x80008000;
    prmt.b32 some, low, high, 0x7362;
    or.b32 word, some, sign;
    mov.b32 {{$2, $3}}, word;
}}"""


def _even(dtype: torch.dtype) -> str:
    """Four codes, a byte each: a byte below the high one of 128 (bfloat16) or 1024 adds to it."""
    base = "0x43434343" if dtype == torch.bfloat16 else "0x64646464"
    return f"""{{
    .reg .b32 word;
    prmt.b32 word, $4, {base}, 0x4140;
    mov.b32 {{$0, $1}}, word;
    prmt.b32 word, $4, {base}, 0x4342;
    mov.b32 {{$2, $3}}, word;
}}"""


def _int8(dtype: torch.dtype) -> str:
    """Four int8 levels: of bfloat16, 128 + the lower 7 bits, less 128 or, with a sign, 256."""
    if dtype == torch.float16:
        return """{
    .reg .b32 byte, word, less;
    mov.b32 less, 0x64806480;
    xor.b32 byte, $4, 0x80808080;
    prmt.b32 word, byte, 0x64646464, 0x4140;
    sub.f16x2 word, word, less;
    mov.b32 {$0, $1}, word;
    prmt.b32 word, byte, 0x64646464, 0x4342;
    sub.f16x2 word, word, less;
    mov.b32 {$2, $3}, word;
}"""
    return """{
    .reg .b32 low, sign, word, less, one;
    mov.b32 one, 0xbf80bf80;
    and.b32 low, $4, 0x7f7f7f7f;
    and.b32 sign, $4, 0x80808080;
    prmt.b32 word, low, 0x43434343, 0x4140;
    prmt.b32 less, sign, 0x43434343, 0x4140;
    fma.rn.bf16x2 word, less, one, word;
    mov.b32 {$0, $1}, word;
    prmt.b32 word, low, 0x43434343, 0x4342;
    prmt.b32 less, sign, 0x43434343, 0x4342;
    fma.rn.bf16x2 word, less, one, word;
    mov.b32 {$2, $3}, word;
}"""


NIBBLES = tuple(map(_nibbles, _DTYPES))
"""In bfloat16 and in float16."""
LOOKUP = {bits: tuple(_lookup(bits, dtype) for dtype in _DTYPES) for bits in (1, 2, 3)}
EVEN = tuple(map(_even, _DTYPES))
INT8 = tuple(map(_int8, _DTYPES))
