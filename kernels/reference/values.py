"""Pruned and quantized values, by the rule of the SparK authors' code (``compress_values``).

A channel's score is 0.7 |v_j| + 0.3 d_j, where d is the mean of the channel's variance over the
tokens and of the token's variance over the channels, divided by its maximum over both. The second
variance is the same for all channels of a token, so what ranks them is |v_j| plus a bias per head
and channel. Pruned channels are filled with their mean ("mean fill").
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import pack_bits, unpack_bits
from .prune import dequantize, expand, quantize, select


def value_bias(value: Tensor) -> Tensor:
    """The bias [B, Hkv, Dv] float32 that values [B, Hkv, S, Dv] give to the choice of channels."""
    over_tokens, over_channels = _variance(value.float(), 2), _variance(value.float(), 3)
    largest = over_tokens.amax(-1, keepdim=True) + over_channels.amax(-1, keepdim=True)
    return (0.3 / 0.7) * over_tokens / (largest + 2e-8)


def _variance(value: Tensor, dim: int) -> Tensor:
    """The unbiased variance along ``dim``; 0 where there is one entry."""
    centered = value - value.mean(dim, keepdim=True)
    return centered.square().sum(dim) / max(value.shape[dim] - 1, 1)


def pack_values(
    value: Tensor, bias: Tensor | None, kept_channels: int, quantized: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Prune and quantize values.

    Args:
        value: [B, Hkv, S, Dv].
        bias: [B, Hkv, Dv] float32, or None to keep every channel.
        kept_channels: Tv; Dv without a bias.
        quantized: store the kept channels as int8.

    Returns:
        ``rows``, ``value_bits`` and ``value_scale`` as in :mod:`..layout`; without a bias the bits
        are empty, and without either of the two the scale.
    """
    rows, bits, scales = value, value.new_empty((*value.shape[:3], 0), dtype=torch.uint8), []
    if bias is not None:
        salient = value.float().abs() + bias.unsqueeze(2)
        rows, keep = select(value, salient, kept_channels)
        pruned = (~keep).sum(-1, keepdim=True).clamp(min=1)
        scales.append(value.float().masked_fill(keep, 0).sum(-1, keepdim=True) / pruned)
        bits = pack_bits(keep)
    if quantized:
        rows, step = quantize(rows)
        scales.append(step)
    scale = torch.cat([s.to(value.dtype) for s in scales], -1) if scales else value[..., :0]
    return rows, bits, scale.clone()


def unpack_values(rows: Tensor, bits: Tensor | None, scale: Tensor | None, head_dim: int) -> Tensor:
    """Dense values [B, Hkv, S, Dv] float32 of stored ones."""
    if scale is None:
        return rows.float()
    channels, rest = dequantize(rows, scale)
    if bits is None:
        return channels
    keep = unpack_bits(bits, head_dim)
    return torch.where(keep, expand(channels, keep), rest.float())
