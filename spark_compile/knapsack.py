"""One choice for each of several items, with the least loss that a number of bytes allows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Choice = tuple[int, float]
"""Bytes and loss of one of an item's choices."""
STEPS = 1 << 16
"""Most units that the bytes are divided into: sums of 100 items are wrong by 1/600 of them."""


def solve(items: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """Minimize the sum of the losses, the sum of the bytes being at most ``budget``.

    The multiple-choice knapsack problem by dynamic programming over bytes, exact up to ``STEPS``
    bytes above the least; beyond that bytes are rounded up to units. Of equal losses the choice
    with fewer bytes wins.

    Args:
        items: the choices of each item.
        budget: a number of bytes.

    Returns:
        The index of the choice of each item.

    Raises:
        ValueError: the least bytes of all items are more than the budget.
    """
    least = [min(size for size, _ in choices) for choices in items]
    spare = budget - sum(least)
    if spare < 0:
        raise ValueError(f"budget is {budget} bytes: allowed is {sum(least)} or more")
    unit = max(-(-spare // STEPS), 1)
    units = spare // unit
    loss = torch.zeros(units + 1, dtype=torch.float64)  # by the units that are spent at most
    taken = []
    for choices, base in zip(items, least, strict=True):
        best = torch.full_like(loss, torch.inf)
        index = torch.zeros(units + 1, dtype=torch.int16)
        for number in sorted(range(len(choices)), key=lambda number: choices[number]):
            extra = -(-(choices[number][0] - base) // unit)
            if extra > units:
                break
            found = loss[: units + 1 - extra] + choices[number][1]
            better = found < best[extra:]
            best[extra:] = found.where(better, best[extra:])
            index[extra:].masked_fill_(better, number)
        loss = best
        taken.append(index)
    chosen, left = [], units
    for choices, base, index in zip(reversed(items), reversed(least), reversed(taken), strict=True):
        number = int(index[left])
        left -= -(-(choices[number][0] - base) // unit)
        chosen.append(number)
    return chosen[::-1]
