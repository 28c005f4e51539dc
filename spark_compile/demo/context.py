"""The longest context in some memory, told from a cache that was measured."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..accounting import kv_bytes
from ..state import SparkTensor


def longest_context(sides: Iterable[Tensor], tokens: int, room_bytes: int) -> int:
    """How many tokens there would be in ``room_bytes`` if a cache went on like this one.

    Pages grow with the packed tokens, slack included, and dense tensors with all. Heads, which
    have the latest tokens in them, stay what they are, unless nothing is packed yet.

    Args:
        sides: keys and values of every layer, each with storage of its own.
        tokens: in each, at least one.

    Returns:
        A number of tokens; 0 where not even the heads have room.
    """
    fixed, per_token = 0.0, 0.0
    for side in sides:
        size, grown = kv_bytes(side), tokens
        if isinstance(side, SparkTensor) and side.packed_tokens():
            size, grown = kv_bytes(side.pages), side.packed_tokens()
            fixed += kv_bytes(side.head) - (tokens - grown) * size / grown
        per_token += size / grown
    return max(int((room_bytes - fixed) / per_token), 0)
