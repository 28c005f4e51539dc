"""PTX that makes 16-bit floats of codes by permutations of bytes.

Nothing else of an NVIDIA GPU looks up a table in less than an instruction per channel. A text takes
two words of codes and gives two numbers in each of its outputs: of the first word, then the second.
Of bytes, the outputs are those of the four bytes; of nibbles, the low halves of the four, then the
high ones.
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


_Outputs = list[tuple[tuple[str, str], tuple[str, str]]]
"""Registers and the bytes that they take of the low and the high ones of four numbers: two for each
half of eight codes."""


def _eight(table: tuple[str, str, str, str], outputs: _Outputs) -> str:
    """The numbers of the eight codes, 0 to 15, in the nibbles of ``codes``.

    A permutation takes three bits of a nibble for a place in the table: those of a code of 8 or
    more, and their complement for any other, which is negative (``minus`` has its highest bit).
    The fourth bit of a place makes eight bits of the highest bit of the byte.
    """
    h0, h1, l0, l1 = table
    text = """
    not.b32 minus, codes;
    and.b32 minus, minus, 0x88888888;
    shr.u32 some, minus, 3;
    sub.u32 some, minus, some;
    xor.b32 index, codes, some;
    and.b32 index, index, 0x77777777;
    shl.b32 some, minus, 4;"""
    for half, (signs, (one, other)) in enumerate(zip(("0xd9c8", "0xfbea"), outputs, strict=True)):
        if half:
            text += "\n    shr.u32 index, index, 16;"
        text += f"""
    prmt.b32 high, {h0}, {h1}, index;
    prmt.b32 low, {l0}, {l1}, index;
    prmt.b32 sign, some, minus, {signs};
    and.b32 sign, sign, 0x80808080;
    or.b32 high, high, sign;
    prmt.b32 {one[0]}, low, high, {one[1]};
    prmt.b32 {other[0]}, low, high, {other[1]};"""
    return text


_REGISTERS = "    .reg .b32 codes, minus, index, high, low, sign, some;"


def _nibbles(dtype: torch.dtype) -> str:
    """Two words of eight codes: the low halves of the bytes, then the high halves."""
    table, text = _table(4, dtype), "{\n" + _REGISTERS
    for pair, bytes_ in enumerate(("0x5140", "0x7362")):
        text += f"\n    prmt.b32 codes, $8, $9, {bytes_};"
        first, second = 2 * pair, 2 * pair + 1
        text += _eight(
            table,
            [((f"${n}", "0x6240"), (f"${n + 4}", "0x7351")) for n in (first, second)],
        )
    return text + "\n}"


def _lookup(bits: int, dtype: torch.dtype) -> str:
    """Two words of four codes, a byte each, of at most 3 bits: they are put into nibbles."""
    return f"""{{
{_REGISTERS}
    shl.b32 codes, $5, 4;
    or.b32 codes, codes, $4;
    add.u32 codes, codes, 0x{0x11111111 * (8 - 2 ** (bits - 1)):08x};{
        _eight(
            _table(bits, dtype),
            [((f"${n}", "0x5140"), (f"${n + 1}", "0x7362")) for n in (0, 2)],
        )
    }
}}"""


def _even(dtype: torch.dtype) -> str:
    """Two words of four codes, a byte each: a byte below the high one of 128 (bfloat16) or 1024
    adds to it."""
    base = "0x43434343" if dtype == torch.bfloat16 else "0x64646464"
    return f"""{{
    .reg .b32 both;
    prmt.b32 both, $4, $5, 0x5140;
    prmt.b32 $0, both, {base}, 0x4140;
    prmt.b32 $1, both, {base}, 0x4342;
    prmt.b32 both, $4, $5, 0x7362;
    prmt.b32 $2, both, {base}, 0x4140;
    prmt.b32 $3, both, {base}, 0x4342;
}}"""


def _int8(dtype: torch.dtype) -> str:
    """Two words of four int8 levels.

    In float16 1024 + (level + 128), less that; in bfloat16 128 + the lower 7 bits, less 128 or,
    with a sign, 256.
    """
    is_half = dtype == torch.float16
    text = "{\n    .reg .b32 both, low, sign, less, minus_one;"
    text += f"\n    mov.b32 {'less, 0x64806480' if is_half else 'minus_one, 0xbf80bf80'};"
    for pair, bytes_ in enumerate(("0x5140", "0x7362")):
        text += f"\n    prmt.b32 both, $4, $5, {bytes_};"
        if is_half:
            text += "\n    xor.b32 both, both, 0x80808080;"
        else:
            text += "\n    and.b32 low, both, 0x7f7f7f7f;\n    and.b32 sign, both, 0x80808080;"
        for half, places in enumerate(("0x4140", "0x4342")):
            output = f"${2 * pair + half}"
            if is_half:
                text += f"""
    prmt.b32 {output}, both, 0x64646464, {places};
    sub.f16x2 {output}, {output}, less;"""
            else:
                text += f"""
    prmt.b32 {output}, low, 0x43434343, {places};
    prmt.b32 less, sign, 0x43434343, {places};
    fma.rn.bf16x2 {output}, less, minus_one, {output};"""
    return text + "\n}"


NIBBLES = tuple(map(_nibbles, _DTYPES))
"""In bfloat16 and in float16."""
LOOKUP = {bits: tuple(_lookup(bits, dtype) for dtype in _DTYPES) for bits in (1, 2, 3)}
EVEN = tuple(map(_even, _DTYPES))
INT8 = tuple(map(_int8, _DTYPES))
