"""States of models that have their tokens before the heads, which may be merged with the channels,
and slices written by a model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from states import BATCH, HEADS, KEY_DIM, new_rows, prefill, reloaded, spec_of, static
from torch import Tensor

from spark_compile import SparkConfig
from spark_compile.form import StateForm
from spark_compile.state import SparkTensor, new_state

CAPACITY = 30
EXACT = SparkConfig(key_ratio=0, window=4)


def turned(state: SparkTensor, merged: bool = False) -> SparkTensor:
    """A copy of a state [B, Hkv, S, D] as one of [B, S, Hkv, D], or [B, S, Hkv * D]."""
    form = StateForm(state.spec, state.static, tokens_dim=1, merged=merged)
    own = state.clone()
    assert isinstance(own, SparkTensor)
    return new_state(state.SIDE, form, own.pages, own.head, state.tokens)


def both_layouts(length: int, *, fixed: bool) -> list[SparkTensor]:
    made = static(EXACT, length, CAPACITY) if fixed else prefill(EXACT, length)
    return [*made.states, *(turned(state) for state in made.states)]


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "crop": lambda x: x[:, :7],
    "crop by narrow": lambda x: x.narrow(1, 0, 5),
    "whole slice": lambda x: x[..., :],
    "batch": lambda x: x[1:],
    "index_select": lambda x: x.index_select(0, torch.tensor([1, 1, 0])),
    "clone": lambda x: x.clone(),
    "deepcopy": copy.deepcopy,
    "cat": lambda x: torch.cat((x, torch.ones(x.shape)[:, :9]), 1),
    "cat, negative dim": lambda x: torch.cat((x, torch.ones(x.shape)[:, :2]), 1 - x.dim()),
    "index_select, negative dim": lambda x: x.index_select(-x.dim(), torch.tensor([1, 0])),
    "copy_": lambda x: x.clone().copy_(torch.ones(x.shape)),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 0),
    "zero_": lambda x: x.clone().zero_(),
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_tokens_in_the_second_dimension_stay_compressed(
    name: str, merged: bool, recwarn: pytest.WarningsRecorder
) -> None:
    for heads_first in prefill(EXACT, 21).states:
        state = turned(heads_first, merged)
        rows, before = heads_first.dense(), state.dense()
        assert torch.equal(
            before, rows.transpose(1, 2).flatten(2) if merged else rows.transpose(1, 2)
        )
        assert state.shape == before.shape
        result, expected = CHANGES[name](state), CHANGES[name](before)
        assert isinstance(result, type(state))
        assert result.shape == expected.shape
        assert torch.equal(result.dense(), expected)
        again = torch.cat((result, torch.ones(expected.shape)[:, :3]), 1)
        assert isinstance(again, type(state))
        assert torch.equal(
            again.dense(), torch.cat((expected, torch.ones(expected[:, :3].shape)), 1)
        )
        assert torch.equal(reloaded(again).dense(), again.dense())
        assert torch.equal(state.dense(), before)
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore::spark_compile.SparkWarning")
def test_the_dimension_of_the_heads_is_not_that_of_the_tokens() -> None:
    for state in map(turned, prefill(EXACT, 21).states):
        dense = state.dense()
        assert torch.equal(state[:, :, :2], dense[:, :, :2])
        assert torch.equal(torch.cat((state, dense), 2), torch.cat((dense, dense), 2))


def slices(dim: int, part: slice) -> list[Any]:
    """Every way to write the same slice of tokens."""
    before, behind = (slice(None),) * dim, (slice(None),) * (3 - dim)
    return [(*before, part), (*before, part, *behind), (..., part, *behind), (*before, part, ...)]


@pytest.mark.parametrize("way", range(4))
@pytest.mark.parametrize("part", [slice(12, 15), slice(3, 9), slice(None, 4), slice(20, 20)])
def test_a_slice_of_tokens_is_written(part: slice, way: int) -> None:
    for state in both_layouts(20 if part.start == 20 else 12, fixed=True):
        dim, dense, stop = state.form.tokens_dim, state.dense(), part.stop
        shape = list(state.shape)
        shape[dim] = len(range(CAPACITY)[part])
        rows = torch.randn(shape)
        index = slices(dim, part)[way]
        state[index] = rows
        dense[index] = rows
        if shape[dim]:
            dense.narrow(dim, stop, CAPACITY - stop).zero_()  # what followed is forgotten
        assert torch.equal(state.dense(), dense)


@pytest.mark.parametrize(
    "index", [slice(None), ..., (slice(None), ...), (slice(None),) * 3], ids=str
)
def test_all_tokens_are_written(index: Any) -> None:
    for state in both_layouts(12, fixed=True):
        rows = torch.randn(state.shape)
        state[index] = rows
        assert torch.equal(state.dense(), rows)


def test_a_number_is_written_into_every_channel() -> None:
    for state in both_layouts(12, fixed=True):
        dim, dense = state.form.tokens_dim, state.dense()
        index = slices(dim, slice(10, 14))[0]
        state[index] = 3
        dense[index] = 3
        assert torch.equal(state.dense(), dense)


@pytest.mark.parametrize(
    "index",
    [
        0, slice(0, 1), (..., slice(3, 5)),
        (slice(None), ..., slice(3, 5)), (..., slice(None), slice(3, 5)),
        (slice(None), slice(0, 1), slice(3, 5)), (slice(None), slice(None), 3),
        (slice(0, 1), slice(None), slice(3, 5)), (slice(None), 3), (..., 3, slice(None)),
        (slice(None), slice(None), slice(3, 5), slice(0, 2)),
    ],
    ids=str,
)  # fmt: skip
def test_other_parts_of_a_state_are_not_written(index: Any) -> None:
    """Above all no number meant for channels goes into tokens."""
    for state in both_layouts(12, fixed=True):
        before = state.dense()
        with pytest.raises(TypeError, match="only whole tokens"):
            state[index] = 0.0
        assert torch.equal(state.dense(), before)


@pytest.mark.parametrize("index", [slice(13, 15), slice(2, 9, 2), slice(12, 40)], ids=str)
def test_a_slice_that_leaves_a_gap_or_does_not_fit_raises(index: slice) -> None:
    for state in both_layouts(12, fixed=True):
        before, where = state.dense(), slices(state.form.tokens_dim, index)[0]
        with pytest.raises((ValueError, RuntimeError)):
            state[where] = new_rows(state, 28)
        assert torch.equal(state.dense(), before)


@pytest.mark.parametrize("write", ["index_copy_", "index_put_", "setitem"])
def test_positions_are_written_in_both_layouts(write: str) -> None:
    at = torch.tensor([12, 13])
    for state in both_layouts(12, fixed=True):
        dim, dense = state.form.tokens_dim, state.dense()
        rows = torch.randn([2 if i == dim else size for i, size in enumerate(state.shape)])
        for tensor in (state, dense):
            if write == "index_copy_":
                tensor.index_copy_(dim, at, rows)
            elif write == "index_put_":
                torch.ops.aten.index_put_(tensor, [*[None] * dim, at], rows)
            else:
                tensor[(*[slice(None)] * dim, at)] = rows
        assert torch.equal(state.dense(), dense)


@pytest.mark.parametrize("fixed", [False, True])
def test_all_tokens_are_written_anew(fixed: bool) -> None:
    """As a rolling window in eager code does it: copied with the first token dropped."""
    for state in both_layouts(28, fixed=fixed):
        rolled = torch.randn(state.shape).roll(-1, dims=state.form.tokens_dim)
        address = state.pages.data_ptr()
        state.copy_(rolled)
        assert torch.equal(state.dense(), rolled)
        assert state.packed_tokens() > 0
        assert (state.pages.data_ptr() == address) == fixed
        state.copy_(torch.ones(1, dtype=torch.float64))
        assert torch.equal(state.dense(), torch.ones(state.shape))


def test_a_form_says_the_shape() -> None:
    spec, head = spec_of(EXACT), torch.zeros(BATCH, HEADS, 64, dtype=torch.uint8)
    assert StateForm(spec).shape("key", head, 9) == (BATCH, HEADS, 9, KEY_DIM)
    assert StateForm(spec, True, 1).shape("key", head, 9) == (BATCH, 9, HEADS, KEY_DIM)
    merged = StateForm(spec, tokens_dim=1, merged=True)
    assert merged.shape("key", head, 9) == (BATCH, 9, HEADS * KEY_DIM)
