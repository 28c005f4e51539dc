"""A state that grows token by token: what is packed when, and how much room is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from states import check_state, new_rows, prefill, queries, spec_of, step, tokens

from spark_compile import SparkConfig
from spark_compile.kernels.spec import TAIL_STEP
from spark_compile.state import SparkTensor

POLICIES: list[dict[str, Any]] = [
    {},
    {"sink_tokens": 3},
    {"recent_tokens": 0},
    {"recent_tokens": 9, "sink_tokens": 1},
    {"min_tokens": 25},
    {"min_tokens": 25, "sink_tokens": 2, "recent_tokens": 1},
]


@pytest.mark.parametrize("length", [1, 8, 21])
@pytest.mark.parametrize("chunk", [1, 3, 11])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_whole_pages_are_packed_when_they_are_full(
    policy: dict[str, Any], chunk: int, length: int
) -> None:
    config = SparkConfig(key_ratio=0, window=4, **policy)
    made = prefill(config, length)
    states: Any = made.states
    rows: tuple[torch.Tensor, ...] = (made.key, made.value)
    for _ in range(33 // chunk + 1):
        total = rows[0].shape[2]
        packed = max(total - (config.sink_tokens or 0) - config.recent, 0) // 4 * 4
        packed = packed if total >= config.min_tokens else 0
        for state, dense in zip(states, rows, strict=True):
            assert state.packed_tokens() == packed
            assert torch.equal(state.dense(), dense)
        new = tokens(chunk)
        states = step(*states, queries(chunk), new)
        rows = tuple(torch.cat(pair, 2) for pair in zip(rows, new, strict=True))
    assert packed > 0


@pytest.mark.parametrize("saliency", ["squared", "absolute"])
@pytest.mark.parametrize("length", [5, 21])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_sinks_and_recent_tokens_stay_dense_and_the_rest_is_pruned_by_the_latest_queries(
    policy: dict[str, Any], length: int, saliency: Any
) -> None:
    config = SparkConfig(key_ratio=0.6, value_ratio=0.5, window=4, saliency=saliency, **policy)
    made = prefill(config, length)
    states: Any = made.states
    models, rows = made.models(), (made.key, made.value)
    for _ in range(29):
        query, new = queries(), tokens(1)
        states = step(*states, query, new)
        rows = tuple(torch.cat(pair, 2) for pair in zip(rows, new, strict=True))  # type: ignore[assignment]
        for state, model, fresh, dense in zip(states, models, new, rows, strict=True):
            model.append(fresh, query=query)
            check_state(state, model)
            first, packed = config.sink_tokens or 0, state.packed_tokens()
            worth = state.dense()
            assert torch.equal(worth[:, :, :first], dense[:, :, :first])
            assert torch.equal(worth[:, :, first + packed :], dense[:, :, first + packed :])
            body = slice(first, first + packed)
            changed = (worth[:, :, body] != dense[:, :, body]).any(-1)
            assert changed.all()
            assert dense.shape[2] - first - packed >= min(config.recent, length - first)
    assert states[0].packed_tokens() >= 8


def test_packing_keeps_earlier_handles() -> None:
    made = prefill(SparkConfig(key_ratio=0.6, window=4))
    longer = step(*made.states, queries(2), tokens(2))
    before = [state.dense() for state in (*made.states, *longer)]
    packed = step(*longer, queries(2), tokens(2))
    for old, mid, new in zip(made.states, longer, packed, strict=True):
        assert new.packed_tokens() == old.packed_tokens() + 4
        assert mid.packed_tokens() == old.packed_tokens()
    for state, dense in zip((*made.states, *longer), before, strict=True):
        assert torch.equal(state.dense(), dense)


def check_room(state: SparkTensor, config: SparkConfig) -> None:
    """No more room than for a page in 32, at least one, and for the tail of the policy."""
    spec, packed = spec_of(config), state.packed_tokens() // config.window
    dense = state.shape[2] - state.packed_tokens()
    assert state.pages.shape[2] <= packed + max(1, packed // 32) + 1
    rows = spec.head(state.SIDE).tail_rows(state.head)
    full = spec.most_tail_rows if packed else 0  # the step that packs reads that many
    assert rows < max(full, dense) + TAIL_STEP


@pytest.mark.parametrize("length", [3, 300])
@pytest.mark.parametrize("policy", [{}, {"min_tokens": 1000}], ids=str)
def test_room_is_bounded_and_growing_rarely_copies(policy: dict[str, int], length: int) -> None:
    config = SparkConfig(window=4, **policy)
    states: Any = prefill(config, length, batch=1).states
    moves, pointers = [0] * 4, [0] * 4
    for _ in range(100):
        for state in states:
            check_room(state, config)
        states = step(*states, queries(1, 1), tokens(1, batch=1))
        now = [t.data_ptr() for state in states for t in (state.pages, state.head)]
        moves = [m + (a != b) for m, a, b in zip(moves, now, pointers, strict=True)]
        pointers = now
    tail = 100 if config.min_tokens else spec_of(config).most_tail_rows
    assert max(moves) <= 100 // config.window + 2 + tail // TAIL_STEP
    pages = 100 // config.window // max(1, length // config.window // 32) + 2
    assert max(moves[0], moves[2]) <= pages


@pytest.mark.parametrize("length", [0, 1, 5, 36])
def test_a_short_cache_takes_little_more_than_its_tokens(length: int) -> None:
    config = SparkConfig(key_ratio=0.5, window=32)
    states: Any = prefill(config, length, batch=1).states
    for count in range(length, 64):
        for state in states:
            layout = state.spec.head(state.SIDE)
            spare = state.head.shape[2] - layout.offsets["tail"] - count * layout.row_bytes
            assert 0 <= spare < TAIL_STEP * layout.row_bytes
            assert not state.packed_tokens()
            assert not state.pages.any()
        states = step(*states, queries(1, 1), tokens(1, batch=1))
    assert [state.packed_tokens() for state in states] == [32, 32]


@pytest.mark.parametrize("policy", [{}, {"min_tokens": 1000}], ids=str)
def test_a_copied_prefix_keeps_no_more_room_than_it_needs(policy: dict[str, int]) -> None:
    config = SparkConfig(window=4, key_ratio=0.5, **policy)
    for state in prefill(config, 300).states:
        short = state[:, :, :20]
        assert short.pages.data_ptr() == state.pages.data_ptr()
        for _ in range(9):
            short = short.appended(new_rows(state, 1))
        check_room(short.clone(), config)
        if not policy:  # with it nothing was packed
            assert short.pages.data_ptr() != state.pages.data_ptr()
            check_room(short, config)


def test_a_step_without_room_takes_the_earlier_handle_along() -> None:
    """A cache holds its handles until the step is over: each layer would have two buffers."""
    made = prefill(SparkConfig(key_ratio=0.6, window=4), 40)
    states, before = made.states, [state.dense() for state in made.states]
    longer = step(*states, queries(30), tokens(30))
    for old, new, dense in zip(states, longer, before, strict=True):
        assert new.pages.shape[2] > 10
        assert new.pages.data_ptr() == old.pages.data_ptr()
        assert torch.equal(old.dense(), dense)
    # It has not become the newest one by that.
    beside = step(*states, queries(5), tokens(5))
    after = [state.dense() for state in longer]
    for old, new, other in zip(states, longer, beside, strict=True):
        assert other.pages.data_ptr() not in (new.pages.data_ptr(), old.pages.data_ptr())
    for state, dense in zip(longer, after, strict=True):
        assert torch.equal(state.dense(), dense)
