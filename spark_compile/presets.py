"""What the option ``budget`` stands for: shares by name, and a ladder of formats.

A share is of the bytes of dense keys and values, and everything counts: pages, constants, query
statistics, the dense tail, and the most slack that growth leaves. It is stated for ``TOKENS``
tokens; a longer cache takes a smaller one, down to about the share of a packed token.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from .kernels.formats import Format, parse
from .kernels.spec import SIDES, Side, Spec
from .sharing import slack

TOKENS = 4096
"""Length of the cache that a share is stated for."""
SHARES = {"near-lossless": 0.45, "balanced": 0.3, "smallest": 0.18}
"""The budgets that have a name."""
NAMES = ", ".join(map(repr, SHARES))
MEANING = (
    "Share of dense key and value bytes that a cache may take, up to 1, or "
    f"{', '.join(f'{name} ({share})' for name, share in SHARES.items())}; chooses the formats in "
    "place of ratios and dtypes. Everything counts (pages, constants, statistics, tail, slack) "
    f"at {TOKENS:,} tokens: shorter caches and sliding windows take a larger share, longer ones a "
    "smaller one, down to that of a packed token."
)
"""Of the option."""
_BITS = (
    ("3-2-1-1", 2),
    ("4-2-1-1", 2),
    ("4-2-2-1", 2),
    ("4-3-2-2", 2),
    ("4-2-2-1", 3),
    ("4-3-2-2", 3),
    ("4-3-3-2", 3),
    ("4-4-3-3", 3),
    ("5-3", 3),
    ("5-3", 4),
    ("5-5-4-4", 4),
    ("6-5-5-4", 4),
    ("6-5-5-4", 5),
    ("6", 5),
    ("6", 6),
    ("8", 6),
    ("8", 8),
)
LADDER = tuple(
    (f"quantized(bits={key},scaled=True)", f"quantized(bits={value})") for key, value in _BITS
)
"""Formats of keys and of values, from the fewest bytes to the most."""
Size = tuple[int, torch.dtype]
"""D and the dtype of one side's dense tokens."""


def share_named(budget: object) -> float | None:
    """A budget as a number; None if it is not allowed."""
    if isinstance(budget, str):
        return SHARES.get(budget)
    is_number = isinstance(budget, int | float) and not isinstance(budget, bool)
    return float(budget) if is_number and 0 < budget <= 1 else None  # type: ignore[operator, arg-type]


def side_bytes(spec: Spec, side: Side, tokens: int = TOKENS) -> int:
    """Most bytes that a growing cache of ``tokens`` tokens takes for one key head of a side."""
    due = int(spec.pages_due(tokens, tokens))
    pages, rows = max(due + slack(due, 1), 2), max(spec.most_tail_rows, int(spec.tail_rows(tokens)))
    shapes = spec.stored_shapes(side, (1, 1), pages, rows)
    return sum(math.prod(map(int, shape)) for shape in shapes)


def dense_bytes(format: Format, tokens: int = TOKENS) -> int:
    """Bytes of the dense tokens of one key head that a format stores."""
    return tokens * format.head_dim * format.dtype.itemsize


def share_of(spec: Spec, tokens: int = TOKENS) -> float:
    """The share of the dense bytes that a site's cache takes."""
    stored = sum(side_bytes(spec, side, tokens) for side in SIDES)
    return stored / sum(dense_bytes(spec.format(side), tokens) for side in SIDES)


def candidates(side: Side, size: Size) -> Iterator[Format]:
    """The formats of a side of the ladder, each once, but those that have no such head size."""
    known = set()
    for rung in LADDER:
        try:
            format = parse(rung[SIDES.index(side)], *size)
        except ValueError:
            continue  # channels that do not divide into its parts
        if format not in known:
            known.add(format)
            yield format


@functools.lru_cache(maxsize=256)
def best_rung(
    budget: float,
    sizes: tuple[Size, Size],
    named: tuple[Format | None, Format | None],
    policy: Spec,
) -> tuple[Format, Format]:
    """The last rung of the ladder that fits into a budget: formats of keys and of values.

    Args:
        budget: a share.
        sizes: of keys and of values.
        named: formats that are given, which count in place of the rung's.
        policy: a spec that says when tokens are packed.

    Raises:
        ValueError: no rung fits; the message says which budget one would fit into.
    """
    best, least = None, math.inf
    for rung in LADDER:
        try:
            key, value = (
                given or parse(text, *size)
                for given, text, size in zip(named, rung, sizes, strict=True)
            )
        except ValueError:
            continue  # channels that do not divide into its parts
        share = share_of(replace(policy, key=key, value=value))
        least = min(least, share)
        if share <= budget:
            best = key, value
    if best is None:
        dims = "/".join(str(dim) for dim, _ in sizes)
        raise ValueError(
            f"option 'budget' is {budget:g}: for head sizes {dims} in {sizes[0][1]}, allowed is "
            f"{math.ceil(least * 1e4) / 1e4} or more (share of dense bytes at {TOKENS:,} tokens)"
        )
    return best
