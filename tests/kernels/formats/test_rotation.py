"""Hadamard rotations by blocks."""

from __future__ import annotations

import pytest
import torch

from spark_compile.kernels.formats.rotation import rotated


@pytest.mark.parametrize("channels", [1, 2, 7, 24, 64, 80, 256])
def test_a_rotation_is_orthogonal_and_undoes_itself(channels: int) -> None:
    matrix = rotated(torch.eye(channels, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.mT, torch.eye(channels, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix, torch.eye(channels, dtype=torch.float64))


def test_a_rotation_spreads_a_channel_over_its_block() -> None:
    rows = torch.zeros(24)
    rows[3] = 1
    spread = rotated(rows)
    assert torch.allclose(spread[:8].abs(), torch.full((8,), 8**-0.5))
    assert not spread[8:].any()
    assert torch.allclose(rotated(torch.ones(4)), torch.tensor([2.0, 0, 0, 0]))  # Sylvester's order
