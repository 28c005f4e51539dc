"""How exported graphs call a decoder: tokens and a position in, logits out, caches in buffers.

torch.export sees one signature for every model, and every cache as buffers that are written at a
position. What the passes make of those buffers does not depend on whose they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..report import SparkError
from ..transformers_names import cache_argument

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
RECURRENT = ("conv_states", "recurrent_states")
"""What layers of linear attention call their states, which cannot step back."""


class ExportError(SparkError):
    """A model cannot be exported, or a folder is not what ``export`` wrote."""


class Decoder(nn.Module):
    """A decoder as it is exported.

    ``forward(input_ids [B, L], position [1], rows [K], attention_mask [B, max_tokens] or None)``
    returns logits [B, K, V]. ``position`` (int64) is that of the first token, 0 in a prefill;
    ``rows`` (int64) says of which of the L tokens logits are wanted. ``attention_mask`` is 0 at
    padding.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.phase: Phase = "prefill"
        """Which of the graphs is being traced."""

    masked = False
    """Whether there is an ``attention_mask``."""

    def reference(self, ids: Tensor) -> Tensor:
        """Logits [B, S, V] of the model itself for tokens [B, S]; it is left as it was."""
        raise NotImplementedError


class HandwrittenDecoder(Decoder):
    """A module that is called with tokens [B, L] and positions [L], and keeps its cache in buffers.

    That is the signature of gpt-fast and of what follows it.
    """

    def forward(
        self, input_ids: Tensor, position: Tensor, rows: Tensor, attention_mask: None = None
    ) -> Tensor:
        """Logits at ``rows``, as the class says."""
        positions = position + torch.arange(input_ids.shape[1], device=input_ids.device)
        output = self.model(input_ids, positions)
        logits = getattr(output, "logits", output)
        return logits.index_select(1, rows)  # type: ignore[no-any-return]

    def reference(self, ids: Tensor) -> Tensor:
        """As the class says."""
        before = [(buffer, buffer.clone()) for buffer in self.buffers()]
        zero = torch.zeros(1, dtype=torch.int64, device=ids.device)
        logits: Tensor = self(ids, zero, torch.arange(ids.shape[1], device=ids.device))
        for buffer, value in before:
            buffer.copy_(value)
        return logits


class TransformersDecoder(Decoder):
    """A causal language model of transformers with a static cache."""

    def __init__(self, model: nn.Module, max_tokens: int, batch: int) -> None:
        """
        Args:
            model: called with one token here, which makes the buffers as large as they have to be.
            max_tokens: capacity of the cache.

        Raises:
            ExportError: the cache of the model has layers of a kind that cannot be exported.
        """
        super().__init__(model)
        self.masked = batch > 1
        self._cache = _static_cache(model.config, max_tokens)
        self._named = cache_argument(model.forward)
        token = torch.zeros(batch, 1, dtype=torch.int64, device=_device(model))
        with torch.no_grad():
            model(input_ids=token, use_cache=True, **{self._named: self._cache})
        self._slots = _Slots(self._cache.layers)
        for name, store, key in self._slots.all:
            self.register_buffer(name, torch.zeros_like(store[key]), persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        position: Tensor,
        rows: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits at ``rows``, as the class says."""
        count = input_ids.shape[1]
        positions = position + torch.arange(count, device=input_ids.device)
        keywords: dict[str, Any] = {"position_ids": positions.unsqueeze(0)}
        if attention_mask is not None:
            real = attention_mask.cumsum(1) - 1
            keywords["position_ids"] = real.clamp_min(0).index_select(1, positions)
            seen = attention_mask[:, :count] if self.phase == "prefill" else attention_mask
            keywords["attention_mask"] = seen
        for name, store, key in self._slots.all:
            store[key] = getattr(self, name)
        for layer in self._cache.layers:
            layer.phase = self.phase
            layer.cumulative_length = position[0].clone()
            # Of linear attention: whether there is a state to go on with.
            for index in getattr(layer, "has_previous_state", ()):
                layer.has_previous_state[index] = self.phase == "decode"
        known = inspect.signature(self.model.forward).parameters
        if "cache_position" in known:
            keywords["cache_position"] = positions
        if takes_rows := "logits_to_keep" in known:
            keywords["logits_to_keep"] = rows
        cache = {self._named: self._cache}
        logits = self.model(input_ids=input_ids, use_cache=True, **cache, **keywords).logits
        return logits if takes_rows else logits.index_select(1, rows)  # type: ignore[no-any-return]

    def reference(self, ids: Tensor) -> Tensor:
        """As the class says."""
        return self.model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


def decoder_of(model: nn.Module, max_tokens: int, batch: int) -> Decoder:
    """What to export of a model, which is put into eval mode.

    Raises:
        ExportError: the model cannot be exported; the message says why.
    """
    if (device := _device(model)).type != "cpu":
        raise ExportError(f"the model is on {device}: allowed is cpu")
    if hasattr(model, "config") and hasattr(model, "generate"):
        return TransformersDecoder(model, max_tokens, batch).eval()
    return HandwrittenDecoder(model).eval()


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


class _Slots:
    """Where the layers of a cache have their tensors.

    A class, since torch.export looks into lists for tensors that a model has exchanged.
    """

    def __init__(self, layers: Iterable[Any]) -> None:
        self.all = list(self._found(layers))
        """A name, a dictionary and the key in it, of each tensor."""

    def _found(self, layers: Iterable[Any]) -> Iterator[tuple[str, dict[Any, Any], Any]]:
        for index, layer in enumerate(layers):
            for name, value in vars(layer).items():
                if name in ("keys", "values") and isinstance(value, Tensor):
                    yield f"layers_{index}_{name}", vars(layer), name
                elif name in RECURRENT:
                    for number, state in value.items():
                        if isinstance(state, Tensor):
                            yield f"layers_{index}_{name}_{number}", value, number


class _Traced:
    """Attention over a prompt reads its own tokens alone: nothing else is in the cache."""

    phase: Phase = "decode"

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
        if self.phase == "decode":
            return keys, values
        count = key_states.shape[2]
        return keys[:, :, :count], values[:, :, :count]

    def get_mask_sizes(self, query_length: int) -> Any:
        if self.phase == "prefill":
            return query_length, 0
        return super().get_mask_sizes(query_length)  # type: ignore[misc]


def _static_cache(config: Any, max_tokens: int) -> Any:
    """A static cache whose layers all have room for ``max_tokens`` and are read as a prefill is."""
    from transformers import StaticCache, cache_utils

    cache: Any = StaticCache(config=config, max_cache_len=max_tokens)
    for index, layer in enumerate(cache.layers):
        kind = type(layer).__name__
        # One that rolls chooses its code by how many tokens there are, which no graph can.
        whole = kind.replace("StaticSlidingWindow", "Static")
        if whole == "StaticLayer":
            cache.layers[index] = _traced(cache_utils.StaticLayer)(max_tokens)
        elif "AndStatic" in whole:
            both = _traced(cache_utils.LinearAttentionAndStaticFullAttentionLayer)
            cache.layers[index] = both(max_tokens, number_of_states=layer.number_of_states)
        elif kind not in ("LinearAttentionLayer", "DummyLayer"):  # the last one borrows a cache
            raise ExportError(
                f"layer {index} of the cache is a {kind}: allowed is one that stores keys and "
                "values or the states of linear attention"
            )
    return cache


def _traced(kind: Any) -> Any:
    return type(f"Traced{kind.__name__}", (_Traced, kind), {})
