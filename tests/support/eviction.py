"""An eager model that masks the evicted tokens of each head: what evicting has to equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from oracle import attention_arguments
from torch import Tensor
from torch.overrides import TorchFunctionMode

from spark_compile.kernels.eviction import Prompt, Scorer


@dataclass
class Numbers:
    """What of the options says which tokens of a prompt can go."""

    window: int
    recent: int
    sinks: int = 0


class MaskedEager(TorchFunctionMode):
    """Replaces scaled_dot_product_attention by one that hides evicted tokens.

    Written against the method: the first attention of a layer is exact, and then what the scorer
    likes least is hidden for good. Nothing is dropped, gathered or packed.
    """

    def __init__(
        self, scorers: list[Scorer], numbers: Numbers, query_heads: int, kv_heads: int
    ) -> None:
        super().__init__()
        self.scorers, self.numbers = scorers, numbers
        self.query_heads, self.kv_heads = query_heads, kv_heads
        self.hidden: list[Tensor] = []
        """Of each layer, bool [B, Hkv, N]."""
        self.call = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        bound = attention_arguments(args, kwargs)
        given, scale = bound["query"], bound.get("scale") or bound["query"].shape[-1] ** -0.5
        # For a single token eager transformers hands over the queries of a group as rows.
        query = given.reshape(given.shape[0], self.query_heads, -1, given.shape[3])
        key, value = (bound[n][:, :: bound[n].shape[1] // self.kv_heads] for n in ("key", "value"))
        mask, tokens, length = bound.get("attn_mask"), key.shape[2], query.shape[2]
        if mask is None:
            mask = torch.ones(1, 1, length, tokens, dtype=torch.bool)
            mask = mask.tril(tokens - length) if bound.get("is_causal") else mask
        layer = self.call % len(self.scorers)
        self.call += 1
        is_prompt = layer == len(self.hidden)
        seen = mask
        if not is_prompt:
            hidden = F.pad(self.hidden[layer], (0, tokens - self.hidden[layer].shape[2]))
            hidden = hidden.repeat_interleave(self.query_heads // self.kv_heads, 1).unsqueeze(2)
            seen = mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, -1e30)
        group = self.query_heads // self.kv_heads
        wide = (each.repeat_interleave(group, 1) for each in (key, value))
        output = F.scaled_dot_product_attention(query, *wide, attn_mask=seen, scale=scale)
        if is_prompt:
            self.hidden.append(self._evicted(layer, Prompt(key, [query], mask, None, scale, 0.0)))
        return output.reshape(*given.shape[:3], -1)

    def _evicted(self, layer: int, prompt: Prompt) -> Tensor:
        """Which tokens go: of all but sinks and latest ones those with the least score."""
        scorer, tokens = self.scorers[layer], prompt.key.shape[2]
        evicted = torch.zeros(prompt.key.shape[:3], dtype=torch.bool)
        if tokens <= scorer.tokens:
            return evicted
        sinks, window = self.numbers.sinks, self.numbers.window
        pages = (scorer.tokens - sinks - self.numbers.recent) // window
        latest = scorer.tokens - sinks - pages * window
        score = scorer.score(prompt)
        score[:, :, tokens - scorer.observed :] = 1e30
        score[prompt.padding] = -1e30
        for row, of_head in zip(evicted.flatten(0, 1), score.flatten(0, 1).tolist(), strict=True):
            can_go = sorted(range(sinks, tokens - latest), key=lambda at: of_head[at])
            row[can_go[: len(can_go) - pages * window]] = True
        return evicted
