"""What is compared: formats of ours as options, and formats of others. A line each."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from typing import Any

from spark_compile import SparkConfig

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


INT8 = {"key_dtype": "int8", "value_dtype": "int8"}
METHODS: tuple[Method, ...] = (
    ours("dense"),
    ours("spark .5", key_ratio=0.5),
    ours("spark .8", key_ratio=0.8),
    ours("spark .8 int8", key_ratio=0.8, **INT8),
    ours("int8", **INT8),
    Peer("bfloat16", Rounded(), Rounded()),
    Peer("fp8 e4m3", Float8(), Float8()),
    *(Peer(f"KIVI-{bits}", PerChannel(bits), PerToken(bits)) for bits in (4, 3, 2)),
    *(Peer(f"rotated int{bits}", Rotated(bits), Rotated(bits)) for bits in (4, 3, 2)),
    *(Peer(f"quanto int{bits}", Quanto(bits), Quanto(bits)) for bits in (4, 2)),
)
