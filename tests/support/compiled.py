"""Hand-written decoders behind the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from spark_compile import PrunedKeys, StoredValues

EXACT = {"key_ratio": 0.0, "window": 4, "inner": "eager"}


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="spark", options={**EXACT, **options})


def is_compressed(past: Any) -> bool:
    return all(
        isinstance(key, PrunedKeys) and isinstance(value, StoredValues) for key, value in past
    )
