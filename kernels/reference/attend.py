"""Dense attention in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


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
        The output [B, Hq, L, Dv] and the log-sum-exp [B, Hq, L], both float32. A fully masked
        query has output 0 and log-sum-exp -inf.
    """
    kv_heads, length, tokens = key.shape[1], query.shape[2], key.shape[2]
    grouped = query.float().unflatten(1, (kv_heads, -1))  # [B, Hkv, G, L, D]
    scores = (grouped @ key.float().unsqueeze(2).mT).flatten(1, 2) * scale  # [B, Hq, L, S]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if causal_offset is not None:
        # Beyond the first query or the last key it says the same, and int64 has an end.
        causal_offset = max(-length, min(causal_offset, tokens))
        latest = torch.arange(length, device=query.device).unsqueeze(1) + causal_offset
        hidden = torch.arange(tokens, device=query.device) > latest
        scores = scores.masked_fill(hidden, -torch.inf)
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if is_bool else scores + attn_mask
    # Not by exp(scores - log-sum-exp): beside a large negative maximum that logarithm is lost.
    top = (
        scores.amax(-1, keepdim=True)
        if tokens
        else scores.new_full((*scores.shape[:3], 1), -torch.inf)
    )
    if sinks is not None:
        top = torch.maximum(top, sinks.float().view(1, -1, 1, 1))
    base = top.masked_fill(top.isneginf(), 0)
    weights = torch.exp(scores - base)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks.float().view(1, -1, 1, 1) - base)
    lse = (base + total.log()).squeeze(-1)
    weights = weights / total.masked_fill(total == 0, 1)
    output = weights.unflatten(1, (kv_heads, -1)) @ value.float().unsqueeze(2)
    return output.flatten(1, 2), lse
