"""How pruned keys and values lie in memory; every kernel and the cache states share this file.

For every (batch b, key head h, token s), T of the key's D channels are kept:

- ``kept``  [B, Hkv, S, T]                 kept channels in channel order: the model's dtype, or
                                           int8 in units of the token's step
- ``bits``  [B, Hkv, S, 2, ceil(D / 8)]    uint8; plane 0: which channels are kept, plane 1: which
                                           are negative; channel j is bit j % 8 of byte j // 8
- ``scale`` [B, Hkv, S, 1 to 3]            the model's dtype: amplitude of the pruned channels; with
                                           "gaussian" recovery their spread; with int8 the step

and for every (b, h) ``norms`` [B, Hkv, D], float32: the query norm per channel.

Values are stored for every token, Tv of Dv channels (all of them unless values are pruned):

- ``rows``        [B, Hkv, S, Tv]            as ``kept``
- ``value_bits``  [B, Hkv, S, ceil(Dv / 8)]  uint8, which channels are kept; only if pruned
- ``value_scale`` [B, Hkv, S, 1 or 2]        the model's dtype: if pruned, the mean of the pruned
                                             channels; with int8 the step
- ``value_bias``  [B, Hkv, Dv]               float32, what a channel's magnitude is raised by when
                                             the channels to keep are chosen; only if pruned
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kept_channels(head_dim: int, ratio: float) -> int:
    """T = D - floor(ratio * D), the number of channels kept per token."""
    # The addend undoes the rounding of products such as 0.29 * 100 = 28.999999999999996; it must
    # not prune the last channel of a ratio just below 1.
    return max(1, head_dim - math.floor(ratio * head_dim + 1e-9))


def plane_bytes(head_dim: int) -> int:
    """Bytes of one bit plane of D channels."""
    return (head_dim + 7) // 8


def scale_entries(recovery: str) -> int:
    """Entries of ``scale`` per token: the mean alone, or the mean and the spread."""
    return 2 if recovery == "gaussian" else 1


def value_fields(pruned: bool, quantized: bool) -> tuple[str, ...]:
    """Names of the tensors that values are stored in; the last one has the model's dtype."""
    if pruned:
        return ("rows", "value_bits", "value_bias", "value_scale")
    return ("rows", "value_scale") if quantized else ("rows",)


def value_head_dim(values: Tensor, value_bias: Tensor | None) -> int:
    """Dv of stored values: their rows' width, unless they are pruned."""
    return values.shape[3] if value_bias is None else value_bias.shape[2]


def key_token_bytes(
    head_dim: int, key_ratio: float, itemsize_bytes: int, recovery: str, quantized: bool = False
) -> int:
    """Stored bytes of one packed key of one head."""
    kept, entries = kept_channels(head_dim, key_ratio), scale_entries(recovery) + quantized
    kept_bytes = kept if quantized else kept * itemsize_bytes
    return kept_bytes + entries * itemsize_bytes + 2 * plane_bytes(head_dim)


def value_token_bytes(
    head_dim: int, value_ratio: float, itemsize_bytes: int, quantized: bool = False
) -> int:
    """Stored bytes of one value of one head."""
    kept, pruned = kept_channels(head_dim, value_ratio), value_ratio > 0
    kept_bytes = kept if quantized else kept * itemsize_bytes
    return kept_bytes + (pruned + quantized) * itemsize_bytes + pruned * plane_bytes(head_dim)


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
