"""Attention over dense and over pruned keys, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from .prune import recover
from .values import unpack_values


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    causal_offset: int | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """softmax(softcap(scale * q k^T) + mask) v with grouped heads.

    Args:
        query: [B, Hq, L, D].
        key: [B, Hkv, S, D], Hkv a divisor of Hq.
        value: [B, Hkv, S, Dv].
        attn_mask: broadcast to [B, Hq, L, S]; bool (True: visible) or additive.
        causal_offset: query i sees keys j <= i + causal_offset; None sees all.
        softcap: scores become softcap * tanh(scores / softcap); 0 leaves them.
        sinks: [Hq], a logit per head that takes part in the softmax and has no value.

    Returns:
        The output [B, Hq, L, Dv] and the log-sum-exp [B, Hq, L], both float32. A query that sees
        no key has output 0 and log-sum-exp -inf.
    """
    kv_heads, length, tokens = key.shape[1], query.shape[2], key.shape[2]
    grouped = query.float().unflatten(1, (kv_heads, -1))  # [B, Hkv, G, L, D]
    scores = (grouped @ key.float().unsqueeze(2).mT).flatten(1, 2) * scale  # [B, Hq, L, S]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if causal_offset is not None:
        latest = torch.arange(length, device=query.device).unsqueeze(1) + causal_offset
        hidden = torch.arange(tokens, device=query.device) > latest
        scores = scores.masked_fill(hidden, -torch.inf)
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if is_bool else scores + attn_mask
    lse = scores.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float().view(1, -1, 1).expand_as(lse))
    weights = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0).unsqueeze(-1))
    output = weights.unflatten(1, (kv_heads, -1)) @ value.float().unsqueeze(2)
    return output.flatten(1, 2), lse


def logical_keys(
    kept: Tensor,
    bits: Tensor,
    scale: Tensor,
    norms: Tensor,
    packed_length: Tensor,
    tail: Tensor,
    length: int,
    sink_tokens: int,
    recovery: str,
    saliency: str,
) -> Tensor:
    """The ``length`` keys [B, Hkv, S, D] float32 in order: sinks | packed | rest of the tail.

    ``kept``, ``bits``, ``scale`` and ``tail`` may have more rows than are filled; rows past
    ``packed_length`` (int64 scalar) and past ``length - packed_length`` are never read.
    """
    packed = int(packed_length)
    recovered = recover(
        kept[:, :, :packed], bits[:, :, :packed], scale[:, :, :packed], norms, recovery, saliency
    )
    dense = tail[:, :, : length - packed].float()
    return torch.cat((dense[:, :, :sink_tokens], recovered, dense[:, :, sink_tokens:]), dim=2)


def logical_values(
    rows: Tensor, bits: Tensor | None, scale: Tensor | None, head_dim: int, length: int
) -> Tensor:
    """The first ``length`` values [B, Hkv, S, Dv] in float32; rows past them are never read."""
    bits, scale = (None if t is None else t[:, :, :length] for t in (bits, scale))
    return unpack_values(rows[:, :, :length], bits, scale, head_dim)
