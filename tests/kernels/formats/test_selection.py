"""Choosing channels, bit planes, and the number of channels that are kept."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_compile.kernels.formats.selection import (
    expand,
    kept_channels,
    pack_bits,
    plane_bytes,
    select,
    unpack_bits,
)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_packed_bits_are_the_binary_digits_of_the_flags(flags: list[bool]) -> None:
    packed = pack_bits(torch.tensor(flags))
    assert packed.dtype == torch.uint8
    assert packed.shape == (plane_bytes(len(flags)),)
    number = sum(flag << j for j, flag in enumerate(flags))
    assert packed.tolist() == list(number.to_bytes(len(packed), "little"))
    assert unpack_bits(packed, len(flags)).tolist() == flags


@pytest.mark.parametrize("head_dim", [1, 7, 8, 9, 12, 64, 65])
def test_unpack_undoes_pack_in_every_row(head_dim: int) -> None:
    flags = torch.rand(2, 3, 5, head_dim) < 0.5
    assert torch.equal(unpack_bits(pack_bits(flags), head_dim), flags)
    turned = flags.transpose(0, 2)  # not contiguous
    assert torch.equal(unpack_bits(pack_bits(turned), head_dim), turned)


def test_unpack_never_reads_the_padding_bits() -> None:
    packed = pack_bits(torch.zeros(5, dtype=torch.bool)) | 0b1110_0000
    assert not unpack_bits(packed, 5).any()


@pytest.mark.parametrize("head_dim", [1, 3, 8, 12, 64, 80, 96, 100, 128, 192, 256, 576])
def test_kept_channels_is_exact_for_every_percentage(head_dim: int) -> None:
    # In floats 0.29 * 100 is 28.999999999999996, and 0.57 * 100 is 56.99999999999999.
    for percent in range(100):
        exact = head_dim - math.floor(Fraction(percent, 100) * head_dim)
        assert kept_channels(head_dim, percent / 100) == exact, percent


@given(st.integers(1, 1024), st.integers(0, 9999))
@settings(deadline=None)
def test_kept_channels_is_exact_for_four_digits(head_dim: int, share: int) -> None:
    exact = head_dim - math.floor(Fraction(share, 10_000) * head_dim)
    assert kept_channels(head_dim, share / 10_000) == exact


@given(st.integers(1, 1024), st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_at_least_one_and_at_most_all_channels_are_kept(head_dim: int, ratio: float) -> None:
    assert 1 <= kept_channels(head_dim, ratio) <= head_dim


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.data())
@settings(max_examples=60, deadline=None)
def test_the_most_salient_channels_are_kept_in_their_order(
    salient: list[int], data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, len(salient)))
    rows = torch.arange(1.0, len(salient) + 1)
    channels, keep = select(rows, torch.tensor(salient), count)
    ranked = sorted(range(len(salient)), key=lambda j: -salient[j])  # stable: the first of equals
    assert keep.nonzero().flatten().tolist() == sorted(ranked[:count])
    assert torch.equal(channels, rows[keep])
    assert torch.equal(expand(channels, keep)[keep], channels)


def test_a_damaged_plane_reads_no_channel_that_is_not_there() -> None:
    assert expand(torch.tensor([4.0, 5.0]), torch.ones(5, dtype=torch.bool)).tolist() == [
        4.0, 5.0, 5.0, 5.0, 5.0,
    ]  # fmt: skip
