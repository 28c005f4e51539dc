"""Caches that slide: their first tokens leave, what is left is worth what it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from states import check_state, model_of, prefill, queries, reloaded, spec_of, step, tokens
from torch import Tensor

from spark_compile import SparkConfig
from spark_compile.kernels.reference.store import ALL
from spark_compile.state import SparkTensor

LENGTH, KEEP = 21, 17


def slid(states: Any, new: tuple[Tensor, Tensor], keep: int = KEEP) -> Any:
    """The states with new tokens behind their own, of which the last ones stay."""
    return step(*states, queries(new[0].shape[2], new[0].shape[0]), new, keep)


@pytest.mark.parametrize("chunk", [1, 3, 25])
@pytest.mark.parametrize("keep", [2, KEEP])
@pytest.mark.parametrize("options", [{}, {"min_tokens": 99}, {"recent_tokens": 0}], ids=str)
def test_what_is_left_is_what_came_last(options: dict[str, Any], keep: int, chunk: int) -> None:
    made = prefill(SparkConfig(key_ratio=0, window=4, **options), LENGTH)
    states, rows = made.states, (made.key, made.value)
    for _ in range(75 // chunk):
        new = tokens(chunk)
        before, old = [state.dense() for state in states], states
        states = slid(states, new, keep)
        rows = tuple(torch.cat(pair, 2)[:, :, -keep:] for pair in zip(rows, new, strict=True))  # type: ignore[assignment]
        for state, dense in zip(states, rows, strict=True):
            assert torch.equal(state.dense(), dense)
        for state, dense in zip(old, before, strict=True):
            assert torch.equal(state.dense(), dense)
    packs = keep == KEEP and "min_tokens" not in options
    assert not packs or states[0].packed_tokens() > 0


@pytest.mark.parametrize("options", [{}, {"min_tokens": 99}, {"recent_tokens": 30}], ids=str)
@pytest.mark.parametrize("keep", [2, KEEP])
def test_the_storage_stays_small(options: dict[str, Any], keep: int) -> None:
    """What has left leaves the pages and the tail; in a page, at most for a few steps."""
    config = SparkConfig(key_ratio=0, window=4, **options)
    states, spec = prefill(config, LENGTH).states, spec_of(config)
    states = slid(states, tokens(1), keep)
    for _ in range(150):
        states = slid(states, tokens(1), keep)
        for state in states:
            dense = state.shape[2] if "min_tokens" in options else config.recent
            rows = spec.head(state.SIDE).tail_rows(state.head)
            assert rows <= dense + 3 * config.window
            assert state.pages.shape[2] <= KEEP // config.window + 4
            assert state.packed_tokens() <= KEEP + 3 * config.window


@pytest.mark.parametrize("form", ["model", "int8"])
@pytest.mark.parametrize("recovery", ["degenerate", "none"])
def test_packed_tokens_leave_unchanged(form: Any, recovery: Any) -> None:
    config = SparkConfig(
        key_ratio=0.5, value_ratio=0.3, window=4, key_dtype=form, value_dtype=form,
        recovery=recovery,
    )  # fmt: skip
    states = prefill(config, LENGTH).states
    for _ in range(60):
        before = [state.dense() for state in states]
        states = slid(states, tokens(1))
        for after, old in zip((state.dense() for state in states), before, strict=True):
            left = old.shape[2] + 1 - KEEP
            same = KEEP - config.recent - 2 * config.window
            assert torch.equal(after[:, :, :same], old[:, :, left : left + same])


@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from([3, 8, 17, ALL])), max_size=14),
    st.integers(1, 20), st.sampled_from([0, 6, 15]), st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_steps_of_any_length_that_keep_any_number(
    program: list[tuple[int, int]], length: int, min_tokens: int, pruned: bool
) -> None:
    """The packing follows the model from where the state is: trimming may move its counters."""
    ratio = 0.5 if pruned else 0.0
    config = SparkConfig(key_ratio=ratio, value_ratio=ratio, window=3, min_tokens=min_tokens)
    states: Any = prefill(config, length).states
    for count, keep in program:
        query, new = queries(max(count, 1)), tokens(count)
        trimmed = [state.trimmed() for state in states]
        models = [model_of(state) for state in trimmed]
        for state, own in zip(states, trimmed, strict=True):
            assert torch.equal(state.dense(), own.dense())
        states = step(*states, query, new, keep)
        for state, model, rows in zip(states, models, new, strict=True):
            model.append(rows, keep, query)
            check_state(state, model)


def test_handles_on_one_storage_do_not_see_each_other() -> None:
    config = SparkConfig(key_ratio=0, window=4)
    made = prefill(config, LENGTH)
    shorter = slid(made.states, tokens(0), LENGTH - 5)
    rows = [dense[:, :, 5:] for dense in (made.key, made.value)]
    one, other = tokens(1), tokens(2)
    firsts = slid(shorter, one, ALL), slid(shorter, other, ALL)
    for i, (state, dense) in enumerate(zip(shorter, rows, strict=True)):
        first, second = firsts[0][i], firsts[1][i]
        cropped = first[:, :, :9]
        assert torch.equal(state.dense(), dense)
        assert torch.equal(first.dense(), torch.cat((dense, one[i]), 2))
        assert torch.equal(second.dense(), torch.cat((dense, other[i]), 2))
        assert torch.equal(cropped.dense(), dense[:, :, :9])
        again = cropped.appended(other[i])
        assert torch.equal(again.dense(), torch.cat((dense[:, :, :9], other[i]), 2))


COPIES: dict[str, Any] = {
    "deepcopy": (copy.deepcopy, slice(None)),
    "saved": (reloaded, slice(None)),
    "selected": (lambda state: state.index_select(0, torch.tensor([1, 1])), [1, 1]),
    "batch": (lambda state: state[1:], slice(1, None)),
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("keep", [3, 7, 18])
def test_copies_hold_what_is_left(name: str, keep: int) -> None:
    copied, entries = COPIES[name]
    config = SparkConfig(key_ratio=0, window=4, value_dtype="int8")
    made = prefill(config, LENGTH)
    for state in slid(made.states, tokens(0), keep):
        result, expected = copied(state), state.dense()[entries]
        assert type(result) is type(state)
        assert torch.equal(result.dense(), expected)
        new = state.dense()[entries][:, :, :2]
        assert torch.equal(result.appended(new).dense()[:, :, -2:], new)
        assert result.appended(new).shape[2] == keep + 2
        assert isinstance(result, SparkTensor)
        assert result.stored_bytes() <= made.keys.stored_bytes() + made.values.stored_bytes()
