"""One decode attention in every way it is compared, on layers of random keys and values.

Letters as in docs/architecture.md: B batch, S cached length, Hq and Hkv heads, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from spark_compile import SparkConfig, ops
from spark_compile.kernels.layout import counters
from spark_compile.kernels.spec import SIDES, Spec

from .measure import Contender, available_bytes

WINDOW = SparkConfig.window
RECENT = WINDOW
"""Latest tokens that stay dense, by default."""
DRAWN_TOKENS = 4096
"""Tokens drawn at random per case; longer contexts and further layers repeat them."""


@dataclass(frozen=True)
class Shape:
    """Attention heads of a model."""

    name: str
    query_heads: int
    kv_heads: int
    head_dim: int


SHAPES = {
    "llama": Shape("Llama-3-8B, Qwen3-8B", 32, 8, 128),
    "smollm2": Shape("SmolLM2-135M", 9, 3, 64),
}


@dataclass(frozen=True)
class Stored:
    """How a spark contender stores keys and values."""

    name: str
    key_ratio: float = 0.0
    int8_keys: bool = False
    int8_values: bool = False
    bits: int | None = None
    """Of quantized keys and values, in place of the above."""
    budget: str | None = None
    """Chooses the formats, in place of all the above."""

    def spec(self, head_dim: int, dtype: torch.dtype) -> Spec:
        """The same for heads of a size, with the scale that attention has by default."""
        config = (
            SparkConfig(budget=self.budget)
            if self.budget
            else SparkConfig(
                key_ratio=self.key_ratio,
                key_dtype="int8" if self.int8_keys else "model",
                value_dtype="int8" if self.int8_values else "model",
                key_format=f"quantized(bits={self.bits},scaled=True)" if self.bits else None,
                value_format=f"quantized(bits={self.bits})" if self.bits else None,
            )
        )
        key, value = (config.format_for(side, head_dim, dtype) for side in SIDES)
        return config.spec(key, value).attending(head_dim**-0.5, 0.0)


STORED = (
    Stored("spark dense"),
    Stored("spark 0.5", 0.5),
    Stored("spark 0.8", 0.8),
    Stored("spark 0.8 + int8 values", 0.8, int8_values=True),
    Stored("spark 0.8 + int8", 0.8, int8_keys=True, int8_values=True),
    Stored("spark int8", int8_keys=True, int8_values=True),
    Stored("spark 6 bits", bits=6),
    Stored("spark 4 bits", bits=4),
    Stored("spark smallest", budget="smallest"),
)
EXPANDED, GQA, PACKED = "HF: expanded heads + mask", "SDPA enable_gqa", "SDPA packed queries"


@dataclass(frozen=True)
class Layer:
    """A layer's cache: pages and head of the keys, then of the values."""

    spec: Spec
    tensors: tuple[Tensor, ...]

    @property
    def pages(self) -> tuple[Tensor, ...]:
        return self.tensors[::2]

    @property
    def heads(self) -> tuple[Tensor, ...]:
        return self.tensors[1::2]

    def read_bytes(self) -> int:
        """Bytes of the filled pages, and of the heads up to the last token in the tail."""
        total = 0
        for side, pages, head in zip(SIDES, self.pages, self.heads, strict=True):
            length, packed, *_ = counters(head)[0, 0].tolist()
            layout = self.spec.head(side)
            used = layout.offsets["tail"] + (length - packed) * layout.row_bytes
            total += pages[:, :, : packed // self.spec.window].nbytes + head[..., :used].nbytes
        return total


@dataclass
class Case:
    """A shape, batch and context with its random tensors; layers are made when asked for.

    Of the context half a window is left out, so that as many tokens wait to be packed as do on
    average: ``cached`` tokens, and one that is new.
    """

    shape: Shape
    batch: int
    tokens: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        shape, drawn = self.shape, min(self.tokens, DRAWN_TOKENS) // WINDOW * WINDOW
        self.pages = self.tokens // WINDOW - RECENT // WINDOW - 1
        self.cached = self.pages * WINDOW + RECENT + WINDOW // 2
        rows = (self.batch, shape.kv_heads, drawn, shape.head_dim)
        self.query = torch.randn(self.batch, shape.query_heads, 1, shape.head_dim).to(self.dtype)
        self.key, self.value = torch.randn(rows).to(self.dtype), torch.randn(rows).to(self.dtype)
        # Queries that look at some channels more than at others.
        sizes = torch.rand(self.batch, shape.query_heads, 1, shape.head_dim) + 0.1
        self.queries = (sizes * torch.randn(*sizes.shape[:2], WINDOW, 1)).to(self.dtype)
        self.mask = torch.ones(self.batch, 1, 1, self.cached + 1, dtype=torch.bool)
        self._drawn_layers: dict[Stored, Layer] = {}
        # The new token follows the cached ones.
        self.new = self.rows(self.cached, 1)

    def contenders(self, rotate_bytes: int) -> list[Contender]:
        """Ways to attend over the cached tokens and the new one."""
        count = self.layer_count(rotate_bytes)
        dense = [self.rows(0, self.cached + 1) for _ in range(count)]
        ways = {EXPANDED: self._expanded, GQA: self._gqa, PACKED: self.packed_queries}
        contenders = [
            Contender(name, [functools.partial(way, *kv) for kv in dense], self.dense_bytes())
            for name, way in ways.items()
        ]
        for stored in STORED:
            layers = [self.layer(stored) for _ in range(count)]
            calls = [functools.partial(self.step, layer, keep=None) for layer in layers]
            contenders.append(Contender(stored.name, calls, layers[0].read_bytes()))
        return contenders

    def layer_count(self, rotate_bytes: int) -> int:
        """Layers that the smallest cache needs to fill the bytes, if all fit into memory."""
        stored = [self.layer(stored).read_bytes() for stored in STORED]
        total = 2 * self.dense_bytes() + sum(stored)
        return max(1, min(-(-rotate_bytes // min(stored)), available_bytes() // 2 // total))

    def dense_bytes(self) -> int:
        """Bytes of dense keys and values together."""
        return 2 * self.key.nbytes // self.key.shape[2] * (self.cached + 1)

    def rows(self, first: int, count: int, spare: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of some tokens in memory of their own, with ``spare`` more rows."""
        shift = -(first % self.key.shape[2])
        key, value = (
            filled(drawn.roll(shift, dims=2), count, spare) for drawn in (self.key, self.value)
        )
        return key, value

    def layer(self, stored: Stored, waiting: int = WINDOW // 2) -> Layer:
        """A cache in memory of its own with ``waiting`` tokens that are old enough to be packed."""
        drawn = self._drawn_layer(stored)
        packed, tail = self.pages * WINDOW, RECENT + waiting
        tensors: list[Tensor] = []
        sides = zip(SIDES, drawn.pages, drawn.heads, self.rows(packed, tail), strict=True)
        for side, pages, head, rows in sides:
            own = head.clone()
            drawn.spec.head(side).tail(own)[:, :, :tail] = rows
            counters(own).copy_(torch.tensor((packed + tail, packed, 0, 1, 0)))
            drawn_pages = pages[:, :, : self.key.shape[2] // WINDOW]
            tensors += (filled(drawn_pages, self.pages, spare=1), own)
        return Layer(drawn.spec, tuple(tensors))

    def build(
        self, stored: Stored, key: Tensor, value: Tensor, capacity: int | None = None
    ) -> Sequence[Tensor]:
        """Keys and values of a prompt in a cache that grows, or of a capacity."""
        text = stored.spec(self.shape.head_dim, self.dtype).text
        built: Sequence[Tensor] = ops.build(key, value, [self.queries], text, capacity)
        return built

    def step(self, layer: Layer, keep: int | None) -> Tensor:
        """Attend over a layer's cache and the new token; None for ``keep`` appends nothing."""
        output: Tensor = ops.step(
            self.query, *self.new, *layer.tensors, None, None, None, keep, None, layer.spec.text
        )
        return output

    def _drawn_layer(self, stored: Stored) -> Layer:
        """All drawn tokens as pages: in the tail are as many of the first ones as stay dense."""
        if stored not in self._drawn_layers:
            tokens = self.key.shape[2] + RECENT
            built = self.build(stored, *self.rows(0, tokens), capacity=tokens)
            spec = stored.spec(self.shape.head_dim, self.dtype)
            self._drawn_layers[stored] = Layer(spec, tuple(built))
        return self._drawn_layers[stored]

    def _expanded(self, key: Tensor, value: Tensor) -> Tensor:
        group = self.shape.query_heads // self.shape.kv_heads
        key, value = (
            rows.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2) for rows in (key, value)
        )
        return scaled_dot_product_attention(self.query, key, value, attn_mask=self.mask)

    def _gqa(self, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(self.query, key, value, enable_gqa=True)

    def packed_queries(self, key: Tensor, value: Tensor) -> Tensor:
        """Dense attention with the queries of a group as rows, the fastest way there is."""
        grouped = self.query.unflatten(1, (self.shape.kv_heads, -1)).flatten(2, 3)
        return scaled_dot_product_attention(grouped, key, value).reshape(self.query.shape)


def filled(drawn: Tensor, count: int, spare: int = 0) -> Tensor:
    """``drawn`` repeated along the tokens into memory of its own, with ``spare`` more rows."""
    rows = drawn.new_zeros(*drawn.shape[:2], count + spare, *drawn.shape[3:])
    for first in range(0, count, drawn.shape[2]):
        last = min(first + drawn.shape[2], count)
        rows[:, :, first:last] = drawn[:, :, : last - first]
    return rows


def relative_errors(contenders: list[Contender]) -> dict[str, float]:
    """Difference of each output from that of the packed dense form, relative in the 2-norm."""
    outputs = {contender.name: contender.calls[0]().float() for contender in contenders}
    truth = outputs[PACKED]
    return {name: ((o - truth).norm() / truth.norm()).item() for name, o in outputs.items()}
