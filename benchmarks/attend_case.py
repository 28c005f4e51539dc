"""One decode attention in every way it is compared, on layers of random keys and values.

Letters as in docs/architecture.md: B batch, S cached length, Hq and Hkv heads, D head size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from spark_compile import ops
from spark_compile.kernels.layout import kept_channels

from .measure import Contender, available_bytes

DENSE_ROWS = 48
"""Keys that are still dense: 32 recent tokens and, on average, half a window of waiting tokens."""
SPARE_ROWS = 16
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

    key_ratio: float
    int8_keys: bool = False
    int8_values: bool = False

    @property
    def name(self) -> str:
        int8 = {(False, True): " + int8 values", (True, True): " + int8"}
        return f"spark {self.key_ratio:g}{int8.get((self.int8_keys, self.int8_values), '')}"


STORED = (
    Stored(0.0),
    Stored(0.5),
    Stored(0.8),
    Stored(0.8, int8_values=True),
    Stored(0.8, int8_keys=True, int8_values=True),
)
EXPANDED, GQA, PACKED = "HF: expanded heads + mask", "SDPA enable_gqa", "SDPA packed queries"


@dataclass
class Case:
    """A shape, batch and context with its random tensors; layers are made when asked for."""

    shape: Shape
    batch: int
    tokens: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        shape, drawn = self.shape, min(self.tokens, DRAWN_TOKENS)
        rows = (self.batch, shape.kv_heads, drawn, shape.head_dim)
        self.query = torch.randn(self.batch, shape.query_heads, 1, shape.head_dim).to(self.dtype)
        self.key, self.value = torch.randn(rows).to(self.dtype), torch.randn(rows).to(self.dtype)
        self.norms = torch.rand(self.batch, shape.kv_heads, shape.head_dim) + 0.1
        self.mask = torch.ones(self.batch, 1, 1, self.tokens, dtype=torch.bool)

    def contenders(self, rotate_bytes: int) -> list[Contender]:
        """All contenders, over as many layers as the smallest of them needs to fill the bytes."""
        spark = [(stored, self._spark_rows(stored)) for stored in STORED]
        least = min(self.read_bytes(rows) for _, rows in spark)
        total = 2 * self._dense_bytes() + sum(self.read_bytes(rows) for _, rows in spark)
        count = max(1, min(-(-rotate_bytes // least), available_bytes() // 2 // total))
        dense = [(self.filled(self.key), self.filled(self.value)) for _ in range(count)]
        ways = {EXPANDED: self._expanded, GQA: self._gqa, PACKED: self._packed}
        contenders = [
            Contender(name, [functools.partial(way, *kv) for kv in dense], self._dense_bytes())
            for name, way in ways.items()
        ]
        for stored, rows in spark:
            calls = [self._spark_call(rows, value) for _, value in dense]
            contenders.append(Contender(stored.name, calls, self.read_bytes(rows)))
        return contenders

    def filled(self, drawn: Tensor, tokens: int | None = None, spare: int = 0) -> Tensor:
        """``drawn`` repeated along the tokens into memory of its own, with ``spare`` more rows."""
        tokens = self.tokens if tokens is None else tokens
        rows = drawn.new_zeros(*drawn.shape[:2], tokens + spare, *drawn.shape[3:])
        for first in range(0, tokens, drawn.shape[2]):
            last = min(first + drawn.shape[2], tokens)
            rows[:, :, first:last] = drawn[:, :, : last - first]
        return rows

    def pruned(self, stored: Stored) -> tuple[Tensor, ...]:
        """kept, bits and scale of the drawn tokens."""
        kept = kept_channels(self.shape.head_dim, stored.key_ratio)
        how = (kept, "degenerate", "squared", stored.int8_keys)
        rows: tuple[Tensor, ...] = ops.prune(self.key, self.norms, self.norms, *how)
        return rows

    def _spark_rows(self, stored: Stored) -> dict[str, Tensor]:
        """The drawn tokens as ``attend`` takes them; values only where they are not dense."""
        rows = dict(zip(("kept", "bits", "scale"), self.pruned(stored), strict=True))
        if stored.int8_values:
            packed = ops.pack_values(self.value, None, self.shape.head_dim, True)
            rows["values"], _, rows["value_scale"] = packed
        return rows

    def read_bytes(self, rows: dict[str, Tensor]) -> int:
        """Bytes of the filled rows that one call of ``attend`` is given."""
        packed, dense = self.tokens - DENSE_ROWS, self._dense_bytes() // 2
        total = self.norms.nbytes + dense * DENSE_ROWS // self.tokens
        for name, drawn in rows.items():
            count = self.tokens if name.startswith("value") else packed
            total += drawn.nbytes // drawn.shape[2] * count
        return total if "values" in rows else total + dense

    def _dense_bytes(self) -> int:
        """Bytes of dense keys and values together."""
        return 2 * self.key.nbytes // self.key.shape[2] * self.tokens

    def _spark_call(self, rows: dict[str, Tensor], dense_value: Tensor) -> Callable[[], Any]:
        packed = self.tokens - DENSE_ROWS
        kept, bits, scale = (
            self.filled(rows[name], packed, SPARE_ROWS) for name in ("kept", "bits", "scale")
        )
        # The tail holds the tokens after the packed ones, so that each key has its own value.
        tail = self.filled(self.key.roll(-packed, dims=2), DENSE_ROWS, SPARE_ROWS)
        # Values that are stored dense are the same tensors that dense attention reads.
        values, value_scale = dense_value, None
        if "values" in rows:
            values, value_scale = self.filled(rows["values"]), self.filled(rows["value_scale"])
        return functools.partial(
            torch.ops.spark.attend, self.query, kept, bits, scale, self.norms,
            torch.tensor(packed), tail, values, self.tokens, None, None,
            1 / math.sqrt(self.shape.head_dim), 0.0, None, 0, "degenerate", "squared",
            False, None, value_scale, None,
        )  # fmt: skip

    def _expanded(self, key: Tensor, value: Tensor) -> Tensor:
        group = self.shape.query_heads // self.shape.kv_heads
        key, value = (
            rows.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2) for rows in (key, value)
        )
        return scaled_dot_product_attention(self.query, key, value, attn_mask=self.mask)

    def _gqa(self, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(self.query, key, value, enable_gqa=True)

    def _packed(self, key: Tensor, value: Tensor) -> Tensor:
        grouped = self.query.unflatten(1, (self.shape.kv_heads, -1)).flatten(2, 3)
        return scaled_dot_product_attention(grouped, key, value).reshape(self.query.shape)


def relative_errors(contenders: list[Contender]) -> dict[str, float]:
    """Difference of each output from that of the packed dense form, relative in the 2-norm."""
    outputs = {}
    for contender in contenders:
        output = contender.calls[0]()
        outputs[contender.name] = (output[0] if isinstance(output, tuple) else output).float()
    truth = outputs[PACKED]
    return {name: ((o - truth).norm() / truth.norm()).item() for name, o in outputs.items()}
