"""The second oracle: an eager model whose attention is the method's reference, and tolerances."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from spark_compile import SparkConfig
from spark_compile.kernels.formats import Format
from spark_compile.kernels.reference.store import query_stats

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
"""Largest relative error (root mean squares) by dtype; the only table of its kind."""


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compare two results of computations in ``dtype`` by the table above."""
    assert actual.shape == expected.shape
    error = (actual.float() - expected.float()).norm() / expected.float().norm()
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e}, allowed {TOLERANCE[dtype]:.0e}"


def attention_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of scaled_dot_product_attention by name."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
    return {**dict(zip(names, args, strict=False)), **kwargs}


@dataclass
class _Layer:
    """What the method remembers of one layer, with dense keys in the place of packed ones."""

    packed: dict[str, Tensor]
    """What the packed keys and values are worth, [B, Hkv, n, D] float32 each."""
    stats: Tensor
    constants: dict[str, dict[str, Tensor]]
    tokens: int = 0
    waiting: dict[str, Tensor] = field(default_factory=dict)
    """The keys and values that the latest step's queries have met."""


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
        bound = attention_arguments(args, kwargs)
        bound.pop("enable_gqa", None)
        query, key = bound["query"], bound["key"]
        rows = {"key": key, "value": bound["value"]}
        rows = {side: t[:, :: t.shape[1] // self.kv_heads] for side, t in rows.items()}
        layer, tokens = self._layer(query, rows), key.shape[2]
        new = query.shape[1] * query.shape[2] // self.query_heads
        evicted = layer.tokens - (tokens - new)  # by a sliding window
        layer.packed = {side: packed[:, :, evicted:] for side, packed in layer.packed.items()}
        # The step before packs once it has evicted, which is only seen now.
        self._pack(layer, {side: dense[:, :, evicted:] for side, dense in layer.waiting.items()})
        layer.tokens, layer.waiting = tokens, rows
        for side, dense in rows.items():
            bound[side] = self._expand(self._seen(layer, side, dense), query)
        output = F.scaled_dot_product_attention(**bound)
        # For a single token eager transformers hands over the queries of a group as rows.
        heads = query.reshape(query.shape[0], self.query_heads, -1, query.shape[3])
        layer.stats = layer.stats + query_stats(heads, self.kv_heads, self.config.window)
        return output

    def _layer(self, query: Tensor, rows: dict[str, Tensor]) -> _Layer:
        if self.call == len(self.layers):
            zeros = torch.zeros(query.shape[0], self.kv_heads, query.shape[3])
            none = {side: dense[:, :, :0].float() for side, dense in rows.items()}
            self.layers.append(_Layer(none, zeros, {}))
        self.call += 1
        return self.layers[self.call - 1]

    def _expand(self, tensor: Tensor, query: Tensor) -> Tensor:
        return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)

    def _seen(self, layer: _Layer, side: str, dense: Tensor) -> Tensor:
        """Keys or values as the method sees them: sinks, packed and recovered, recent."""
        sinks, packed = self.config.sink_tokens or 0, layer.packed[side]
        if not packed.shape[2]:
            return dense
        rest = dense[:, :, sinks + packed.shape[2] :]
        return torch.cat((dense[:, :, :sinks], packed.to(dense.dtype), rest), dim=2)

    def _pack(self, layer: _Layer, rows: dict[str, Tensor]) -> None:
        """Encode and decode the tokens that are due, whole windows of them."""
        config, packed = self.config, layer.packed["key"].shape[2]
        if not rows or layer.tokens < config.min_tokens:
            return
        waiting = rows["key"].shape[2] - packed - (config.sink_tokens or 0) - config.recent
        due = waiting // config.window * config.window
        if due <= 0:
            return
        first = (config.sink_tokens or 0) + packed
        for side, dense in rows.items():
            norms = layer.stats.sqrt() if side == "key" else None
            form: Format = config.format_for(side, dense.shape[3], dense.dtype)  # type: ignore[arg-type]
            if side not in layer.constants:
                layer.constants[side] = form.constants(dense, norms)
            body = dense[:, :, first : first + due].unsqueeze(2)
            stored = form.encode(body, norms, layer.constants[side])
            fresh = form.decode(stored, layer.constants[side]).flatten(2, 3)
            layer.packed[side] = torch.cat((layer.packed[side], fresh), dim=2)
        layer.stats = torch.zeros_like(layer.stats)
