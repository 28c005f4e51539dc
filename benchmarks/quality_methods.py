"""What is compared: formats of ours as options, and formats of others. A line each."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spark_compile import SparkConfig
from spark_compile.kernels.formats import kept_channels
from spark_compile.plan import Plan
from spark_compile.presets import LADDER

from .quality_peers import (
    Codec,
    Float8,
    PerChannel,
    PerToken,
    Quanto,
    Rotated,
    Rounded,
)

OURS, PEER = "ours", "peer"
PLAN = "plan "
"""Begins the names of methods that are a plan's."""


@dataclass(frozen=True)
class Ours:
    """Options of the backend; the compiled model runs on the cache that it really stores."""

    name: str
    config: SparkConfig
    family = OURS

    @property
    def what(self) -> str:
        """What is measured: results are kept for as long as it stays the same."""
        defaults = asdict(SparkConfig())
        options = {k: v for k, v in asdict(self.config).items() if v != defaults[k]}
        return ", ".join(f"{name}={value!r}" for name, value in options.items()) or "defaults"

    def missing(self) -> str:
        """A package that it needs and that is not installed."""
        return ""


@dataclass(frozen=True)
class Peer:
    """A cache of somebody else, simulated in the eager model."""

    name: str
    key: Codec
    value: Codec
    family = PEER

    @property
    def what(self) -> str:
        """As that of ``Ours``."""
        return f"keys {self.key}, values {self.value}"

    def missing(self) -> str:
        """As that of ``Ours``."""
        needed = {codec.REQUIRES for codec in (self.key, self.value)} - {""}
        return ", ".join(sorted(name for name in needed if not _is_installed(name)))


Method = Ours | Peer


def ours(name: str, **options: Any) -> Ours:
    """A format of ours; without ``key_ratio`` no channel is pruned by the options."""
    return Ours(name, SparkConfig(**{"key_ratio": 0.0, **options}))


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _rung(key: str, value: str) -> Ours:
    """A rung of the ladder that a budget chooses from, named by the bits of keys and values."""
    bits = (text.partition("bits=")[2].strip(")").partition(",")[0] for text in (key, value))
    return Ours(" | ".join(bits), SparkConfig(key_format=key, value_format=value))


SNAPKV = {"evict": "snapkv(tokens=128)", "sink_tokens": 4}
"""A budget of 128 tokens of the prompt, as in the paper's main table."""
INT8 = {"key_dtype": "int8", "value_dtype": "int8"}


def _by_ratio(name: str, format: str, more: str, half: int, fifth: int) -> list[Ours]:
    """A format of keys at ratios .5 and .8."""
    return [
        ours(f"{name} {ratio}", key_format=f"{format}(kept={kept}{more})")
        for ratio, kept in ((".5", half), (".8", fifth))
    ]


def planned(path: Path) -> Ours:
    """The formats by layer that a plan of ``calibrate`` has."""
    plan = Plan.load(path)
    keys = tuple((layer.layer, layer.key) for layer in plan.layers)
    values = tuple((layer.layer, layer.value) for layer in plan.layers)
    return Ours(f"{PLAN}{path.stem}", SparkConfig(key_format=keys, value_format=values))


def methods(head_dim: int) -> tuple[Method, ...]:
    """What is compared on a model with heads of D channels."""
    half, fifth = kept_channels(head_dim, 0.5), kept_channels(head_dim, 0.8)
    return (
        ours("dense"),
        Ours("default", SparkConfig()),
        ours("spark .5", key_ratio=0.5),
        ours("spark .8", key_ratio=0.8),
        ours("spark .8 int8", key_ratio=0.8, **INT8),
        ours("int8", **INT8),
        *(_rung(key, value) for key, value in LADDER),
        *_by_ratio("think", "think", "", half, fifth),
        *_by_ratio("spark no recovery", "spark", ",recovery=none", half, fifth),
        *_by_ratio("spark-g", "spark-g", "", half, fifth),
        ours(
            "spark-tight .8 | 3",
            key_format=f"spark-tight(kept={fifth})", value_format="quantized(bits=3)",
        ),
        ours("SnapKV 128", **SNAPKV),
        ours("SnapKV 128 + spark .8", key_format=f"spark(kept={fifth})", **SNAPKV),
        ours("SnapKV 128 + think .8", key_format=f"think(kept={fifth})", **SNAPKV),
        Peer("bfloat16", Rounded(), Rounded()),
        Peer("fp8 e4m3", Float8(), Float8()),
        *(Peer(f"KIVI-{bits}", PerChannel(bits), PerToken(bits)) for bits in (4, 3, 2)),
        *(Peer(f"rotated int{bits}", Rotated(bits), Rotated(bits)) for bits in (4, 3, 2)),
        *(Peer(f"quanto int{bits}", Quanto(bits), Quanto(bits)) for bits in (4, 2)),
    )  # fmt: skip
