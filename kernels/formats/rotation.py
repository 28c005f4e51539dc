"""Walsh-Hadamard rotations, which spread what a channel holds over all channels of a block."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(rows: Tensor) -> Tensor:
    """Rows [..., n] rotated by blocks of the largest power of two that divides n.

    The matrix is symmetric and orthogonal: rotating twice gives the rows back, and dot products of
    rotated rows are those of the rows.
    """
    size = rows.shape[-1]
    block = size & -size
    spread = rows.unflatten(-1, (-1, block))
    width = 1
    while width < block:
        pairs = spread.unflatten(-1, (-1, 2, width))
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        spread = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        width *= 2
    turned: Tensor = spread.flatten(-2) * block**-0.5
    return turned
