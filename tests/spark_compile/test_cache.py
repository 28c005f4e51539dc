"""The compressed state as a tensor: what it is worth, and the operators that keep it compressed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from states import BATCH, HEADS, KEY_DIM, VALUE_DIM, dense, expected_keys, prefill, tokens
from torch import Tensor

from spark_compile import PrunedKeys, SparkConfig, StoredValues
from spark_compile.state import SparkTensor

EXACT = SparkConfig(key_ratio=0, window=4)
PRUNED = SparkConfig(key_ratio=0.6, window=4, sink_tokens=2)
CONFIGS = [EXACT, PRUNED]

KEPT_COMPRESSED: dict[str, Callable[[Tensor], Any]] = {
    "crop": lambda x: x[..., :-3, :],
    "crop into the packed tokens": lambda x: x[..., :-12, :],
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
    "cat": lambda x: torch.cat((x, new_tokens(x, 5)), dim=-2),
    "cat of three": lambda x: torch.cat([x, new_tokens(x, 1), new_tokens(x, 2)], 2),
    "cat of none": lambda x: torch.cat((x, new_tokens(x, 0)), dim=-2),
    "zero_": lambda x: x.clone().zero_(),
}


def new_tokens(like: Tensor, count: int) -> Tensor:
    """The same new tokens for a state and for its dense tensor."""
    batch, heads, _, dim = like.shape
    size = batch * heads * count * dim
    return torch.linspace(-1, 1, max(size, 1))[:size].view(batch, heads, count, dim)


def both(config: SparkConfig, **how: Any) -> tuple[SparkTensor, SparkTensor]:
    made = prefill(config, **how)
    return made.keys, made.values


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
def test_ratio_zero_and_values_are_exact(length: int, sinks: int) -> None:
    config = SparkConfig(key_ratio=0, window=4, sink_tokens=sinks)
    made = prefill(config, length)
    assert made.keys.packed_tokens() == config.packed_length(length)
    assert torch.equal(made.keys.dense(), made.key)
    assert torch.equal(made.values.dense(), made.value)


@pytest.mark.parametrize("recovery", ["degenerate", "none", "exponential", "gaussian"])
@pytest.mark.parametrize("saliency", ["squared", "absolute"])
@pytest.mark.parametrize("length", [9, 30])
def test_pruned_keys_are_those_of_the_reference(length: int, saliency: Any, recovery: Any) -> None:
    config = SparkConfig(
        key_ratio=0.6, window=4, sink_tokens=1, saliency=saliency, recovery=recovery
    )
    made = prefill(config, length)
    torch.testing.assert_close(made.keys.dense(), expected_keys(made, config))
    assert not torch.equal(made.keys.dense(), made.key)


@pytest.mark.parametrize("config", CONFIGS, ids=["exact", "pruned"])
@pytest.mark.parametrize("name", KEPT_COMPRESSED)
def test_known_operators_keep_the_state_compressed(
    name: str, config: SparkConfig, recwarn: pytest.WarningsRecorder
) -> None:
    for state in both(config):
        before = state.dense()
        result, expected = (KEPT_COMPRESSED[name](x) for x in (state, before))
        assert type(result) is type(state)
        assert result.config == config
        assert result.shape == expected.shape
        assert result.dtype == expected.dtype
        assert torch.equal(result.dense(), expected)
        assert torch.equal(state.dense(), before)
    assert not recwarn.list


@pytest.mark.parametrize("name", KEPT_COMPRESSED)
def test_results_of_known_operators_can_be_continued(name: str) -> None:
    for state in both(PRUNED):
        result = KEPT_COMPRESSED[name](state)
        before = state.dense(), dense(result)
        longer = torch.cat((result, new_tokens(result, 7)), dim=2)
        again = torch.cat((longer[:, :, :-2], new_tokens(result, 3)), dim=2)
        expected = torch.cat((before[1], new_tokens(result, 7)), dim=2)
        assert torch.equal(dense(longer), expected)
        expected = torch.cat((expected[:, :, :-2], new_tokens(result, 3)), dim=2)
        assert torch.equal(dense(again), expected)
        assert torch.equal(state.dense(), before[0])
        assert torch.equal(dense(result), before[1])


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
        pointers = {t.data_ptr() for t in state.stored().values()}
        for change in (copy.copy, copy.deepcopy, torch.clone, lambda x: x.index_select(0, ALL)):
            assert pointers.isdisjoint(t.data_ptr() for t in change(state).stored().values())


ALL = torch.arange(BATCH)


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
        torch.cat((short, new_tokens(short, 3)), dim=2)  # over the three tokens in the buffer
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


def test_new_tokens_are_appended_exactly() -> None:
    made, new = prefill(PRUNED), tokens(3)
    for state, fresh in ((made.keys, new[0]), (made.values, new[1])):
        longer = state.appended(fresh)
        assert torch.equal(longer.dense()[:, :, -3:], fresh)
        assert torch.equal(longer.dense()[:, :, :-3], state.dense())
