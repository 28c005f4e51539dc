"""The choice for each item, against all of them tried."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_compile.knapsack import STEPS, Choice, solve

CHOICES = st.tuples(st.integers(0, 30), st.integers(0, 9).map(float))
ITEMS = st.lists(st.lists(CHOICES, min_size=1, max_size=4), min_size=1, max_size=4)


def totals(items: list[list[Choice]], picks: tuple[int, ...] | list[int]) -> tuple[float, int]:
    """Loss and bytes."""
    chosen = [choices[pick] for choices, pick in zip(items, picks, strict=True)]
    return sum(loss for _, loss in chosen), sum(size for size, _ in chosen)


def best(items: list[list[Choice]], budget: int) -> float:
    every = itertools.product(*(range(len(choices)) for choices in items))
    return min(loss for loss, size in (totals(items, p) for p in every) if size <= budget)


@settings(max_examples=200, deadline=None)
@given(ITEMS, st.integers(0, 60))
def test_no_other_choice_loses_less(items: list[list[Choice]], spare: int) -> None:
    budget = sum(min(size for size, _ in choices) for choices in items) + spare
    loss, size = totals(items, solve(items, budget))
    assert size <= budget
    assert loss == best(items, budget)


@settings(max_examples=50, deadline=None)
@given(ITEMS, st.integers(0, 60))
def test_large_numbers_keep_the_budget_and_lose_little(
    items: list[list[Choice]], spare: int
) -> None:
    """Bytes are rounded up to units: the choice is as good as any with that much less."""
    factor = 10**6 + 7
    large = [[(size * factor, loss) for size, loss in choices] for choices in items]
    least = sum(min(size for size, _ in choices) for choices in large)
    loss, size = totals(large, solve(large, least + spare * factor))
    assert size <= least + spare * factor
    unit = -(-spare * factor // STEPS)
    assert loss <= best(large, max(least, least + spare * factor - (len(items) + 1) * unit))


def test_of_equal_losses_the_smallest_wins() -> None:
    assert solve([[(9, 0.0), (3, 0.0), (5, 0.0)], [(4, 1.0), (2, 1.0)]], 100) == [1, 1]


def test_too_few_bytes_are_named() -> None:
    with pytest.raises(ValueError, match="budget is 4 bytes: allowed is 5 or more"):
        solve([[(2, 1.0), (7, 0.0)], [(3, 0.0)]], 4)
    assert solve([[(2, 1.0), (7, 0.0)], [(3, 0.0)]], 5) == [0, 0]
