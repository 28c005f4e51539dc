"""SparK pruning of keys and their recovery (arXiv 2508.15212), the way the authors' code does it.

With n_j the query norm of channel j and p = 1/2 ("squared" saliency) or p = 1 ("absolute"):

    sal_j = (|k_j| * n_j^p)^(1/p)            k_j^2 * n_j, or |k_j| * n_j as the paper has it
    keep the T channels of each token with the largest sal_j
    a     = mean of sal_j over the pruned channels of the token
    k^_j  = sign(k_j) * (a / n_j)^p          for pruned j
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import pack_bits, unpack_bits

_NORM_FLOOR = 1e-3  # of the mean norm: a channel no query looks at must not recover to infinity


def query_stats(query: Tensor, kv_heads: int, window: int) -> Tensor:
    """Sum over the last ``window`` queries of the squared mean query of each group.

    Args:
        query: [B, Hq, L, D].
        kv_heads: Hkv, a divisor of Hq.
        window: W; fewer queries than that are all used.

    Returns:
        [B, Hkv, D] float32. Its square root is the query norm n of the method.
    """
    grouped = query[:, :, -window:].float().unflatten(1, (kv_heads, -1)).mean(2)
    stats: Tensor = grouped.square().sum(2)
    return stats


def exponent(saliency: str) -> float:
    """p of the module's formulas."""
    return 0.5 if saliency == "squared" else 1.0


def floored(norms: Tensor) -> Tensor:
    """Norms [..., D] bounded from below so that dividing by them stays finite."""
    floor = (norms.mean(-1, keepdim=True) * _NORM_FLOOR).clamp(min=1e-12)
    return torch.maximum(norms, floor)


def prune(
    key: Tensor,
    select_norms: Tensor,
    recovery_norms: Tensor,
    kept_channels: int,
    recovery: str,
    saliency: str,
    quantized: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the channels of every key and pack them; of equally salient ones the first are kept.

    Args:
        key: [B, Hkv, S, D].
        select_norms: [B, Hkv, D] float32, norms that the saliency is measured with.
        recovery_norms: [B, Hkv, D] float32, norms that the recovery will divide by.
        kept_channels: T.
        quantized: store the kept channels as int8.

    Returns:
        ``kept``, ``bits`` and ``scale`` as in :mod:`..layout`.
    """
    power = exponent(saliency)
    magnitude = key.float().abs()
    salient = magnitude * floored(select_norms).pow(power).unsqueeze(2)  # sal^p, same order as sal
    kept, keep = select(key, salient, kept_channels)
    bits = torch.stack((pack_bits(keep), pack_bits(key < 0)), dim=-2)
    restored = (magnitude * floored(recovery_norms).pow(power).unsqueeze(2)).pow(1 / power)
    scale = _amplitude(restored, keep, recovery).pow(power)
    scale = scale.clamp(max=torch.finfo(key.dtype).max).to(key.dtype)
    if quantized:
        kept, step = quantize(kept)
        scale = torch.cat((scale, step), dim=-1)
    return kept, bits, scale


def select(rows: Tensor, salient: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` most salient channels of each row in channel order, and where they are."""
    ranked = salient.sort(dim=-1, descending=True, stable=True).indices
    chosen = ranked[..., :count].sort(dim=-1).values
    keep = torch.zeros_like(rows, dtype=torch.bool).scatter(-1, chosen, True)
    return rows.gather(-1, chosen), keep


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [..., T] and its step [..., 1] in the rows' dtype, so that rows = int8 * step."""
    step = (rows.float().abs().amax(-1, keepdim=True) / 127).to(rows.dtype)
    # Divided by the rounded step: its rounding is no error. A row of zeros has the step 0.
    levels = rows.float() / step.float().where(step > 0, 1.0)
    return levels.round().clamp(-127, 127).to(torch.int8), step


def dequantize(rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., T] in float32 and what is left of ``scale`` without the step of int8 rows."""
    if rows.dtype != torch.int8:
        return rows.float(), scale
    return rows.float() * scale[..., -1:].float(), scale[..., :-1]


def _amplitude(saliency_BHSD: Tensor, keep: Tensor, recovery: str) -> Tensor:
    """Mean, and for "gaussian" also the deviation, of pruned saliencies: [B, Hkv, S, 1 or 2]."""
    pruned = (~keep).sum(-1, keepdim=True).clamp(min=1)
    mean = saliency_BHSD.masked_fill(keep, 0).sum(-1, keepdim=True) / pruned
    if recovery != "gaussian":
        return mean
    spread = (saliency_BHSD - mean).masked_fill(keep, 0).square().sum(-1, keepdim=True) / pruned
    return torch.cat((mean, spread.sqrt()), dim=-1)


def recover(
    kept: Tensor, bits: Tensor, scale: Tensor, norms: Tensor, recovery: str, saliency: str
) -> Tensor:
    """Dense keys [B, Hkv, S, D] float32 of packed ones (see :mod:`..layout` for the shapes)."""
    head_dim = norms.shape[-1]
    keep, negative = unpack_bits(bits, head_dim).unbind(-2)
    channels, scale = dequantize(kept, scale)
    values = expand(channels, keep)
    if recovery == "none":
        return torch.where(keep, values, 0.0)
    power = exponent(saliency)
    weight = floored(norms).pow(-power).unsqueeze(2)
    amplitude = _drawn(scale.float(), keep.shape, recovery, power) * weight
    return torch.where(keep, values, torch.where(negative, -amplitude, amplitude))


def expand(channels: Tensor, keep: Tensor) -> Tensor:
    """Put kept channels [..., T] where ``keep`` [..., D] has them; other entries are arbitrary."""
    rank = (keep.long().cumsum(-1) - 1).clamp(min=0)
    return channels.gather(-1, rank)


def _drawn(scale: Tensor, shape: torch.Size, recovery: str, power: float) -> Tensor:
    """sal^p of the pruned channels: the mean itself, or a draw from the cached distribution."""
    mean_p = scale[..., :1]
    if recovery == "degenerate":
        return mean_p
    uniform = _uniform(shape[1], shape[2], shape[3], scale.device)
    if recovery == "exponential":
        return mean_p * (-uniform.log()).pow(power)
    normal = (2.0 * uniform - 1.0).erfinv() * 2.0**0.5
    mean, spread = scale.pow(1 / power).split(1, dim=-1)
    drawn: Tensor = (mean + spread * normal).clamp(min=0).pow(power)
    return drawn


def _uniform(heads: int, tokens: int, channels: int, device: torch.device) -> Tensor:
    """Numbers in (0, 1), [H, S, D], that depend on nothing but their position (the fixed seed).

    A counter-based hash (the 32-bit finalizer of MurmurHash3), so that a kernel can make the
    number of one channel without its neighbours and every step sees the same key.
    """
    head = torch.arange(heads, device=device).view(-1, 1, 1)
    token = torch.arange(tokens, device=device).view(1, -1, 1)
    channel = torch.arange(channels, device=device)
    low = 0xFFFFFFFF
    mixed = (head * 0x9E3779B1 + token * 0x85EBCA77 + channel * 0xC2B2AE3D) & low
    mixed = ((mixed ^ (mixed >> 16)) * 0x85EBCA6B) & low
    mixed = ((mixed ^ (mixed >> 13)) * 0xC2B2AE35) & low
    mixed = mixed ^ (mixed >> 16)
    return ((mixed >> 8).float() + 0.5) / 2.0**24
