"""Small numbers in few bits: codes in planes, and the grids that they point into.

A code of 3, 5 or 6 bits is split into a low part of 2 or 4 bits and the rest, each in a plane of
its own, so that no part crosses a byte. In a plane of w bits with m bytes, channel i lies in byte
i % m at bit w * (i // m): one shift of the whole plane gives m neighbouring channels.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""The widths of the planes of a code, lowest bits first."""

_NORMAL = {
    1: (127,),
    2: (38, 127),
    3: (14, 45, 79, 127),
    4: (6, 18, 31, 44, 58, 75, 96, 127),
    5: (3, 8, 13, 18, 24, 29, 35, 41, 47, 54, 61, 70, 79, 90, 105, 127),
    6: (
        1, 3, 6, 8, 10, 13, 15, 17, 20, 22, 24, 27, 30, 32, 35, 38,
        40, 43, 46, 49, 53, 56, 60, 64, 68, 73, 78, 84, 91, 99, 110, 127,
    ),
}  # fmt: skip
"""The positive levels that leave the least squared error of normal numbers (Max 1960, Lloyd 1982),
in units of 1/127 of the largest."""
DEVIATION = {1: 159.17, 2: 84.08, 3: 59.02, 4: 46.48, 5: 38.95, 6: 33.92, 8: 50.0}
"""The standard deviation of those normal numbers in the same units; of 8 bits where 127 is the
largest of about a hundred of them."""


@functools.cache
def normal_grid(bits: int) -> tuple[int, ...]:
    """The 2^bits ascending levels, int8, for numbers that are normally distributed."""
    positive = _NORMAL[bits]
    return (*(-level for level in reversed(positive)), *positive)


@functools.cache
def even_grid(bits: int) -> tuple[int, ...]:
    """The 2^bits ascending levels with equal distances."""
    return tuple(range(1 - 2**bits, 2**bits, 2))


@functools.cache
def int8_grid() -> tuple[int, ...]:
    """The ascending levels that an int8 has."""
    return tuple(range(-128, 128))


def nearest(numbers: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The codes, uint8, of the levels next to some numbers; of two that are as near the higher."""
    levels = torch.tensor(grid, dtype=torch.float32, device=numbers.device)
    middle = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(numbers.contiguous(), middle, right=True).to(torch.uint8)


def levels_of(codes: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The levels, float32, of some codes."""
    levels = torch.tensor(grid, dtype=torch.float32, device=codes.device)
    taken: Tensor = levels[codes.long()]
    return taken


def code_bytes(channels: int, bits: int) -> int:
    """Bytes of the planes of a number of channels."""
    return sum(_plane_bytes(channels, width) for width in PLANES[bits])


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [..., n], uint8, into uint8 [..., code_bytes(n, bits)]."""
    planes, shift = [], 0
    for width in PLANES[bits]:
        part, size = (codes >> shift) & (2**width - 1), _plane_bytes(codes.shape[-1], width)
        per_byte = 8 // width
        part = torch.nn.functional.pad(part, (0, per_byte * size - part.shape[-1]))
        weights = torch.tensor(
            [1 << width * index for index in range(per_byte)], dtype=torch.uint8, device=part.device
        )
        rows = part.unflatten(-1, (per_byte, size))
        planes.append((rows * weights.unsqueeze(1)).sum(-2, dtype=torch.uint8))
        shift += width
    return torch.cat(planes, dim=-1)


def unpack_codes(packed: Tensor, channels: int, bits: int) -> Tensor:
    """Undo :func:`pack_codes`: uint8 [..., n]."""
    codes = packed.new_zeros((*packed.shape[:-1], channels))
    first, shift = 0, 0
    for width in PLANES[bits]:
        size = _plane_bytes(channels, width)
        plane = packed[..., first : first + size].unsqueeze(-2)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device).unsqueeze(1)
        part = ((plane >> shifts) & (2**width - 1)).flatten(-2)[..., :channels]
        codes = codes | (part << shift)
        first, shift = first + size, shift + width
    return codes


def _plane_bytes(channels: int, width: int) -> int:
    return -(-channels * width // 8)
