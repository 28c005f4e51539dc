"""Codes of a few bits, and the grids that they point into."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spark_compile.kernels.formats.codes import (
    DEVIATION,
    code_bytes,
    even_grid,
    levels_of,
    nearest,
    normal_grid,
    pack_codes,
    unpack_codes,
)  # fmt: skip

BITS = range(1, 7)


@given(bits=st.sampled_from([*BITS, 8]), channels=st.integers(1, 200), seed=st.integers(0, 9))
def test_codes_come_back(bits: int, channels: int, seed: int) -> None:
    torch.manual_seed(seed)
    codes = torch.randint(2**bits, (2, 3, channels), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (2, 3, code_bytes(channels, bits))
    assert torch.equal(unpack_codes(packed, channels, bits), codes)


def test_codes_of_whole_bytes_waste_nothing() -> None:
    assert [code_bytes(64, bits) for bits in BITS] == [8, 16, 24, 32, 40, 48]
    assert code_bytes(9, 3) == 3 + 2  # 9 * 2 and 9 * 1 bits, each in whole bytes


def test_a_plane_has_neighbouring_channels_in_neighbouring_bytes() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert pack_codes(codes, 4).tolist() == [index | (index + 8) << 4 for index in range(8)]
    low, high = pack_codes(codes & 7, 3).split([4, 2])
    assert low.tolist() == [index * 0b01010101 for index in range(4)]
    # Bit k of byte i is that of channel i + 2 k: 1 where the channel modulo 8 is above 3.
    assert high.tolist() == [0b11001100] * 2


@pytest.mark.parametrize("bits", BITS)
def test_the_normal_levels_are_those_of_least_error(bits: int) -> None:
    numbers = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(1 << 18) + 0.5) / (1 << 18))
    grid = normal_grid(bits)
    assert len(grid) == 2**bits
    assert list(grid) == sorted(grid)

    def error(levels: tuple[int, ...]) -> float:
        units = numbers * DEVIATION[bits]
        worth = levels_of(nearest(units, levels), levels)
        return ((worth - units) / DEVIATION[bits]).square().mean().item()

    # Levels are rounded to integers, which more of them feel more.
    least = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499, 6: 0.0006446}  # Max 1960
    assert error(grid) == pytest.approx(least[bits], rel=0.08 if bits > 4 else 0.01)


@pytest.mark.parametrize("bits", BITS)
def test_even_levels_have_equal_distances(bits: int) -> None:
    grid = even_grid(bits)
    assert len(grid) == 2**bits
    assert {high - low for low, high in itertools.pairwise(grid)} == {2}
    assert grid[0] == -grid[-1]


def test_the_nearest_level_is_taken() -> None:
    grid = normal_grid(2)
    numbers = torch.tensor([-500.0, -83.0, -82.0, -0.1, 0.0, 82.0, 83.0, 500.0, float("inf")])
    expected = [-127, -127, -38, -38, 38, 38, 127, 127, 127]
    assert levels_of(nearest(numbers, grid), grid).tolist() == expected
