"""How a pruned key is laid out in memory; every kernel and the cache state share this file.

For every (batch b, key head h, token s), T of D channels are kept:

- ``kept``  [B, Hkv, S, T]                 kept values in channel order, the model's dtype
- ``bits``  [B, Hkv, S, 2, ceil(D / 8)]    uint8; plane 0: which channels are kept, plane 1: which
                                           are negative; channel j is bit j % 8 of byte j // 8
- ``scale`` [B, Hkv, S, 1 or 2]            amplitude of the pruned channels, the model's dtype; the
                                           second entry is the spread that "gaussian" recovery needs

and for every (b, h) ``norms`` [B, Hkv, D], float32: the query norm per channel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kept_channels(head_dim: int, key_ratio: float) -> int:
    """T = D - floor(key_ratio * D), the number of channels kept per token."""
    # The addend undoes the rounding of products such as 0.29 * 100 = 28.999999999999996; it must
    # not prune the last channel of a ratio just below 1.
    return max(1, head_dim - math.floor(key_ratio * head_dim + 1e-9))


def plane_bytes(head_dim: int) -> int:
    """Bytes of one bit plane of D channels."""
    return (head_dim + 7) // 8


def scale_entries(recovery: str) -> int:
    """Entries of ``scale`` per token: the mean alone, or the mean and the spread."""
    return 2 if recovery == "gaussian" else 1


def key_token_bytes(head_dim: int, key_ratio: float, itemsize_bytes: int, recovery: str) -> int:
    """Stored bytes of one packed key of one head."""
    values = kept_channels(head_dim, key_ratio) + scale_entries(recovery)
    return values * itemsize_bytes + 2 * plane_bytes(head_dim)


def pack_bits(flags: Tensor) -> Tensor:
    """Pack bool [..., D] into uint8 [..., ceil(D / 8)], lowest channel in the lowest bit."""
    padding = -flags.shape[-1] % 8
    flags_8 = torch.nn.functional.pad(flags, (0, padding)).unflatten(-1, (-1, 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flags.device)
    packed: Tensor = (flags_8 * weights).sum(-1, dtype=torch.uint8)
    return packed


def unpack_bits(packed: Tensor, head_dim: int) -> Tensor:
    """Undo :func:`pack_bits`: uint8 [..., ceil(D / 8)] to bool [..., D]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    flags = (packed.unsqueeze(-1) >> shifts) & 1
    return flags.flatten(-2)[..., :head_dim].bool()
