"""Formats of others: their bytes by hand, and what they recover against independent formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.quality_methods import Peer, methods
from benchmarks.quality_peers import (
    Float8,
    PerChannel,
    PerToken,
    Quanto,
    Rotated,
    Rounded,
    hadamard,
)


@pytest.mark.parametrize(
    ("codec", "bytes_at_64"),
    [
        (PerChannel(4), 32 + 64 * 4 / 32),  # levels; a scale and a zero per channel and 32 tokens
        (PerChannel(2), 16 + 64 * 4 / 32),
        (PerToken(3), 24 + 2 * 4),  # two groups of 32 channels
        (Rotated(4), 32 + 4),
        (Rotated(2), 16 + 4),
        (Quanto(4), 32 + 4),
        (Float8(), 64),
        (Rounded(), 128),
    ],
)
def test_bytes_of_a_token(codec, bytes_at_64):
    assert codec.token_bytes(64) == bytes_at_64


def by_hand(numbers, bits):
    """One group, quantized in numpy from its least to its greatest number."""
    zero = np.float64(np.float16(numbers.min()))
    step = np.float64(np.float16((numbers.max() - zero) / (2**bits - 1)))
    return np.clip(np.rint((numbers - zero) / step), 0, 2**bits - 1) * step + zero


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_kivi_quantizes_keys_by_channel_and_values_by_token(bits):
    rows = torch.randn(1, 2, 64, 64).double()
    keys, values = rows.clone().numpy(), rows.clone().numpy()
    for head in range(2):
        for start in (0, 32):
            for other in range(64):
                group = (0, head, slice(start, start + 32), other)
                keys[group] = by_hand(keys[group], bits)
                group = (0, head, other, slice(start, start + 32))
                values[group] = by_hand(values[group], bits)
    for codec, expected in ((PerChannel(bits), keys), (PerToken(bits), values)):
        recovered = codec.recover(rows.float()).double()
        # A number in the middle of two levels may go to either.
        wrong = (recovered - torch.from_numpy(expected)).abs() > 1e-4
        assert wrong.float().mean() < 1e-3


def test_rotation_spreads_a_large_channel():
    rows = torch.randn(1, 1, 32, 64)
    rows[..., 5] = 50
    matrix = hadamard(64)
    assert torch.allclose(matrix @ matrix.mT, torch.eye(64), atol=1e-6)
    assert matrix.abs().allclose(torch.tensor(1 / 8))
    assert torch.allclose(Rotated(12).recover(rows), rows, atol=0.02)
    rotated, plain = Rotated(4).recover(rows), PerToken(4, group=64).recover(rows)
    assert (rotated - rows).square().sum() < 0.3 * (plain - rows).square().sum()
    with pytest.raises(ValueError, match="head size is 48"):
        Rotated(4).recover(torch.randn(1, 1, 32, 48))


def test_float8_has_three_bits_of_mantissa():
    rows = torch.randn(1, 2, 32, 64)
    error = (Float8().recover(rows) - rows).abs()
    assert (error <= rows.abs() / 16 + 1e-3).all()
    assert error.max() > 1e-3


def test_quanto_is_that_of_transformers():
    pytest.importorskip("optimum.quanto")
    rows = torch.randn(1, 2, 32, 64)
    fine, coarse = ((Quanto(bits).recover(rows) - rows).abs().mean() for bits in (4, 2))
    assert 0 < fine < 0.1 < coarse < 0.5


def test_a_package_that_is_missing_is_told():
    class Missing(Rounded):
        REQUIRES = "no_such_package.inside"

    assert Peer("missing", Missing(), Rounded()).missing() == "no_such_package.inside"
    assert Peer("there", Rounded(), Rounded()).missing() == ""


def test_names_of_methods_are_unique():
    known = methods(64)
    assert len({method.name for method in known}) == len(known)
