"""SparK's pruned key/value cache as a ``torch.compile`` backend.

>>> model = spark_compile.optimize(model, key_ratio=0.8)   # compiles in place
>>> model.generate(...)
"""

from __future__ import annotations

from .accounting import kv_bytes
from .backend import optimize, spark
from .calibrate import calibrate
from .config import SparkConfig
from .explain import explain
from .exported.export import export
from .exported.load import load
from .plan import Plan
from .report import OptionError, Report, SparkError, SparkWarning
from .state import PrunedKeys, StoredValues

__all__ = [
    "OptionError",
    "Plan",
    "PrunedKeys",
    "Report",
    "SparkConfig",
    "SparkError",
    "SparkWarning",
    "StoredValues",
    "calibrate",
    "explain",
    "export",
    "kv_bytes",
    "load",
    "optimize",
    "spark",
]
