"""The method on any eager transformers model, with no graph and no compressed cache.

Around the unmodified model ``Simulated`` follows the keys that a cache returns through whatever
only moves them (views, expansion to the query heads, casts) to the product with the queries. There
the tokens that the method would have packed are replaced by what it would have recovered of them.
It shares the formulas with the backend (``kernels/formats``), but neither patterns nor bookkeeping.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import Cache, EncoderDecoderCache

from spark_compile import SparkConfig
from spark_compile.kernels.formats import Dense

from .simulated_layer import SimulatedLayer

MOVES = {
    "expand", "expand_as", "reshape", "reshape_as", "view", "view_as", "transpose", "permute",
    "unsqueeze", "squeeze", "contiguous", "repeat", "repeat_interleave", "to", "float", "double",
    "half", "bfloat16", "type", "type_as", "__getitem__", "flatten", "unflatten", "swapaxes",
    "swapdims", "movedim", "moveaxis", "narrow", "clone", "detach", "__get__", "t", "adjoint",
    "broadcast_to", "tile",
}  # fmt: skip
SCALINGS = {"mul", "__mul__", "__rmul__", "multiply", "div", "__truediv__", "true_divide"}
"""By a number they change nothing of the method, which is invariant to the scale of queries."""
PRODUCTS = {
    "scaled_dot_product_attention": (0, 1), "matmul": (0, 1), "__matmul__": (0, 1), "bmm": (0, 1),
    "mm": (0, 1), "__rmatmul__": (1, 0), "baddbmm": (1, 2), "einsum": (1, 2),
}  # fmt: skip
"""Positions of the two factors."""
FACTORS = {
    "scaled_dot_product_attention": ("query", "key", "value"),
    "baddbmm": ("input", "batch1", "batch2"), "bmm": ("input", "mat2"), "mm": ("input", "mat2"),
}  # fmt: skip
"""What the arguments up to the second factor are called, where not input and other."""
_TRACE = "_simulated_trace"


Move = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Trace:
    """The keys of a layer [B, Hkv, S, D] and the moves they have gone through since."""

    layer: SimulatedLayer
    keys: Tensor
    new_tokens: int
    moves: tuple[tuple[Move, bool], ...] = ()
    """Each with whether it is a scaling."""

    def moved(self, move: Move, scaling: bool) -> _Trace:
        return _Trace(self.layer, self.keys, self.new_tokens, (*self.moves, (move, scaling)))

    def replay(self, keys: Tensor) -> Tensor:
        """Other keys after the same moves."""
        for move, _ in self.moves:
            keys = move(keys)
        return keys

    def heads(self) -> Tensor:
        """Which key head each matrix of the moved keys belongs to: int64 [...]."""
        batch, heads, length, dim = self.keys.shape
        index = torch.arange(heads, dtype=self.keys.dtype).view(1, -1, 1, 1)
        index = index.expand(batch, heads, length, dim)
        for move, scaling in self.moves:
            index = index if scaling else move(index)
        return index[..., 0, 0].long()


@dataclass
class Simulated(TorchFunctionMode):
    """To be entered around forwards of an eager model with one cache, which may have two parts.

    Raises:
        ValueError: an option that is not simulated.
    """

    config: SparkConfig
    layers: Collection[str]
    """The cache's layers that the method is applied to, as ``cache_layers`` names them."""
    states: dict[str, SimulatedLayer] = field(default_factory=dict)
    crosses: list[Cache] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        value = self.config.format_for("value", 64, torch.float32)
        if not isinstance(value, Dense) or self.config.recovery != "degenerate":
            raise ValueError("only whole values and the degenerate recovery are simulated")

    def __enter__(self) -> Simulated:
        self._originals = Cache.update, EncoderDecoderCache.__init__
        Cache.update = self._tracing(Cache.update)
        EncoderDecoderCache.__init__ = self._noting(EncoderDecoderCache.__init__)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        Cache.update, EncoderDecoderCache.__init__ = self._originals
        super().__exit__(*exception)

    def lost(self) -> list[str]:
        """Layers whose keys were not seen to meet a query in every update."""
        return [
            name
            for name in self.layers
            if (state := self.states.get(name)) is None or state.products < state.updates
        ]

    def _noting(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def init(cache: EncoderDecoderCache, *args: Any, **kwargs: Any) -> None:
            original(cache, *args, **kwargs)
            self.crosses.append(cache.cross_attention_cache)

        return init

    def _tracing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def update(
            cache: Cache, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            keys, values = original(cache, key, value, layer_idx, *args, **kwargs)
            cross = any(cache is other for other in self.crosses)
            name = layer_name(layer_idx, cross)
            if name in self.layers:
                # What comes first into a sliding window leaves it first: nothing stays dense there.
                stored = cache.layers[layer_idx]
                sliding = getattr(stored, "is_sliding", False)
                fresh = SimulatedLayer(self.config, 0 if sliding else self.config.sink_tokens or 0)
                layer = self.states.setdefault(name, fresh)
                layer.update(keys, key.shape[2], stored.keys.shape[2])
                setattr(keys, _TRACE, _Trace(layer, keys, key.shape[2]))
            return keys, values

        return update

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in PRODUCTS:
            args = _positional(name, args, kwargs)
            for other, factor in (PRODUCTS[name], PRODUCTS[name][::-1]):
                trace = _trace(args[factor]) if len(args) > factor else None
                if trace is not None:
                    return self._product(func, args, kwargs, factor, args[other], trace)
        result = func(*args, **kwargs)
        trace = _trace(args[0]) if args else None
        scaling = name in SCALINGS and not any(isinstance(a, Tensor) and a.dim() for a in args[1:])
        if trace is not None and isinstance(result, Tensor) and (scaling or name in MOVES):
            move = functools.partial(_apply, func, args[1:], kwargs)
            setattr(result, _TRACE, trace.moved(move, scaling))
        return result

    def _product(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, factor: int, query: Tensor,
        trace: _Trace,
    ) -> Any:  # fmt: skip
        """The product with the keys as the method sees them; then the method goes on."""
        recovered = trace.layer.seen(trace.keys)
        changed = (*args[:factor], trace.replay(recovered), *args[factor + 1 :])
        result = func(*changed, **kwargs)
        if query.shape[-1] != trace.keys.shape[3]:
            query = query.mT  # keys times queries
        heads = trace.heads()
        if kwargs.get("enable_gqa"):
            heads = heads.repeat_interleave(query.shape[-3] // heads.shape[-1], dim=-1)
        layer = trace.layer
        # Layers that read another one's cache may ask about the last token alone.
        vectors = query.numel() // query.shape[-1] // trace.keys.shape[0]
        layer.query_heads = layer.query_heads or vectors // trace.new_tokens
        layer.note(trace.keys, grouped(query, heads, trace))
        return result


def layer_name(index: int, cross: bool) -> str:
    """What a layer of a cache is called; ``cross`` is the second part of an EncoderDecoderCache."""
    return f"cross {index}" if cross else str(index)


def cache_layers(cache: Any) -> dict[str, Any]:
    """The layers of a cache by name."""
    parts = (
        getattr(cache, "self_attention_cache", cache),
        getattr(cache, "cross_attention_cache", None),
    )
    return {
        layer_name(index, cross == 1): layer
        for cross, part in enumerate(parts)
        for index, layer in enumerate(getattr(part, "layers", ()))
    }


def grouped(query: Tensor, heads: Tensor, trace: _Trace) -> Tensor:
    """Mean query of each key head, [B, Hkv, L, D], of queries in any arrangement of heads.

    Args:
        query: [..., rows, D], batch first, the rows of a matrix being heads times tokens.
        heads: the key head of each matrix; broadcast to the leading dimensions of ``query``.
        trace: of the keys they meet.
    """
    batch, kv_heads, _, dim = trace.keys.shape
    rows = query.reshape(batch, trace.layer.query_heads, -1, dim).float()
    tokens, leading = rows.shape[2], query.shape[:-2]
    inner = query.shape[-2] // tokens
    index = heads.expand(leading).unsqueeze(-1).expand(*leading, inner).reshape(batch, -1)[0]
    total = rows.new_zeros(batch, kv_heads, tokens, dim).index_add(1, index, rows)
    return total / index.bincount(minlength=kv_heads).view(1, -1, 1, 1)


def _positional(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments with the factors among the positional ones; ``kwargs`` loses them."""
    if name == "einsum" and len(args) == 2 and isinstance(args[1], (list, tuple)):
        return (args[0], *args[1])
    missing = FACTORS.get(name, ("input", "other"))[len(args) :]
    return (*args, *(kwargs.pop(n) for n in missing if n in kwargs))


def _trace(value: Any) -> _Trace | None:
    return getattr(value, _TRACE, None) if isinstance(value, Tensor) else None


def _apply(func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any], keys: Tensor) -> Tensor:
    result: Tensor = func(keys, *rest, **kwargs)
    return result
