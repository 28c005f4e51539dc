"""Operators that are given what does not fit: they say so and change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stores import Store, store

from spark_compile import ops


def buffer(rows: int) -> torch.Tensor:
    return torch.randn(2, 3, rows, 5)


@pytest.mark.parametrize(
    ("start", "packed", "last"), [(3, None, 7), (8, 3, 9), (7, None, 11), (2, 5, 1)]
)
def test_append_without_room_raises_and_writes_nothing(
    start: int, packed: int | None, last: int
) -> None:
    rows = buffer(6)
    before, packed_length = rows.clone(), None if packed is None else torch.tensor(packed)
    with pytest.raises(ValueError, match=rf"to {last} do not fit into a buffer of 6"):
        ops.append(rows, torch.zeros(2, 3, 4, 5), start, packed_length)
    assert torch.equal(rows, before)


def test_append_fills_the_last_row() -> None:
    rows = buffer(6)
    ops.append(rows, torch.zeros(2, 3, 4, 5), 9, torch.tensor(7))
    assert torch.equal(rows[:, :, 2:], torch.zeros(2, 3, 4, 5))
    assert rows[:, :, :2].all()


@pytest.mark.parametrize("shape", [(1, 3, 2, 5), (2, 1, 2, 5), (2, 3, 2, 1)])
def test_append_of_another_shape_raises_and_writes_nothing(shape: tuple[int, ...]) -> None:
    rows = buffer(6)
    before = rows.clone()
    with pytest.raises((ValueError, RuntimeError)):
        ops.append(rows, torch.zeros(shape), 0)
    assert torch.equal(rows, before)


def append_attend(s: Store, tail: torch.Tensor, values: torch.Tensor) -> Any:
    new = torch.ones(2, 2, 3, 12), torch.ones(2, 2, 3, 10)
    how = (None, None, 0.4, 0.0, None, *s.method)
    return ops.append_attend(s.query, *new, *s.packed, tail, values, s.length, *how)


@pytest.mark.parametrize("short", ["tail", "values"])
def test_append_attend_without_room_raises_and_writes_nothing(short: str) -> None:
    s = store(room=4)
    tail, values = s.tail.clone(), s.values.clone()
    if short == "tail":
        tail = tail[:, :, :-2]
    else:
        values = values[:, :, :-2]
    before = tail.clone(), values.clone()
    with pytest.raises(ValueError, match="do not fit"):
        append_attend(s, tail, values)
    assert torch.equal(tail, before[0])
    assert torch.equal(values, before[1])


@pytest.mark.parametrize("kept", [0, -1, 13])
def test_prune_refuses_a_wrong_number_of_channels(kept: int) -> None:
    key, norms = torch.randn(1, 2, 3, 12), torch.rand(1, 2, 12)
    with pytest.raises(ValueError, match=rf"kept_channels is {kept}: allowed is 1 to 12"):
        ops.prune(key, norms, norms, kept, "degenerate", "squared")


@pytest.mark.parametrize("kept", [1, 12])
def test_prune_takes_the_extremes(kept: int) -> None:
    key, norms = torch.randn(1, 2, 3, 12), torch.rand(1, 2, 12)
    assert ops.prune(key, norms, norms, kept, "degenerate", "squared")[0].shape[3] == kept
