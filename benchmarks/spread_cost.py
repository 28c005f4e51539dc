"""``python -m benchmarks spread``: what a token of a context that is spread over ranks may cost.

The attention of a layer is fitted to times measured on an H200 (``results/gpu-nvidia-h200.json``);
a collective takes what NCCL's own model says of a ring in its LL protocol (src/graph/tuning.cc of
NVIDIA/nccl). docs/distributed.md has the table and what follows from it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from .measure import RESULTS, wide_console

GPU = RESULTS / "gpu-nvidia-h200.json"
CALL_US, NVLINK_HOP_US, NETWORK_HOP_US = 6.6, 0.6, 2.7
NVLINK_BYTES_PER_US, NETWORK_BYTES_PER_US = 141e3, 45e3
NODE = 8
"""GPUs that NVLink joins; nodes are joined by Ethernet of 400 Gb/s."""


@dataclass(frozen=True)
class Shape:
    """What counts of a decoder."""

    name: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int

    @property
    def token_bytes(self) -> int:
        """Keys and values of a token in one layer, in bfloat16."""
        return 2 * 2 * self.kv_heads * self.head_dim


SHAPES = (Shape("Llama-3-8B", 32, 32, 8, 128), Shape("Llama-3-70B", 80, 64, 8, 128))
TOKENS = (131_072, 1_048_576)
RANKS = (1, 2, 4, 8, 16, 64)


@dataclass(frozen=True)
class Attention:
    """Time of an attention of one query per head: linear in the bytes that it reads."""

    start_us: float
    bytes_per_us: float

    @classmethod
    def measured(cls, path: Path = GPU) -> Attention:
        """The line through SDPA's two longest contexts of a GPU's results."""
        found: dict[str, Any] = json.loads(path.read_text())
        shape = found["shape"]
        token_bytes = 2 * 2 * shape["kv_heads"] * shape["dim"]
        times = sorted((r["tokens"], r["us"]) for r in found["dense"] if r["name"] == "sdpa")
        (few, short_us), (many, long_us) = times[-2:]
        rate = (many - few) * token_bytes / (long_us - short_us)
        return cls(short_us - few * token_bytes / rate, rate)

    def us(self, read_bytes: float) -> float:
        return self.start_us + read_bytes / self.bytes_per_us


def collective_us(shape: Shape, ranks: int) -> float:
    """The all-gather of a layer: of [Hq, Dv + 1] float32 of each rank."""
    if ranks == 1:
        return 0.0
    part = 4 * shape.query_heads * (shape.head_dim + 1)
    across = max(-(-ranks // NODE) - 1, 0)  # hops between nodes
    within = ranks - 1 - across
    rate = NETWORK_BYTES_PER_US if across else NVLINK_BYTES_PER_US
    moved_us = (ranks - 1) * part / rate
    return CALL_US + within * NVLINK_HOP_US + across * NETWORK_HOP_US + moved_us


def token_us(shape: Shape, tokens: int, ranks: int, share: float, attention: Attention) -> float:
    """Attention and collectives of all layers, for one token of one sequence.

    Args:
        share: of the dense bytes, which a rank reads its part of.
    """
    own = share * shape.token_bytes * tokens / ranks
    return shape.layers * (attention.us(own) + collective_us(shape, ranks))


def main() -> None:
    """Print bytes per rank and microseconds per token over ranks."""
    attention, console = Attention.measured(), wide_console()
    for shape in SHAPES:
        for tokens in TOKENS:
            table = Table(title=f"{shape.name}, {tokens:,} tokens", title_justify="left")
            for name in ("ranks", "GB, dense", "GB at .40", "GB at .18", "us, dense", "of these",
                         "us at .40"):  # fmt: skip
                table.add_column(name, justify="right")
            for ranks in RANKS:
                own = shape.layers * shape.token_bytes * tokens / ranks / 1e9
                collectives = shape.layers * collective_us(shape, ranks)
                table.add_row(
                    str(ranks), f"{own:.2f}", f"{0.4 * own:.2f}", f"{0.18 * own:.2f}",
                    f"{token_us(shape, tokens, ranks, 1, attention):,.0f}", f"{collectives:,.0f}",
                    f"{token_us(shape, tokens, ranks, 0.4, attention):,.0f}",
                )  # fmt: skip
            console.print(table)
