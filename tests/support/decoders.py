"""Tiny hand-written decoders, one for each way to write attention over a tuple cache.

``model(tokens, past)`` returns logits and ``present``, a tuple of (key, value) per layer; ``past``
is such a tuple or None.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeyValue = tuple[Tensor, Tensor]
Past = tuple[KeyValue, ...]

VOCABULARY = 32


def expanded(states: Tensor, groups: int) -> Tensor:
    """[B, Hkv, S, D] to [B, Hkv * G, S, D], by expand and reshape."""
    batch, heads, length, dim = states.shape
    states = states[:, :, None].expand(batch, heads, groups, length, dim)
    return states.reshape(batch, heads * groups, length, dim)


def causal_mask(query: Tensor, key: Tensor) -> Tensor:
    """bool [L, S], True where the latest L queries may look."""
    length, total = query.shape[2], key.shape[2]
    latest = torch.arange(length).unsqueeze(1) + (total - length)
    return torch.arange(total) <= latest


class SdpaCausal(nn.Module):
    """SDPA, is_causal for a prompt and no mask for one token; the first tokens are the cache."""

    def __init__(self, width: int = 32, query_heads: int = 4, kv_heads: int = 2, dim: int = 8):
        super().__init__()
        self.heads, self.kv_heads, self.dim = query_heads, kv_heads, dim
        self.query = nn.Linear(width, query_heads * dim)
        self.key = nn.Linear(width, kv_heads * dim)
        self.value = nn.Linear(width, kv_heads * dim)
        self.out = nn.Linear(query_heads * dim, width)

    def forward(self, x_BLE: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        query, key, value = self.project(x_BLE)
        present = self.append(past, key, value)
        return self.finish(self.attend(query, *present, is_prompt=past is None)), present

    def project(self, x_BLE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query = self.query(x_BLE).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key = self.key(x_BLE).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        value = self.value(x_BLE).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        return query, key, value

    def finish(self, output_BHLD: Tensor) -> Tensor:
        return self.out(output_BHLD.transpose(1, 2).flatten(2))

    def append(self, past: KeyValue | None, key: Tensor, value: Tensor) -> KeyValue:
        if past is None:
            return key, value
        return torch.cat((past[0], key), dim=2), torch.cat((past[1], value), dim=2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, is_prompt: bool) -> Tensor:
        groups = self.heads // self.kv_heads
        key, value = expanded(key, groups), expanded(value, groups)
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_prompt)


class Manual(SdpaCausal):
    """Products and softmax written out: additive causal mask, heads by repeat_interleave."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, is_prompt: bool) -> Tensor:
        groups = self.heads // self.kv_heads
        hidden = ~causal_mask(query, key)
        mask = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill(hidden, -math.inf)
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(2, 3) / math.sqrt(self.dim)
        weights = F.softmax(scores + mask, dim=-1, dtype=torch.float32)
        return weights.to(query.dtype) @ value


class SdpaMasked(SdpaCausal):
    """SDPA with enable_gqa and an explicit bool mask: also right for several tokens with a past."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, is_prompt: bool) -> Tensor:
        mask = causal_mask(query, key)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


class EmptyFirst(SdpaMasked):
    """The first append is a ``cat`` with an empty tensor."""

    def append(self, past: KeyValue | None, key: Tensor, value: Tensor) -> KeyValue:
        past = past or (torch.tensor([], dtype=key.dtype), torch.tensor([], dtype=key.dtype))
        return torch.cat([past[0], key], dim=-2), torch.cat([past[1], value], dim=-2)


ATTENTIONS: dict[str, type[SdpaCausal]] = {
    "sdpa_causal": SdpaCausal,
    "manual": Manual,
    "sdpa_masked": SdpaMasked,
    "empty_first": EmptyFirst,
}
"""What has to be rewritten."""


class Sliding(SdpaMasked):
    """Keeps the last eight tokens, and crops behind the attention."""

    def forward(self, x_BLE: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        output, (key, value) = super().forward(x_BLE, past)
        return output, (key[:, :, -8:], value[:, :, -8:])


class TokensFirst(SdpaMasked):
    """The cache is [B, S, H, D], transposed where the queries meet it."""

    def append(self, past: KeyValue | None, key: Tensor, value: Tensor) -> KeyValue:
        key, value = key.transpose(1, 2).contiguous(), value.transpose(1, 2).contiguous()
        if past is None:
            return key, value
        return torch.cat((past[0], key), dim=1), torch.cat((past[1], value), dim=1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, is_prompt: bool) -> Tensor:
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        return super().attend(query, key, value, is_prompt=is_prompt)


class ScaledLate(SdpaMasked):
    """Keys are cached before the last thing is done to them, as with late rotary positions."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, is_prompt: bool) -> Tensor:
        return super().attend(query, key * 1.5, value, is_prompt=is_prompt)


class KeyNorms(SdpaMasked):
    """Something besides the attention reads the cached keys."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, is_prompt: bool) -> Tensor:
        output = super().attend(query, key, value, is_prompt=is_prompt)
        return output + key.norm(dim=-1).mean() * 0.01


class PastReader(SdpaMasked):
    """Something reads the cache as it was before the step."""

    def append(self, past: KeyValue | None, key: Tensor, value: Tensor) -> KeyValue:
        if past is not None:
            value = value + past[0].mean() * 0.1
        return super().append(past, key, value)


class OneTensor(SdpaMasked):
    """Keys serve as values too."""

    def append(self, past: KeyValue | None, key: Tensor, value: Tensor) -> KeyValue:
        key = key + value if past is None else torch.cat((past[0], key + value), dim=2)
        return key, key


class Concatenated(SdpaMasked):
    """Appends with an alias of ``cat``."""

    def append(self, past: KeyValue | None, key: Tensor, value: Tensor) -> KeyValue:
        if past is None:
            return key, value
        return torch.concat((past[0], key), dim=2), torch.concat((past[1], value), dim=2)


class ThreeParts(SdpaMasked):
    """Appends the tokens one by one in a single ``cat``: no append that the passes know."""

    def append(self, past: KeyValue | None, key: Tensor, value: Tensor) -> KeyValue:
        if past is None:
            return key, value
        first = past[0][:, :, :1], past[1][:, :, :1]
        rest = past[0][:, :, 1:], past[1][:, :, 1:]
        return torch.cat((first[0], rest[0], key), 2), torch.cat((first[1], rest[1], value), 2)


class SharedCache(SdpaMasked):
    """Two attentions over one cache, as layers that share their keys and values do it."""

    def forward(self, x_BLE: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        output, present = super().forward(x_BLE, past)
        query, _, _ = self.project(output)
        second = self.attend(query, *present, is_prompt=past is None)
        return output + self.finish(second), present


UNUSUAL: dict[str, type[SdpaCausal]] = {
    "sliding": Sliding,
    "tokens_first": TokensFirst,
    "scaled_late": ScaledLate,
    "key_norms": KeyNorms,
    "past_reader": PastReader,
    "one_tensor": OneTensor,
    "concatenated": Concatenated,
    "three_parts": ThreeParts,
    "shared_cache": SharedCache,
}
"""What may be refused, and has to be right all the same."""


class Decoder(nn.Module):
    """Embedding, pre-norm attention and MLP blocks, logits."""

    def __init__(
        self,
        attention: type[nn.Module] = SdpaMasked,
        layers: int = 2,
        width: int = 32,
        **sizes: int,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(512, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.attentions = nn.ModuleList(attention(width, **sizes) for _ in range(layers))
        self.mlps = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        cached = 0 if past is None else past[0][0].shape[2]
        positions = torch.arange(cached, cached + tokens.shape[1])
        x, present = self.tokens(tokens) + self.positions(positions), []
        for layer, (norm, attend) in enumerate(zip(self.norms, self.attentions, strict=True)):
            output, states = attend(norm(x), None if past is None else past[layer])
            present.append(states)
            x = x + output
            x = x + torch.tanh(self.mlps[layer](x))
        return self.head(x), tuple(present)


def decoder(name: str = "sdpa_masked", **sizes: int) -> Decoder:
    """A decoder of ``ATTENTIONS`` or ``UNUSUAL`` by its name, random and without gradients."""
    return Decoder((ATTENTIONS | UNUSUAL)[name], **sizes).eval().requires_grad_(False)


def prompt(length: int = 12, batch: int = 1) -> Tensor:
    """Random tokens [B, L]."""
    return torch.randint(VOCABULARY, (batch, length))


def decode(model: Any, tokens: Tensor, past: Past | None, steps: int) -> tuple[Tensor, Past]:
    """Feed ``tokens`` [B, L] and ``steps`` greedy ones; logits [B, steps + 1, V] and the cache."""
    collected = []
    for _ in range(steps + 1):
        logits, past = model(tokens, past)
        collected.append(logits[:, -1])
        tokens = logits[:, -1:].argmax(-1)
    assert past is not None
    return torch.stack(collected, dim=1), past
