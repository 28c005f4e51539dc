"""States of evicted prompts: handles, crops, beams, copies, files, and what cannot be recovered."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from states import (
    BATCH,
    HEADS,
    KEY_DIM,
    VALUE_DIM,
    new_rows,
    prefill,
    queries,
    reloaded,
    spec_of,
    step,
    tokens,
)
from torch import Tensor

from spark_compile import SparkConfig, SparkError, SparkWarning, kv_bytes, ops
from spark_compile.adoption import adopt
from spark_compile.form import StateForm
from spark_compile.kernels.layout import DROPPED, PACKED, counters
from spark_compile.kernels.reference.evict import take
from spark_compile.kernels.reference.store import Store
from spark_compile.passes.program import Adopted
from spark_compile.state import SparkTensor, new_state

CONFIG = SparkConfig(
    key_ratio=0.0, window=4, recent_tokens=3, sink_tokens=2, evict="snapkv(tokens=19,window=5)"
)
PROMPT, STAY, CHOSEN_END = 30, 19, 14  # 2 sinks, 3 pages, 5 latest tokens; 11 are evicted


def stored(length: int = PROMPT, capacity: int | None = None) -> list[Any]:
    """Key and value states of a prompt, as a graph makes them."""
    spec, query, (key, value) = spec_of(CONFIG), queries(length), tokens(length)
    kept = ops.evict(key, [query], None, 0, spec.text)
    rows = take(key, kept), take(value, kept)
    built = ops.build(*rows, [query], spec.text, capacity, kept)
    form = StateForm(spec, capacity is not None)
    size = length if capacity is None else capacity
    return [new_state("key", form, *built[:2], size), new_state("value", form, *built[2:], size)]


def kept_rows(state: SparkTensor) -> Tensor:
    """What is stored."""
    current = state.stored()
    return Store(current["pages"], current["head"], state.spec, state.SIDE).rows()


def attended(states: list[Any], query: Tensor, new: tuple[Tensor, Tensor]) -> Tensor:
    """What a step over copies of the states gives, under a mask that tells tokens apart."""
    keys, values = (state.grown(new[0].shape[2]) for state in states)
    mask = torch.arange(keys.shape[2]).remainder(7) / 3
    buffers = keys.pages, keys.head, values.pages, values.head
    return ops.step(query, *new, *buffers, mask, None, None, 2**62, None, keys.spec.text)


def check_equal(actual: list[Any], expected: list[Any]) -> None:
    """Both must be worth the same, tokens, positions and what they become."""
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.shape == theirs.shape
        assert torch.equal(kept_rows(mine), kept_rows(theirs))
        assert mine._read_counts().dropped == theirs._read_counts().dropped
    new, query = tokens(1, batch=actual[0].shape[0]), queries(1, batch=actual[0].shape[0])
    torch.testing.assert_close(attended(actual, query, new), attended(expected, query, new))


def test_a_state_has_the_shape_of_the_prompt() -> None:
    keys, values = stored()
    assert keys.shape == (BATCH, HEADS, PROMPT, KEY_DIM)
    assert values.shape == (BATCH, HEADS, PROMPT, VALUE_DIM)
    assert kept_rows(keys).shape[2] == STAY
    for _ in range(13):
        keys, values = step(keys, values, queries(), tokens(1))
    assert keys.shape[2] == values.shape[2] == PROMPT + 13
    assert kept_rows(keys).shape[2] == STAY + 13
    for state in (keys, values):
        known = state._read_counts()
        state._counts = None
        assert state._read_counts() == known
    assert "stored_bytes" in repr(keys)


def test_fewer_bytes_are_stored() -> None:
    whole = prefill(SparkConfig(key_ratio=0.0, window=4, recent_tokens=3, sink_tokens=2), PROMPT)
    assert kv_bytes(stored()) < kv_bytes(list(whole.states))
    assert kv_bytes(stored()) == kv_bytes(stored(200))


def test_a_short_prompt_can_be_recovered() -> None:
    for state in stored(STAY):
        assert state._read_counts().dropped == 0
        assert torch.equal(state.dense(), kept_rows(state))
        assert state[:, :, :3].shape[2] == 3


@pytest.mark.filterwarnings("ignore:aten.add.Tensor does not work on a compressed cache")
@pytest.mark.parametrize("capacity", [None, 60])
def test_evicted_tokens_are_not_recovered(capacity: int | None) -> None:
    for state in stored(capacity=capacity):
        with pytest.raises(SparkError, match="11 of the 30 tokens of a cache are evicted"):
            state.dense()
        with pytest.raises(SparkError, match="evicted tokens cannot be recovered"):
            state + 1


@pytest.mark.parametrize("length", [25, 27, PROMPT])
def test_a_crop_forgets_what_came_last(length: int) -> None:
    states = stored()
    expected = [kept_rows(state)[:, :, : length - 11] for state in states]
    cropped = [state[:, :, :length] for state in states]
    for state, rows in zip(cropped, expected, strict=True):
        assert state.shape[2] == length
        assert torch.equal(kept_rows(state), rows)
    for _ in range(9):
        keys, values = step(*cropped, queries(), tokens(1))
        cropped = [keys, values]
    # What was drafted and is given back is that of the handle before it.
    check_equal([state[:, :, :length] for state in cropped], [s[:, :, :length] for s in states])
    assert kept_rows(states[0]).shape[2] == STAY


@pytest.mark.parametrize("length", [1, 2, 11, 24])
def test_a_crop_among_evicted_tokens_raises(length: int) -> None:
    for state in stored():
        with pytest.raises(SparkError, match=rf"cut at {length} tokens: .* 25 tokens, of which 11"):
            state[:, :, :length]


def test_a_crop_to_nothing_makes_room_for_another_prompt() -> None:
    keys, values = (state[:, :, :0] for state in stored())
    assert keys.shape[2] == keys._read_counts().dropped == 0
    query, new = queries(40), tokens(40)
    grown = [state.grown(40) for state in (keys, values)]
    buffers = [tensor for state in grown for tensor in (state.pages, state.head)]
    ops.step(query, *new, *buffers, None, None, 0, 2**62, None, keys.spec.text)
    assert grown[0].shape[2] == 40
    assert grown[0]._read_counts().dropped == 21
    kept = ops.evict(new[0], [query], None, 0, keys.spec.text)
    assert torch.equal(kept_rows(grown[1]), take(new[1], kept))
    assert counters(grown[0].head)[0, 0].tolist()[1:] == list(grown[0]._read_counts())[:4]


def test_tokens_without_queries_are_not_evicted() -> None:
    keys = stored()[0][:, :, :0]
    appended = torch.cat((keys, new_rows(keys, 40)), 2)
    assert appended._read_counts().dropped == 0
    assert appended.dense().shape[2] == 40
    longer = torch.cat((stored()[0], new_rows(keys, 3)), 2)
    assert longer.shape[2] == PROMPT + 3
    assert longer._read_counts().dropped == 11


def test_two_continuations_of_one_prompt() -> None:
    states, new = stored(), [tokens(1) for _ in range(12)]
    before = [kept_rows(state) for state in states]
    one, other = states, states
    for first, second in zip(new, reversed(new), strict=True):
        one, other = list(step(*one, queries(), first)), list(step(*other, queries(), second))
    for state, rows in zip(states, before, strict=True):
        assert torch.equal(kept_rows(state), rows)
    for number in (0, 1):
        fresh = torch.cat([each[number] for each in new], 2)
        assert torch.equal(kept_rows(one[number])[:, :, STAY:], fresh)
        backwards = torch.cat([each[number] for each in reversed(new)], 2)
        assert torch.equal(kept_rows(other[number])[:, :, STAY:], backwards)


def test_beams_and_batches_take_their_positions_along() -> None:
    states = stored()
    index = torch.tensor([1, 0, 1])
    selected = [state.index_select(0, index) for state in states]
    repeated = [state.repeat_interleave(2, 0) for state in states]
    for chosen, entries in ((selected, index), (repeated, torch.tensor([0, 0, 1, 1]))):
        query, new = queries(1), tokens(1)
        expected = attended(states, query, new)[entries]
        actual = attended(chosen, query[entries], (new[0][entries], new[1][entries]))
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("capacity", [None, 60])
@pytest.mark.parametrize("change", [copy.deepcopy, reloaded, torch.clone])
def test_copies_and_files(change: Any, capacity: int | None) -> None:
    states = stored(capacity=capacity)
    changed = [change(state) for state in states]
    for mine, theirs in zip(changed, states, strict=True):
        assert mine.shape == theirs.shape
        assert torch.equal(kept_rows(mine), kept_rows(theirs))
        assert int(counters(mine.head)[0, 0, DROPPED]) == 11
    if capacity is None:
        check_equal(changed, states)


DAMAGED = {"dropped": (DROPPED, -1), "packed": (PACKED, 8)}


@pytest.mark.parametrize("damage", ["descending", "late", *DAMAGED])
@pytest.mark.parametrize("capacity", [None, 60])
def test_a_damaged_file_is_refused(damage: str, capacity: int | None) -> None:
    state = stored(capacity=capacity)[0]
    position = state.spec.pages("key").views(state.pages)["position"]
    if damage == "descending":
        position[1, 2, 1, 2] = position[1, 2, 1, 1]
    elif damage == "late":
        position[0, 0, 2, 3] = 25
    else:
        counter, value = DAMAGED[damage]
        counters(state.head)[..., counter] = value
        # A growing state writes the counters that it knows.
        state._counts = state._read_counts()._replace(**{damage: value})
    with pytest.raises(
        ValueError, match=r"position of the packed|DROPPED is -1|PACKED is 11,|is 8"
    ):
        reloaded(state)


def test_a_static_state_is_written_by_position() -> None:
    state, rows = stored(capacity=60)[1], new_rows(stored()[1], 4)
    before = kept_rows(state)
    state.index_copy_(2, torch.arange(30, 34), rows)
    assert torch.equal(kept_rows(state), torch.cat((before, rows), 2))
    state.index_copy_(2, torch.arange(28, 32), rows)
    assert torch.equal(kept_rows(state), torch.cat((before[:, :, :17], rows), 2))
    with pytest.raises(ValueError, match="position 24 is among the first 25 tokens"):
        state.index_copy_(2, torch.arange(24, 28), rows)
    with pytest.raises(IndexError, match="position 61 is beyond 60 tokens"):
        state.index_copy_(2, torch.arange(32, 62), rows[:, :, :1].expand(-1, -1, 30, -1))
    state.zero_()
    state.index_copy_(2, torch.arange(4), rows)
    assert torch.equal(state.dense()[:, :, :4], rows)


def test_a_buffer_that_was_filled_before_keeps_all_and_says_so() -> None:
    how = Adopted("key", StateForm(spec_of(CONFIG), True), None)
    buffer = torch.randn(BATCH, HEADS, PROMPT, KEY_DIM)
    expected = buffer.clone()
    with pytest.warns(SparkWarning, match=r"had 30 tokens before .* they all stay, since snapkv"):
        state = adopt(buffer, how, ())
    assert torch.equal(state.dense(), expected)
