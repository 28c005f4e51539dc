"""The formats in which keys and values can be stored, one file each; ``base`` says what one is."""

from __future__ import annotations

from .base import Field, Format, parse
from .dense import Dense
from .int8 import Int8
from .pruned import Pruned
from .quantized import Quantized
from .selection import kept_channels
from .spark import Spark
from .spark_g import SparkG
from .spark_tight import SparkTight
from .think import Think

__all__ = [
    "Dense",
    "Field",
    "Format",
    "Int8",
    "Pruned",
    "Quantized",
    "Spark",
    "SparkG",
    "SparkTight",
    "Think",
    "kept_channels",
    "parse",
]
