"""Decoders without any library, each with attention and cache as people write them by hand.

All share one skeleton. How attention is written is the point, so each class spells its own out.
Those here append to a cache [B, H, S, D] and are meant to be rewritten, those in
``handwritten_caches`` keep it in other ways. A decoder made with ``twin=True`` computes the same
function by scaled_dot_product_attention, which the oracle of the method can replace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeyValue = tuple[Tensor, Tensor]
Compiled = Callable[..., Any]

VOCABULARY, BATCH, WIDTH, HEADS, DIM, LONGEST = 32, 3, 32, 4, 8, 64
SDPA = F.scaled_dot_product_attention


def causal(length: int, total: int) -> Tensor:
    """bool [L, S], True where the latest L queries may look."""
    return torch.ones(length, total, dtype=torch.bool).tril(total - length)


def hidden_bias(query: Tensor, key: Tensor, hidden: float = -math.inf) -> Tensor:
    """[L, S], 0 where a query [..., L, D] may look at a key [..., S, D], else ``hidden``."""
    seen = causal(query.shape[-2], key.shape[-2])
    return torch.zeros(seen.shape).masked_fill(~seen, hidden)


def alibi(length: int, total: int) -> Tensor:
    """[H, L, S], the distance of each key times a slope per head."""
    slopes = 2.0 ** -torch.arange(1, HEADS + 1)
    distance = torch.arange(total) - (torch.arange(length) + total - length)[:, None]
    return slopes[:, None, None] * distance


def rotated(states: Tensor, start: int) -> Tensor:
    """States [B, H, L, D] with the rotary embeddings of positions from ``start`` on."""
    inverse = 100.0 ** -(torch.arange(0, DIM, 2) / DIM)
    angles = torch.outer(torch.arange(start, start + states.shape[2]).float(), inverse)
    angles = torch.cat((angles, angles), dim=-1)
    first, second = states.chunk(2, dim=-1)
    return states * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()


def repeat_kv(states: Tensor, groups: int) -> Tensor:
    """[B, Hkv, S, D] to [B, Hkv * G, S, D]."""
    batch, heads, length, dim = states.shape
    states = states[:, :, None, :, :].expand(batch, heads, groups, length, dim)
    return states.reshape(batch, heads * groups, length, dim)


def split_heads(x: Tensor) -> Tensor:
    """[B, L, H * D] to [B, H, L, D]."""
    return x.view(*x.shape[:2], -1, DIM).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, L, D] to [B, L, H * D]."""
    return x.transpose(1, 2).contiguous().view(x.shape[0], x.shape[2], -1)


class Attention(nn.Module):
    """Four projections and a cache grown by ``cat``; ``attend`` is what the others write."""

    kv_heads = HEADS

    def __init__(self, twin: bool = False) -> None:
        super().__init__()
        self.twin = twin
        self.q_proj = nn.Linear(WIDTH, HEADS * DIM)
        self.k_proj = nn.Linear(WIDTH, self.kv_heads * DIM)
        self.v_proj = nn.Linear(WIDTH, self.kv_heads * DIM)
        self.o_proj = nn.Linear(HEADS * DIM, WIDTH)

    def forward(self, x: Tensor, past: KeyValue | None = None) -> tuple[Tensor, KeyValue]:
        q, k, v = self.project(x, 0 if past is None else self.length(past))
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        y = self.by_sdpa(q, k, v) if self.twin else self.attend(q, k, v)
        return self.o_proj(merge_heads(y)), (k, v)

    def project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [B, H, L, D] of tokens at the positions from ``start`` on."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return split_heads(q), split_heads(k), split_heads(v)

    def length(self, past: Any) -> int:
        """Number of cached tokens."""
        return past[0].shape[2]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def by_sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What ``attend`` computes."""
        return SDPA(q, k, v, hidden_bias(q, k), enable_gqa=True)


class NanoGpt(Attention):
    """One projection split by width, the causal mask in a buffer, -inf by ``masked_fill``."""

    def __init__(self, twin: bool = False) -> None:
        nn.Module.__init__(self)
        self.twin = twin
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)
        self.attn_dropout = nn.Dropout(0.1)
        mask = torch.tril(torch.ones(LONGEST, LONGEST)).view(1, 1, LONGEST, LONGEST)
        self.register_buffer("bias", mask, persistent=False)

    def forward(self, x: Tensor, past: KeyValue | None = None) -> tuple[Tensor, KeyValue]:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(WIDTH, dim=2)
        q = q.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        k = k.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        v = v.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        if past is not None:
            k = torch.cat([past[0], k], dim=-2)
            v = torch.cat([past[1], v], dim=-2)
        S = k.size(-2)
        if self.twin:
            y = SDPA(q, k, v, self.bias[:, :, S - T : S, :S].bool())
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, S - T : S, :S] == 0, float("-inf"))
            att = F.softmax(att, dim=-1)
            att = self.attn_dropout(att)
            y = att @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.c_proj(y), (k, v)


class Chunked(Attention):
    """One projection cut by ``chunk``; ``~mask`` filled with the smallest number."""

    def __init__(self, twin: bool = False) -> None:
        nn.Module.__init__(self)
        self.twin = twin
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(2, 3)) * DIM**-0.5
        mask = causal(q.shape[2], k.shape[2])[None, None]
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return torch.matmul(torch.softmax(scores, dim=-1), v)


class Unbound(Chunked):
    """[3, B, H, L, D] taken apart by ``unbind``; the scale folded into the queries."""

    def project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q * DIM**-0.5
        attn = q @ k.transpose(-2, -1)
        attn = attn + hidden_bias(q, k)
        return attn.softmax(dim=-1) @ v


class Einsum(Attention):
    """Both products by ``einsum`` over [B, H, L, D]; the mask by ``torch.where``."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        energy = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(DIM)
        mask = causal(q.shape[2], k.shape[2])
        energy = torch.where(mask, energy, torch.tensor(float("-inf")))
        return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(energy, dim=-1), v)


class EinsumTokensFirst(Attention):
    """Both products by ``einsum`` over [B, L, H, D], of a cache that is [B, H, S, D]."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * DIM**-0.5
        scores = scores.masked_fill(~causal(q.shape[1], k.shape[1]), -1e9)
        output = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        return output.transpose(1, 2)


class Bloom(Attention):
    """``baddbmm`` with ALiBi and ``bmm`` over [B * H, L, D], as BLOOM has them."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, dim = q.shape
        total = k.shape[2]
        query = q.reshape(batch * heads, length, dim)
        key = k.reshape(batch * heads, total, dim).transpose(-1, -2)
        bias = alibi(1, total).repeat(batch, 1, 1)  # [B * H, 1, S]
        scores = bias.baddbmm(batch1=query, batch2=key, beta=1.0, alpha=1 / math.sqrt(dim))
        scores = scores.view(batch, heads, length, total)
        scores = scores + hidden_bias(q, k, torch.finfo(q.dtype).min)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        weights = weights.view(batch * heads, length, total)
        output = torch.bmm(weights, v.reshape(batch * heads, total, dim))
        return output.view(batch, heads, length, dim)

    def by_sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return SDPA(q, k, v, alibi(1, k.shape[2]) + hidden_bias(q, k))


class FlatBmm(Attention):
    """``bmm`` over heads merged into the batch by ``flatten``, a 3-D softmax, ``unflatten``."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = q.shape[0]
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        scores = torch.bmm(q / math.sqrt(DIM), k.transpose(1, 2)) + hidden_bias(q, k)
        return torch.bmm(F.softmax(scores, dim=2), v).unflatten(0, (batch, HEADS))


class Llama(Attention):
    """Rotary positions before the cache, repeated heads, softmax in float32 and back."""

    kv_heads = 2

    def project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, start)
        return rotated(q, start), rotated(k, start), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = HEADS // self.kv_heads
        k, v = repeat_kv(k, groups), repeat_kv(v, groups)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(DIM)
        scores = scores + hidden_bias(q, k, torch.finfo(q.dtype).min)
        scores = F.softmax(scores.float(), dim=-1).type_as(q)
        return torch.matmul(scores, v)


class Grouped(Attention):
    """Grouped heads as a product of five dimensions: [B, Hkv, G, L, D] @ [B, Hkv, 1, D, S]."""

    kv_heads = 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, _, length, dim = q.shape
        q = q.view(batch, self.kv_heads, -1, length, dim)
        scores = (q @ k.unsqueeze(2).transpose(-1, -2)) / math.sqrt(dim)
        scores = scores.masked_fill(~causal(length, k.shape[2]), -torch.inf)
        output = scores.softmax(-1) @ v.unsqueeze(2)
        return output.reshape(batch, HEADS, length, dim)


class GroupedEinsum(Grouped):
    """Grouped heads by einsum, the keys without an extra dimension: "bhgqd,bhkd->bhgqk"."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.unflatten(1, (self.kv_heads, -1))
        scores = torch.einsum("bhgqd,bhkd->bhgqk", q, k) * DIM**-0.5 + hidden_bias(q, k)
        output = torch.einsum("bhgqk,bhkd->bhgqd", scores.softmax(-1), v)
        return output.flatten(1, 2)


class MaskFirst(Attention):
    """The mask is added before the scale."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) + hidden_bias(q, k, -1e9)
        return F.softmax(scores / math.sqrt(DIM), dim=-1) @ v


class Subtracted(Attention):
    """``scores - (1 - mask) * 1e9``, as TensorFlow's tutorials have it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = causal(q.shape[2], k.shape[2]).to(q.dtype)
        scores = torch.matmul(q, k.mT) / DIM**0.5 - (1.0 - mask) * 1e9
        return torch.matmul(F.softmax(scores, -1), v)


class Multiplied(Attention):
    """Hidden scores are multiplied by 0 before 1e10 is taken off, as in the first GPT-2 code."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(DIM)
        b = causal(q.shape[2], k.shape[2]).to(w.dtype)
        return torch.matmul(F.softmax(w * b - 1e10 * (1 - b), dim=-1), v)


class ManyBiases(Attention):
    """ALiBi, a learned bias per distance and the causal mask, added one after another."""

    def __init__(self, twin: bool = False) -> None:
        super().__init__(twin)
        self.relative = nn.Embedding(LONGEST, HEADS)

    def biases(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        length, total = q.shape[2], k.shape[2]
        distance = (torch.arange(length) + total - length)[:, None] - torch.arange(total)
        learned = self.relative(distance.clamp(0, LONGEST - 1)).permute(2, 0, 1)[None]
        return learned, alibi(length, total)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        learned, slopes = self.biases(q, k)
        scores = q @ k.transpose(2, 3) * DIM**-0.5
        scores += learned + slopes
        scores += hidden_bias(q, k)
        return F.softmax(scores, dim=-1) @ v

    def by_sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        learned, slopes = self.biases(q, k)
        return SDPA(q, k, v, learned + slopes + hidden_bias(q, k))


class TensorScale(Attention):
    """The scale is a tensor in a buffer, as in many translation tutorials."""

    def __init__(self, twin: bool = False) -> None:
        super().__init__(twin)
        self.register_buffer("scale", torch.sqrt(torch.FloatTensor([DIM])), persistent=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        energy = torch.matmul(q, k.permute(0, 1, 3, 2)) / self.scale
        energy = energy.masked_fill(causal(q.shape[2], k.shape[2]) == 0, -1e10)
        return torch.matmul(torch.softmax(energy, dim=-1), v)


class Temperature(Attention):
    """A learned temperature per head, applied to the scores."""

    def __init__(self, twin: bool = False) -> None:
        super().__init__(twin)
        self.temperature = nn.Parameter(torch.linspace(0.2, 0.6, HEADS).view(HEADS, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attn = (q @ k.transpose(-2, -1)) * self.temperature
        attn = attn.masked_fill(~causal(q.shape[2], k.shape[2]), -torch.finfo(attn.dtype).max)
        return attn.softmax(dim=-1) @ v

    def by_sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return SDPA(q * self.temperature, k, v, hidden_bias(q, k), scale=1.0)


class Softcap(Attention):
    """``cap * tanh(scores / cap)`` before the mask, as Gemma 2 has it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(2, 3)) * DIM**-0.5
        scores = scores / 2.0
        scores = torch.tanh(scores)
        scores = scores * 2.0
        scores = scores + hidden_bias(q, k, -1e9)
        return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


class Sinks(Attention):
    """A learned logit per head is one more column of the softmax, and dropped behind it."""

    def __init__(self, twin: bool = False) -> None:
        super().__init__(twin)
        self.sinks = nn.Parameter(torch.linspace(-1.0, 2.0, HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(2, 3)) * DIM**-0.5 + hidden_bias(q, k)
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
        scores = self.shifted(torch.cat([scores, sinks], dim=-1))
        weights = F.softmax(scores, dim=-1)[..., :-1]
        return torch.matmul(weights, v)

    def shifted(self, scores: Tensor) -> Tensor:
        return scores


class StableSinks(Sinks):
    """Sinks with the largest score taken off first, as gpt-oss has it."""

    def shifted(self, scores: Tensor) -> Tensor:
        return scores - scores.max(dim=-1, keepdim=True).values


class Core(nn.Module):
    """The attention proper, without weights."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        return torch.matmul(self.dropout(self.softmax(scores)), v)


class Submodule(Attention):
    """Calls the attention as a module, which has a dropout and ``nn.Softmax`` of its own."""

    def __init__(self, twin: bool = False) -> None:
        super().__init__(twin)
        self.core = Core()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.core(q, k, v, causal(q.shape[2], k.shape[2]))


class LayerCache:
    """Keys and values of one layer, which ``update`` extends and hands out."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def update(self, k: Tensor, v: Tensor) -> KeyValue:
        self.k = k if self.k is None else torch.cat([self.k, k], dim=2)
        self.v = v if self.v is None else torch.cat([self.v, v], dim=2)
        return self.k, self.v


class CacheObject(Attention):
    """The cache is an object of the user's own that is changed in place."""

    def forward(self, x: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        past = LayerCache() if past is None else past
        q, k, v = self.project(x, 0)
        k, v = past.update(k, v)
        y = self.by_sdpa(q, k, v) if self.twin else self.attend(q, k, v)
        return self.o_proj(merge_heads(y)), past

    def length(self, past: Any) -> int:
        return past.k.shape[2]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(v.size(-1))
        w = torch.where(causal(q.shape[2], k.shape[2]), w, torch.finfo(w.dtype).min)
        return torch.matmul(nn.Softmax(dim=-1)(w), v)


class Blocks(nn.Module):
    """Embedding, pre-norm attention and MLP blocks, logits."""

    def __init__(self, layers: int, *attentions: nn.Module) -> None:
        super().__init__()
        self.layers = layers
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(LONGEST, WIDTH)
        self.attentions = nn.ModuleList(attentions)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(layers))
        self.mlps = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def embed(self, tokens: Tensor, start: int) -> Tensor:
        positions = torch.arange(start, start + tokens.shape[1])
        return self.tokens(tokens) + self.positions(positions)

    def feed_forward(self, x: Tensor, layer: int) -> Tensor:
        return x + F.gelu(self.mlps[layer](x))


class Decoder(Blocks):
    """Hands a list with a cache per layer in and out."""

    def __init__(self, attention: type[Attention], layers: int, twin: bool = False) -> None:
        super().__init__(layers, *(attention(twin) for _ in range(layers)))

    def forward(self, tokens: Tensor, past: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
        start = 0 if past is None else self.attentions[0].length(past[0])
        x, present = self.embed(tokens, start), []
        for layer, attention in enumerate(self.attentions):
            y, cache = attention(self.norms[layer](x), None if past is None else past[layer])
            present.append(cache)
            x = self.feed_forward(x + y, layer)
        return self.head(x), present

    def feed(self, chunks: Sequence[Tensor], call: Compiled | None = None) -> tuple[Tensor, Any]:
        """Logits of all tokens of the chunks [B, L], and the cache behind them.

        Args:
            chunks: token ids, the prompt first.
            call: the compiled model.
        """
        call = self if call is None else call
        logits, past = [], None
        with torch.no_grad():
            for tokens in chunks:
                step, past = call(tokens, past)
                logits.append(step)
        return torch.cat(logits, dim=1), past


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A helper as in "the annotated transformer"."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    scores = scores.masked_fill(mask == 0, float("-inf"))
    return scores.softmax(dim=-1) @ v


class FunctionDecoder(Blocks):
    """No attention modules: stacked weights, a loop over layers, a helper, a cache in a dict."""

    def __init__(self, layers: int, twin: bool = False) -> None:
        super().__init__(layers)
        self.twin = twin
        self.w_qkv = nn.Parameter(torch.randn(layers, 3, WIDTH, WIDTH) * WIDTH**-0.5)
        self.w_out = nn.Parameter(torch.randn(layers, WIDTH, WIDTH) * WIDTH**-0.5)

    def forward(self, tokens: Tensor, cache: dict[str, Tensor]) -> Tensor:
        start = cache["k0"].shape[2] if cache else 0
        x = self.embed(tokens, start)
        mask = causal(tokens.shape[1], start + tokens.shape[1])
        for i in range(self.layers):
            h = self.norms[i](x)
            q, k, v = (split_heads(h @ weight) for weight in self.w_qkv[i])
            if f"k{i}" in cache:
                k = torch.cat((cache[f"k{i}"], k), dim=2)
                v = torch.cat((cache[f"v{i}"], v), dim=2)
            cache[f"k{i}"], cache[f"v{i}"] = k, v
            y = SDPA(q, k, v, mask) if self.twin else attention(q, k, v, mask)
            x = self.feed_forward(x + merge_heads(y) @ self.w_out[i], i)
        return self.head(x)

    def feed(self, chunks: Sequence[Tensor], call: Compiled | None = None) -> tuple[Tensor, Any]:
        """As ``Decoder.feed``."""
        call = self if call is None else call
        cache: dict[str, Tensor] = {}
        with torch.no_grad():
            logits = [call(tokens, cache) for tokens in chunks]
        states = [(cache[f"k{i}"], cache[f"v{i}"]) for i in range(self.layers)]
        return torch.cat(logits, dim=1), states


APPENDED: dict[str, type[Attention]] = {
    "nanogpt": NanoGpt,
    "chunked": Chunked,
    "unbound": Unbound,
    "einsum": Einsum,
    "einsum_tokens_first": EinsumTokensFirst,
    "bloom": Bloom,
    "flat_bmm": FlatBmm,
    "llama": Llama,
    "grouped": Grouped,
    "grouped_einsum": GroupedEinsum,
    "mask_first": MaskFirst,
    "subtracted": Subtracted,
    "multiplied": Multiplied,
    "many_biases": ManyBiases,
    "tensor_scale": TensorScale,
    "temperature": Temperature,
    "softcap": Softcap,
    "sinks": Sinks,
    "stable_sinks": StableSinks,
    "submodule": Submodule,
    "cache_object": CacheObject,
}
"""Attentions over a cache [B, Hkv, S, D] that grows by ``cat``."""

WITHOUT_TWIN = {"softcap", "sinks", "stable_sinks"}
"""What scaled_dot_product_attention cannot say."""
