"""What a model calls its cache: ``cache`` from transformers 5.24 on, before ``past_key_values``.

Older releases take a ``cache`` argument without a word and ignore it, so it must not be guessed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

_NEW, _OLD = "cache", "past_key_values"


def cache_argument(forward: Callable[..., Any]) -> str:
    """The name of the keyword argument by which a model's forward takes its cache.

    Args:
        forward: a model's ``forward``, or its ``prepare_inputs_for_generation``, which has the
            name that ``generate`` takes.

    Returns:
        ``"cache"`` where it has a parameter of that name, else ``"past_key_values"``.
    """
    return _NEW if _NEW in inspect.signature(forward).parameters else _OLD


def returned_cache(output: object) -> Any:
    """The cache in what a model's forward or ``generate`` returned, None if there is none."""
    # The old name comes second: transformers 5.24 warns when it is read.
    return getattr(output, _NEW, None) if hasattr(output, _NEW) else getattr(output, _OLD, None)
