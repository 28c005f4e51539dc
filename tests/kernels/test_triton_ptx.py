"""The PTX that makes numbers of codes, run by an interpreter of the few instructions it has."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import pytest
import torch

pytest.importorskip("triton")

from spark_compile.kernels.formats.codes import even_grid, normal_grid
from spark_compile.kernels.triton import ptx

DTYPES = (torch.bfloat16, torch.float16)
WORD = 0xFFFFFFFF


def permuted(low: int, high: int, selector: int) -> int:
    """``prmt.b32``: four of eight bytes, or eight times the highest bit of one."""
    bytes_ = (low | high << 32).to_bytes(8, "little")
    taken = [
        (bytes_[nibble & 7], nibble & 8) for nibble in (selector >> 4 * n & 15 for n in range(4))
    ]
    return int.from_bytes(
        bytes((255 if byte & 128 else 0) if sign else byte for byte, sign in taken), "little"
    )


def halves(word: int, dtype: torch.dtype) -> torch.Tensor:
    """The two 16-bit floats in a word, as float32."""
    signed = [half - (half >> 15 << 16) for half in (word & 0xFFFF, word >> 16)]
    return torch.tensor(signed, dtype=torch.int16).view(dtype).float()


def word_of(numbers: torch.Tensor, dtype: torch.dtype) -> int:
    low, high = (int(n) & 0xFFFF for n in numbers.to(dtype).view(torch.int16).tolist())
    return low | high << 16


OPERATIONS = {
    "mov.b32": lambda a: a,
    "not.b32": lambda a: ~a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "add.u32": lambda a, b: a + b,
    "sub.u32": lambda a, b: a - b,
    "prmt.b32": permuted,
    "sub.f16x2": lambda a, b: word_of(
        halves(a, torch.float16) - halves(b, torch.float16), torch.float16
    ),
    "fma.rn.bf16x2": lambda a, b, c: word_of(
        halves(a, torch.bfloat16) * halves(b, torch.bfloat16) + halves(c, torch.bfloat16),
        torch.bfloat16,
    ),
}


def run(text: str, outputs: int, inputs: Sequence[int]) -> list[int]:
    """The words that a text puts into its outputs."""
    registers = {f"${outputs + n}": value for n, value in enumerate(inputs)}
    for line in text.strip("{}\n ").split(";"):
        line = line.strip()
        if not line or line.startswith(".reg"):
            continue
        name, rest = line.split(maxsplit=1)
        target, *operands = re.split(r",\s*", rest)
        values = [registers[o] if o in registers else int(o, 0) for o in operands]
        registers[target] = OPERATIONS[name](*values) & WORD
    return [registers[f"${n}"] for n in range(outputs)]


def made(text: str, words: Sequence[int], outputs: int, dtype: torch.dtype) -> list[list[float]]:
    """For each word its numbers, in the order of the outputs."""
    pairs = [halves(word, dtype).tolist() for word in run(text, outputs, words)]
    return [[pair[which] for pair in pairs] for which in (0, 1)]


def bytes_of(word: int) -> list[int]:
    return list(word.to_bytes(4, "little"))


def words_of(codes: int) -> list[list[int]]:
    """Every code once, and once in every byte."""
    rows = [[(first + step * place) % codes for place in range(4)] for first, step in
            itertools.product(range(codes), (0, 1, 3))]  # fmt: skip
    return [*rows, *rows[1:2]] if len(rows) % 2 else rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_nibbles(dtype: torch.dtype) -> None:
    grid = normal_grid(4)
    words = []
    for lows, highs in itertools.product(words_of(16)[::5], words_of(16)[::7]):
        both = bytes(low | high << 4 for low, high in zip(lows, highs, strict=True))
        words.append(int.from_bytes(both, "little"))
    for pair in zip(words, reversed(words), strict=True):
        result = made(ptx.NIBBLES[DTYPES.index(dtype)], pair, 8, dtype)
        for word, numbers in zip(pair, result, strict=True):
            codes = [byte & 15 for byte in bytes_of(word)] + [byte >> 4 for byte in bytes_of(word)]
            assert numbers == [grid[code] for code in codes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 5, 6, 8])
def test_bytes(bits: int, dtype: torch.dtype) -> None:
    if bits == 8:
        text, levels = ptx.INT8, [code - (code >> 7 << 8) for code in range(256)]
    elif bits >= 5:
        # Numbers that the levels are made of by a product and a sum.
        base = 128 if dtype == torch.bfloat16 else 1024
        text, levels = ptx.EVEN, [base + code for code in range(2**bits)]
        assert [2 * n + 1 - 2**bits - 2 * base for n in levels] == list(even_grid(bits))
    else:
        text, levels = ptx.LOOKUP[bits], list(normal_grid(bits))
    words = [int.from_bytes(bytes(row), "little") for row in words_of(2**bits)]
    for pair in zip(words, reversed(words), strict=True):
        result = made(text[DTYPES.index(dtype)], pair, 4, dtype)
        for word, numbers in zip(pair, result, strict=True):
            assert numbers == [levels[code] for code in bytes_of(word)]
