"""What is compared on tasks: budgets of ours, and the rows of the paper's main table."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import torch

import spark_compile
from spark_compile import SparkConfig
from spark_compile.kernels.formats import kept_channels
from spark_compile.presets import SHARES

from . import quality_methods
from .quality_methods import SNAPKV, Ours, ours

DENSE = "dense"
SNAPKV_NAME, PYRAMIDKV_NAME = "SnapKV 128", "PyramidKV 128"
BUDGETS = (0.52, 0.28, 0.20)
KEYS_ALONE = ("spark .5", "spark .8", "think .5", "think .8")
"""Without eviction: where that loses an answer, no format of what is left can show anything."""


def methods(head_dim: int, layers: int) -> tuple[Ours, ...]:
    """What is compared on a model of some layers with heads of D channels."""
    # The last layer has 67 tokens, of which 64 are those that observe.
    pyramid = {"evict": f"pyramidkv(tokens=128,layers={layers})", "sink_tokens": 3}
    others = {method.name: method for method in quality_methods.methods(head_dim)}
    return (
        others[DENSE],
        *(Ours(name, SparkConfig(budget=name)) for name in SHARES),
        *(Ours(f"budget {share:.2f}", SparkConfig(budget=share)) for share in BUDGETS),
        *(others[name] for name in KEYS_ALONE),
        *_evicted(SNAPKV_NAME, SNAPKV, head_dim),
        *_evicted(PYRAMIDKV_NAME, pyramid, head_dim),
    )


def _evicted(name: str, options: dict[str, Any], head_dim: int) -> list[Ours]:
    """Eviction alone, and with keys that SparK or ThinK prunes."""
    pruned = [
        ours(
            f"{name} + {format} {str(ratio)[1:]}",
            key_format=f"{format}(kept={kept_channels(head_dim, ratio)})", **options,
        )
        for format in ("spark", "think")
        for ratio in (0.5, 0.8)
    ]  # fmt: skip
    return [ours(name, **options), *pruned]


def compiled(model: Any, method: Ours, inner: str) -> Any:
    """A compiled model with the weights of ``model``, which stays as it is.

    Equal layers share a graph where a method does the same in all of them. Compiled code of an
    earlier method is dropped.
    """
    torch._dynamo.reset()
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    options = asdict(method.config) | {"inner": inner, "strict": True}
    by_layer = "pyramidkv" in str(method.config.evict)
    return spark_compile.optimize(copy.deepcopy(model, shared), regional=not by_layer, **options)
