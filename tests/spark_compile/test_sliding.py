"""Caches that slide: their first tokens leave, what is left is worth what it was."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from states import HEADS, KEY_DIM, prefill, tokens
from torch import Tensor

from spark_compile import PrunedKeys, SparkConfig, StoredValues
from spark_compile.sliding import SlidingKeys, SlidingValues, dropped

LENGTH, WINDOW = 21, 17


def slid(state: Any, new: Tensor) -> Any:
    """The state with new tokens behind its own, and as many less in front as exceed the window."""
    longer = state.appended(new)
    if isinstance(longer, PrunedKeys):
        longer = longer.with_stats(longer.stats + torch.rand(2, HEADS, KEY_DIM) + 0.1)
    return dropped(longer, max(longer.shape[2] - WINDOW, 0))


@pytest.mark.parametrize("chunk", [1, 3, 25])
@pytest.mark.parametrize("options", [{}, {"min_tokens": 99}, {"recent_tokens": 0}], ids=str)
def test_what_is_left_is_what_came_last(options: dict[str, Any], chunk: int) -> None:
    made = prefill(SparkConfig(key_ratio=0, window=4, **options), LENGTH)
    keys, values, key, value = made.keys, made.values, made.key, made.value
    for _ in range(75 // chunk):
        new_key, new_value = tokens(chunk)
        keys, values = slid(keys, new_key), slid(values, new_value)
        key, value = (
            torch.cat(pair, 2)[:, :, -WINDOW:] for pair in ((key, new_key), (value, new_value))
        )
        assert (type(keys), type(values)) == (SlidingKeys, SlidingValues)
        assert torch.equal(keys.dense(), key)
        assert torch.equal(values.dense(), value)
    assert keys.packed_tokens() > 0 or "min_tokens" in options


@pytest.mark.parametrize("form", ["model", "int8"])
def test_pruned_tokens_leave_unchanged_and_the_storage_stays_small(form: Any) -> None:
    config = SparkConfig(key_ratio=0.5, window=4, key_dtype=form, value_dtype=form)
    made = prefill(config, LENGTH)
    keys, values = made.keys, made.values
    for _ in range(60):
        new_key, new_value = tokens(1)
        before = keys.dense(), values.dense()
        keys, values = slid(keys, new_key), slid(values, new_value)
        packed = keys.packed_tokens() - int(keys.first)
        for after, old in zip((keys.dense(), values.dense()), before, strict=True):
            kept = min(packed, 8) if after.shape[3] == KEY_DIM else WINDOW - 1
            left = old.shape[2] + 1 - WINDOW
            assert torch.equal(after[:, :, : kept - 1], old[:, :, left : left + kept - 1])
        rows = [keys.kept.shape[2] + keys.tail.shape[2], values.rows.shape[2]]
        assert max(rows) <= WINDOW + 4 * config.window


def test_handles_on_one_storage_do_not_see_each_other() -> None:
    config = SparkConfig(key_ratio=0, window=4)
    made = prefill(config, LENGTH)
    for state, new, dense in (
        (made.keys, tokens(2)[0], made.key),
        (made.values, tokens(2)[1], made.value),
    ):
        first = dropped(state, 5)
        one, other = first.appended(new[:, :, :1]), first.appended(new[:, :, 1:])
        cropped = one[:, :, :9]
        assert torch.equal(state.dense(), dense)
        assert torch.equal(one.dense(), torch.cat((dense[:, :, 5:], new[:, :, :1]), 2))
        assert torch.equal(other.dense(), torch.cat((dense[:, :, 5:], new[:, :, 1:]), 2))
        assert torch.equal(cropped.dense(), dense[:, :, 5:14])
        assert torch.equal(
            dropped(cropped, 2).appended(new).dense(), torch.cat((dense[:, :, 7:14], new), 2)
        )


def reloaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


COPIES: dict[str, Any] = {
    "deepcopy": (copy.deepcopy, slice(None)),
    "saved": (reloaded, slice(None)),
    "selected": (lambda state: state.index_select(0, torch.tensor([1, 1])), [1, 1]),
    "batch": (lambda state: state[1:], slice(1, None)),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_hold_what_is_left(name: str) -> None:
    copied, entries = COPIES[name]
    made = prefill(SparkConfig(key_ratio=0, window=4, value_dtype="int8"), LENGTH)
    for state in (dropped(made.keys, 3), dropped(made.values, 3)):
        result, expected = copied(state), state.dense()[entries]
        assert type(result) is type(state)
        assert torch.equal(result.dense(), expected)
        new = state.dense()[entries][:, :, :2]
        assert result.appended(new).shape[2] == LENGTH - 3 + 2
        assert result.stored_bytes() < made.keys.stored_bytes() + made.values.stored_bytes()


def test_a_state_that_nothing_left_is_worth_the_same() -> None:
    made = prefill(SparkConfig(window=4), LENGTH)
    state: PrunedKeys | StoredValues
    for state in (made.keys, made.values):
        assert torch.equal(dropped(state, 0).dense(), state.dense())
