"""The compressed state as a tensor: what it is worth, and the operators that keep it compressed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from states import (
    BATCH,
    HEADS,
    KEY_DIM,
    VALUE_DIM,
    check_state,
    model_of,
    new_rows,
    prefill,
)
from torch import Tensor

from spark_compile import PrunedKeys, SparkConfig, StoredValues
from spark_compile.state import SparkTensor

EXACT = SparkConfig(key_ratio=0, window=4)
PRUNED = SparkConfig(key_ratio=0.6, window=4, sink_tokens=2)
SMALL = SparkConfig(
    key_ratio=0.6, value_ratio=0.5, window=4, key_dtype="int8", value_dtype="int8", recent_tokens=1
)
CONFIGS = {"exact": EXACT, "pruned": PRUNED, "small": SMALL}

KEPT_COMPRESSED: dict[str, Callable[[Tensor], Any]] = {
    "crop": lambda x: x[..., :-3, :],
    "crop between two pages": lambda x: x[..., :10, :],
    "crop into a page": lambda x: x[..., :-12, :],
    "crop into the sinks": lambda x: x[:, :, :1],
    "crop to nothing": lambda x: x[..., :0, :],
    "crop by more than there is": lambda x: x[..., :-100, :],
    "whole slice": lambda x: x[:, :, :, :],
    "index_select": lambda x: x.index_select(0, torch.tensor([1, 0, 1])),
    "index_select, negative dim": lambda x: x.index_select(-4, torch.tensor([1])),
    "advanced index": lambda x: x[torch.tensor([1, 1, 0]), ...],
    "advanced index, list": lambda x: x[[1, 0]],
    "advanced index, bool": lambda x: x[torch.tensor([False, True])],
    "batch slice": lambda x: x[1:],
    "batch slice with a step": lambda x: x[::2],
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=0),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "detach": lambda x: x.detach(),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "to the same dtype": lambda x: x.to(torch.float32),
    "to the same device": lambda x: x.to("cpu", non_blocking=True),
    "to, copied": lambda x: x.to("cpu", torch.float32, copy=True),
    "cat of none": lambda x: torch.cat((x, torch.empty(*x.shape[:2], 0, x.shape[3])), dim=-2),
    "zero_": lambda x: x.clone().zero_(),
}


def both(config: SparkConfig) -> tuple[SparkTensor, SparkTensor]:
    return prefill(config).states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 7, 8, 21])
def test_a_state_looks_like_the_dense_tensor(length: int, dtype: torch.dtype) -> None:
    made = prefill(EXACT, length, dtype=dtype)
    assert isinstance(made.keys, PrunedKeys)
    assert isinstance(made.values, StoredValues)
    assert made.keys.shape == (BATCH, HEADS, length, KEY_DIM)
    assert made.values.shape == (BATCH, HEADS, length, VALUE_DIM)
    for state in (made.keys, made.values):
        assert state.dtype == state.dense().dtype == dtype
        assert state.device.type == "cpu"
        assert not state.requires_grad
        assert state.dense().shape == state.shape


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("length", [1, 7, 8, 21])
def test_ratio_zero_is_exact(length: int, sinks: int) -> None:
    config = SparkConfig(key_ratio=0, window=4, sink_tokens=sinks)
    made = prefill(config, length)
    for state, rows in zip(made.states, (made.key, made.value), strict=True):
        assert state.packed_tokens() == max(length - sinks - 4, 0) // 4 * 4
        assert torch.equal(state.dense(), rows)


@pytest.mark.parametrize("recovery", ["degenerate", "none", "exponential", "gaussian"])
@pytest.mark.parametrize("saliency", ["squared", "absolute"])
@pytest.mark.parametrize("length", [9, 30])
def test_pruned_states_are_worth_what_the_formats_say(
    length: int, saliency: Any, recovery: Any
) -> None:
    config = SparkConfig(
        key_ratio=0.6, value_ratio=0.5, window=4, sink_tokens=1, saliency=saliency,
        recovery=recovery,
    )  # fmt: skip
    made = prefill(config, length)
    dense_rows = made.key, made.value
    for state, model, rows in zip(made.states, made.models(), dense_rows, strict=True):
        torch.testing.assert_close(state.dense(), model.rows)
        assert not torch.equal(state.dense(), rows)
        assert torch.equal(state.dense()[:, :, :1], rows[:, :, :1])
        assert torch.equal(state.dense()[:, :, -4:], rows[:, :, -4:])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", KEPT_COMPRESSED)
def test_known_operators_keep_the_state_compressed(
    name: str, config: str, recwarn: pytest.WarningsRecorder
) -> None:
    for state in both(CONFIGS[config]):
        before = state.dense()
        result, expected = (KEPT_COMPRESSED[name](x) for x in (state, before))
        assert type(result) is type(state)
        assert result.spec is state.spec
        assert result.shape == expected.shape
        assert result.dtype == expected.dtype
        assert torch.equal(result.dense(), expected)
        assert torch.equal(state.dense(), before)
    assert not recwarn.list


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("counts", [[5], [1, 2], [0], [3, 30, 1]], ids=str)
def test_cat_appends_and_packs(
    counts: list[int], config: str, recwarn: pytest.WarningsRecorder
) -> None:
    for state in both(CONFIGS[config]):
        model, before = model_of(state), state.dense()
        new = [new_rows(state, count) for count in counts]
        longer = torch.cat((state, *new), dim=-2)
        for rows in new:
            model.append(rows)
        assert isinstance(longer, type(state))
        check_state(longer, model)
        assert torch.equal(state.dense(), before)
    assert not recwarn.list


@pytest.mark.parametrize("name", KEPT_COMPRESSED)
def test_results_of_known_operators_can_be_continued(name: str) -> None:
    for state in both(PRUNED):
        result = KEPT_COMPRESSED[name](state)
        before, model, longer = (state.dense(), result.dense()), model_of(result), result
        for count in (1, 7, 3):
            new = new_rows(result, count)
            model.append(new)
            longer = torch.cat((longer, new), dim=2)
            check_state(longer, model)
        again = torch.cat((longer[:, :, :-2], new), dim=2)
        model.crop(model.length - 2)
        model.append(new)
        check_state(again, model)
        assert torch.equal(state.dense(), before[0])
        assert torch.equal(result.dense(), before[1])


def test_zero_works_in_place_and_alone() -> None:
    for state in both(PRUNED):
        other, before = state.clone(), state.dense()
        crop = state[:, :, :5]
        assert state.zero_() is state
        assert not state.dense().any()
        assert torch.equal(other.dense(), before)
        assert torch.equal(crop.dense(), before[:, :, :5])


def test_copies_have_a_storage_of_their_own() -> None:
    for state in both(PRUNED):
        for change in (copy.copy, copy.deepcopy, torch.clone, lambda x: x.index_select(0, ENTRIES)):
            copied = change(state)
            assert copied.pages.data_ptr() != state.pages.data_ptr()
            assert copied.head.data_ptr() != state.head.data_ptr()


ENTRIES = torch.arange(BATCH)


def test_deepcopy_keeps_identities() -> None:
    keys, values = both(PRUNED)
    first, second, third = copy.deepcopy((keys, values, keys))
    assert first is third
    assert isinstance(second, StoredValues)


def test_dense_is_a_copy() -> None:
    for state in both(EXACT):
        before = state.dense().clone()
        state.dense().fill_(7)
        assert torch.equal(state.dense(), before)
        short, taken = state[:, :, :-3], state.dense()
        del state
        torch.cat((short, new_rows(short, 3)), dim=2)  # over the three tokens in the buffer
        assert torch.equal(taken, before)


def test_repr_says_what_is_stored() -> None:
    for state in both(PRUNED):
        text = repr(state)
        assert text.startswith(type(state).__name__)
        assert str(tuple(state.shape)) in text
        assert str(state.stored_bytes()) in text


def test_stored_bytes_are_those_of_the_stored_tensors() -> None:
    for state in both(PRUNED):
        stored = sum(t.untyped_storage().nbytes() for t in state.stored().values())
        assert state.stored_bytes() == stored
