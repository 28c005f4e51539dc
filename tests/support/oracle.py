"""The second oracle: an eager model whose attention is the method's reference, and tolerances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from spark_compile import SparkConfig
from spark_compile.kernels.layout import kept_channels
from spark_compile.kernels.reference.prune import prune, query_stats, recover
from spark_compile.kernels.reference.values import pack_values, unpack_values, value_bias

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
"""Largest relative error (root mean squares) by dtype; the only table of its kind."""


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compare two results of computations in ``dtype`` by the table above."""
    assert actual.shape == expected.shape
    error = (actual.float() - expected.float()).norm() / expected.float().norm()
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e}, allowed {TOLERANCE[dtype]:.0e}"


@dataclass
class _Layer:
    """What the method remembers of one layer, with dense keys in the place of packed ones."""

    packed: Tensor
    norms: Tensor
    stats: Tensor
    values: Tensor
    bias: Tensor | None = None
    tokens: int = 0


class SimulatedSpark(TorchFunctionMode):
    """Replaces scaled_dot_product_attention by the method, keeping every key dense.

    Written against the method, not against the cache: it knows nothing of buffers, handles or
    graphs, only which tokens are packed when and with which queries.
    """

    def __init__(self, config: SparkConfig, query_heads: int, kv_heads: int) -> None:
        super().__init__()
        self.config = config
        self.query_heads = query_heads
        self.kv_heads = kv_heads
        self.layers: list[_Layer] = []
        self.call = 0

    def begin_step(self) -> None:
        """To be called before each forward: attentions are told apart by their order."""
        self.call = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
        bound = {**dict(zip(names, args, strict=False)), **kwargs}
        bound.pop("enable_gqa", None)
        query, key = bound["query"], bound["key"]
        key = key[:, :: key.shape[1] // self.kv_heads]
        layer, value = self._layer(query, key), bound["value"]
        new = query.shape[1] * query.shape[2] // self.query_heads
        left = layer.tokens - (key.shape[2] - new)  # what a sliding window has let go
        layer.packed, layer.tokens = layer.packed[:, :, left:], key.shape[2]
        value = value[:, :: value.shape[1] // self.kv_heads]
        bound["key"] = self._expand(self._keys(layer, key), query)
        bound["value"] = self._expand(self._values(layer, value), query)
        output = F.scaled_dot_product_attention(**bound)
        # For a single token eager transformers hands over the queries of a group as rows.
        self._advance(layer, query.reshape(query.shape[0], self.query_heads, -1, key.shape[3]), key)
        return output

    def _layer(self, query: Tensor, key: Tensor) -> _Layer:
        if self.call == len(self.layers):
            zeros = torch.zeros(key.shape[0], self.kv_heads, key.shape[3])
            none = key[:, :, :0].float()
            self.layers.append(_Layer(none, zeros, zeros, none))
        self.call += 1
        return self.layers[self.call - 1]

    def _expand(self, tensor: Tensor, query: Tensor) -> Tensor:
        return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)

    def _keys(self, layer: _Layer, key: Tensor) -> Tensor:
        """The keys as the method sees them: sinks, packed and recovered, recent."""
        sinks, packed = self.config.sink_tokens, layer.packed.shape[2]
        if not packed:
            return key
        parts = (key[:, :, :sinks], layer.packed.to(key.dtype), key[:, :, sinks + packed :])
        return torch.cat(parts, dim=2)

    def _values(self, layer: _Layer, value: Tensor) -> Tensor:
        """The values as the method sees them: exact in the prompt, as stored from then on."""
        config, known = self.config, layer.values.shape[2]
        if config.value_fields == ("rows",):
            return value
        if not known and config.value_ratio:
            layer.bias = value_bias(value)
        kept = kept_channels(value.shape[3], config.value_ratio)
        quantized = config.value_dtype == "int8"
        rows, bits, scale = pack_values(value[:, :, known:], layer.bias, kept, quantized)
        stored = unpack_values(rows, None if layer.bias is None else bits, scale, value.shape[3])
        layer.values = (
            torch.cat((layer.values[..., : value.shape[3]], stored), dim=2) if known else stored
        )
        return layer.values.to(value.dtype) if known else value

    def _advance(self, layer: _Layer, query: Tensor, key: Tensor) -> None:
        config, length = self.config, key.shape[2]
        layer.stats = layer.stats + query_stats(query, self.kv_heads, config.window)
        packed = layer.packed.shape[2]
        waiting = length - packed - config.sink_tokens - config.recent
        if waiting < config.window or length < config.min_tokens:
            return
        select = layer.stats.sqrt()
        if not packed:
            layer.norms = select
        first = config.sink_tokens + packed
        how = (config.recovery, config.saliency)
        kept = kept_channels(key.shape[3], config.key_ratio)
        body = key[:, :, first : first + waiting]
        rows = prune(body, select, layer.norms, kept, *how, config.key_dtype == "int8")
        fresh = recover(*rows, layer.norms, "degenerate", config.saliency)
        layer.packed = torch.cat((layer.packed, fresh), dim=2)
        layer.stats = torch.zeros_like(layer.stats)
