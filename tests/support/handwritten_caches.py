"""Decoders written by hand whose cache is something else than [B, H, S, D] handed in and out.

Those that keep such a cache in the module are meant to be rewritten, the others to be refused with
a reason, and all of them never to be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from handwritten import (
    APPENDED,
    BATCH,
    DIM,
    HEADS,
    LONGEST,
    SDPA,
    Attention,
    Blocks,
    Compiled,
    Decoder,
    FunctionDecoder,
    KeyValue,
    causal,
    hidden_bias,
    merge_heads,
    rotated,
)  # fmt: skip
from torch import Tensor, nn


class GptFast(Attention):
    """Preallocated [B, Hkv, max, D], ``k_cache[:, :, input_pos] = k``, SDPA over all of it."""

    kv_heads = 2

    def reset(self) -> None:
        for name in ("k_cache", "v_cache"):
            empty = torch.zeros(BATCH, self.kv_heads, LONGEST, DIM)
            self.register_buffer(name, empty, persistent=False)

    def forward(self, x: Tensor, input_pos: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = self.project(x, 0)
        k, v = self.write(input_pos, k, v)
        k = k.repeat_interleave(HEADS // self.kv_heads, dim=1)
        v = v.repeat_interleave(HEADS // self.kv_heads, dim=1)
        return self.o_proj(merge_heads(self.over_all(q, k, v, mask)))

    def write(self, input_pos: Tensor, k: Tensor, v: Tensor) -> KeyValue:
        k_out, v_out = self.k_cache, self.v_cache
        k_out[:, :, input_pos] = k
        v_out[:, :, input_pos] = v
        return k_out, v_out

    def over_all(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return SDPA(q, k, v, attn_mask=mask, dropout_p=0.0)


class LitGpt(GptFast):
    """``index_copy_`` into the buffers, products written out."""

    def write(self, input_pos: Tensor, k: Tensor, v: Tensor) -> KeyValue:
        return self.k_cache.index_copy_(2, input_pos, k), self.v_cache.index_copy_(2, input_pos, v)

    def over_all(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = (q @ k.mT) * (1.0 / math.sqrt(DIM))
        scores = scores.masked_fill(~mask, torch.finfo(q.dtype).min)
        return F.softmax(scores, dim=-1, dtype=torch.float).to(q.dtype) @ v


class KeepingDecoder(Blocks):
    """The attentions keep their caches."""

    def places(self, start: int, end: int) -> tuple[Any, ...]:
        """What a forward is told of where its tokens are."""
        return ()

    def feed(self, chunks: Sequence[Tensor], call: Compiled | None = None) -> tuple[Tensor, Any]:
        """As ``handwritten.Decoder.feed``."""
        call = self if call is None else call
        for attention in self.attentions:
            attention.reset()
        logits, start = [], 0
        with torch.no_grad():
            for tokens in chunks:
                end = start + tokens.shape[1]
                logits.append(call(tokens, *self.places(start, end)))
                start = end
        return torch.cat(logits, dim=1), [(a.k_cache, a.v_cache) for a in self.attentions]


class PositionDecoder(KeepingDecoder):
    """Caches in the attentions' buffers, written at ``input_pos``; the mask is a buffer too."""

    def __init__(self, attention: type[GptFast], layers: int, twin: bool = False) -> None:
        super().__init__(layers, *(attention(twin) for _ in range(layers)))
        mask = torch.tril(torch.ones(LONGEST, LONGEST, dtype=torch.bool))
        self.register_buffer("causal_mask", mask, persistent=False)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        mask = self.causal_mask[None, None, input_pos]
        x = self.tokens(tokens) + self.positions(input_pos)
        for layer, attention in enumerate(self.attentions):
            x = self.feed_forward(x + attention(self.norms[layer](x), input_pos, mask), layer)
        return self.head(x)

    def places(self, start: int, end: int) -> tuple[Any, ...]:
        return (torch.arange(start, end),)


class SliceWrites(Attention):
    """Preallocated [B, max, H, D] written at a slice from ``start_pos``, as Llama's first code."""

    def reset(self) -> None:
        self.k_cache = torch.zeros(BATCH, LONGEST, HEADS, DIM)
        self.v_cache = torch.zeros(BATCH, LONGEST, HEADS, DIM)

    def forward(self, x: Tensor, start_pos: int) -> Tensor:  # type: ignore[override]
        bsz, seqlen, _ = x.shape
        xq = self.q_proj(x).view(bsz, seqlen, HEADS, DIM)
        xk = self.k_proj(x).view(bsz, seqlen, HEADS, DIM)
        xv = self.v_proj(x).view(bsz, seqlen, HEADS, DIM)
        self.k_cache[:bsz, start_pos : start_pos + seqlen] = xk
        self.v_cache[:bsz, start_pos : start_pos + seqlen] = xv
        keys = self.k_cache[:bsz, : start_pos + seqlen].transpose(1, 2)
        values = self.v_cache[:bsz, : start_pos + seqlen].transpose(1, 2)
        xq = xq.transpose(1, 2)
        if self.twin:
            return self.o_proj(merge_heads(self.by_sdpa(xq, keys, values)))
        scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(DIM) + hidden_bias(xq, keys)
        scores = F.softmax(scores.float(), dim=-1).type_as(xq)
        return self.o_proj(merge_heads(torch.matmul(scores, values)))


class SliceDecoder(KeepingDecoder):
    """Takes the number of tokens before these as an int; the caches are attributes."""

    def __init__(self, layers: int, twin: bool = False) -> None:
        super().__init__(layers, *(SliceWrites(twin) for _ in range(layers)))

    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        x = self.embed(tokens, start_pos)
        for layer, attention in enumerate(self.attentions):
            x = self.feed_forward(x + attention(self.norms[layer](x), start_pos), layer)
        return self.head(x)

    def places(self, start: int, end: int) -> tuple[Any, ...]:
        return (start,)


class InAttribute(Attention):
    """The attention keeps its own cache: ``self.k_cache = torch.cat(...)``."""

    def reset(self) -> None:
        self.k_cache: Tensor | None = None
        self.v_cache: Tensor | None = None

    def cached(self) -> int:
        return 0 if self.k_cache is None else self.k_cache.shape[2]

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = self.project(x, 0)
        if self.k_cache is not None:
            k = torch.cat([self.k_cache, k], dim=2)
            v = torch.cat([self.v_cache, v], dim=2)
        self.k_cache, self.v_cache = k, v
        scores = q @ k.transpose(2, 3) / math.sqrt(DIM) + hidden_bias(q, k)
        y = self.by_sdpa(q, k, v) if self.twin else scores.softmax(dim=-1) @ v
        return self.o_proj(merge_heads(y))


class InBuffer(InAttribute):
    """The same in registered buffers that start empty."""

    def reset(self) -> None:
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(BATCH, HEADS, 0, DIM), persistent=False)


class StatefulDecoder(KeepingDecoder):
    """Takes tokens alone: the caches live in the attentions."""

    def __init__(self, attention: type[InAttribute], layers: int, twin: bool = False) -> None:
        super().__init__(layers, *(attention(twin) for _ in range(layers)))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens, self.attentions[0].cached())
        for layer, attention in enumerate(self.attentions):
            x = self.feed_forward(x + attention(self.norms[layer](x)), layer)
        return self.head(x)


class TokensFirst(Attention):
    """The cache is [B, S, H, D], grown along dimension 1 and transposed for the products."""

    def forward(self, x: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        q, k, v = (
            p(x).unflatten(-1, (HEADS, DIM)) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past is not None:
            k, v = torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1)
        y = self.over_by_sdpa(q, k, v) if self.twin else self.over(q, k, v)
        return self.o_proj(y.flatten(2)), (k, v)

    def length(self, past: Any) -> int:
        return past[0].shape[1]

    def over_by_sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.by_sdpa(*(rows.transpose(1, 2) for rows in (q, k, v))).transpose(1, 2)

    def over(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        scores = q @ k.transpose(-2, -1) / math.sqrt(DIM) + hidden_bias(q, k)
        return (scores.softmax(dim=-1) @ v).transpose(1, 2)


class EinsumOverTokensFirst(TokensFirst):
    """ "bqhd,bkhd->bhqk" straight on the cache [B, S, H, D]."""

    def over(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", q * DIM**-0.5, k)
        scores = scores.masked_fill(~causal(q.shape[1], k.shape[1]), -torch.inf)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v)


class LateRotary(Attention):
    """Keys are cached before their rotary positions, which every step applies to all of them."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = rotated(q, k.shape[2] - q.shape[2]), rotated(k, 0)
        return (q @ k.mT / math.sqrt(DIM) + hidden_bias(q, k)).softmax(dim=-1) @ v


class Stacked(Attention):
    """Keys and values are one tensor [2, B, H, S, D], as in the first GPT-2 code."""

    def forward(self, x: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        q, k, v = self.project(x, 0)
        if past is not None:
            past_k, past_v = past.unbind(dim=0)
            k, v = torch.cat((past_k, k), dim=-2), torch.cat((past_v, v), dim=-2)
        present = torch.stack((k, v))
        w = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(DIM) + hidden_bias(q, k, -1e10)
        return self.o_proj(merge_heads(torch.matmul(F.softmax(w, dim=-1), v))), present

    def length(self, past: Any) -> int:
        return past.shape[3]


class KeysTransposed(Attention):
    """Keys are cached as the product takes them, [B, H, D, S], and grow at the last dimension."""

    def forward(self, x: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        q, k, v = self.project(x, 0)
        k = k.transpose(2, 3)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=-1), torch.cat((past[1], v), dim=-2)
        w = torch.matmul(q, k) / math.sqrt(DIM) + hidden_bias(q, v)
        return self.o_proj(merge_heads(torch.matmul(w.softmax(dim=-1), v))), (k, v)

    def length(self, past: Any) -> int:
        return past[0].shape[3]


class MultiQuery(Attention):
    """One key head for all queries, cached as [B, S, D] without a dimension for heads."""

    kv_heads = 1

    def forward(self, x: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        q, k, v = self.q_proj(x).unflatten(-1, (HEADS, DIM)), self.k_proj(x), self.v_proj(x)
        q = q.transpose(1, 2) * DIM**-0.5
        if past is not None:
            k, v = torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1)
        y = self.over_by_sdpa(q, k, v) if self.twin else self.over(q, k, v)
        return self.o_proj(merge_heads(y)), (k, v)

    def over(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sim = torch.einsum("bhid,bjd->bhij", q, k)
        sim = sim.masked_fill(~causal(q.shape[2], k.shape[1]), -torch.finfo(sim.dtype).max)
        return torch.einsum("bhij,bjd->bhid", sim.softmax(dim=-1), v)

    def over_by_sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.by_sdpa(q * DIM**0.5, k.unsqueeze(1), v.unsqueeze(1))

    def length(self, past: Any) -> int:
        return past[0].shape[1]


class HeadsLate(Attention):
    """What the projections give is cached, [B, S, Hkv * D], and split into heads after that."""

    kv_heads = 2

    def forward(self, x: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if past is not None:
            k, v = (
                torch.cat((old, new), dim=1).detach() for old, new in zip(past, (k, v), strict=True)
            )
        y = self.by_sdpa(
            *(rows.view(*rows.shape[:2], -1, DIM).permute(0, 2, 1, 3) for rows in (q, k, v))
        )
        return self.o_proj(merge_heads(y)), (k, v)

    def length(self, past: Any) -> int:
        return past[0].shape[1]


class KeysMerged(HeadsLate):
    """The keys are cached as [B, S, Hkv * D], the values as [B, S, Hkv, D]."""

    def forward(self, x: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        q, _, v = self.project(x, 0)
        k, v = self.k_proj(x), v.transpose(1, 2)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1)
        y = self.by_sdpa(q, k.unflatten(2, (-1, DIM)).transpose(1, 2), v.transpose(1, 2))
        return self.o_proj(merge_heads(y)), (k, v)


class ChannelsFirst(Attention):
    """[B, Hkv * D, S], as a convolution of width 1 gives it."""

    kv_heads = 2

    def forward(self, x: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        q = self.project(x, 0)[0]
        k, v = self.k_proj(x).transpose(1, 2), self.v_proj(x).transpose(1, 2)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        y = self.by_sdpa(q, *(rows.unflatten(1, (-1, DIM)).transpose(2, 3) for rows in (k, v)))
        return self.o_proj(merge_heads(y)), (k, v)


class FlatCache(Attention):
    """The cache is [B * H, S, D], as ``baddbmm`` and ``bmm`` take it."""

    def forward(self, x: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        q, k, v = (states.flatten(0, 1) for states in self.project(x, 0))
        if past is not None:
            k, v = torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1)
        mask = hidden_bias(q, k, -1e9).expand(q.shape[0], -1, -1)
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=DIM**-0.5)
        y = torch.bmm(scores.softmax(dim=-1), v).unflatten(0, (-1, HEADS))
        return self.o_proj(merge_heads(y)), (k, v)

    def length(self, past: Any) -> int:
        return past[0].shape[1]


DECODERS: dict[str, Callable[..., Any]] = {
    **{name: partial(Decoder, attention) for name, attention in APPENDED.items()},
    "function": FunctionDecoder,
    "in_attribute": partial(StatefulDecoder, InAttribute),
    "in_buffer": partial(StatefulDecoder, InBuffer),
    "gpt_fast": partial(PositionDecoder, GptFast),
    "litgpt": partial(PositionDecoder, LitGpt),
    "slice_writes": SliceDecoder,
    "tokens_first": partial(Decoder, TokensFirst),
    "einsum_over_tokens_first": partial(Decoder, EinsumOverTokensFirst),
    "late_rotary": partial(Decoder, LateRotary),
    "stacked": partial(Decoder, Stacked),
    "keys_transposed": partial(Decoder, KeysTransposed),
    "multi_query": partial(Decoder, MultiQuery),
    "heads_late": partial(Decoder, HeadsLate),
    "keys_merged": partial(Decoder, KeysMerged),
    "channels_first": partial(Decoder, ChannelsFirst),
    "flat_cache": partial(Decoder, FlatCache),
}


def handwritten(name: str, layers: int = 1, twin: bool = False) -> Any:
    """A decoder by its name, random and without gradients; the same weights at every call."""
    torch.manual_seed(5)
    model = DECODERS[name](layers=layers, twin=twin).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight *= 2  # as torch initializes them, attention would be all but uniform
    return model
