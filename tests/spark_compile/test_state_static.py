"""States of a fixed capacity: written in place at positions, zeros where no token is yet."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from states import Prefill, new_rows, queries, reloaded, static, tokens
from torch import Tensor

from spark_compile import SparkConfig, ops
from spark_compile.kernels.reference.store import ALL
from spark_compile.state import SparkTensor

CAPACITY = 30
CONFIGS = {
    "exact": SparkConfig(key_ratio=0, window=4),
    "pruned": SparkConfig(key_ratio=0.5, value_ratio=0.5, window=3, sink_tokens=1),
    "late": SparkConfig(key_ratio=0.5, window=3, min_tokens=20),
}
WRITES: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "index_copy_": lambda x, at, rows: x.index_copy_(2, at, rows),
    "index_copy_, negative dim": lambda x, at, rows: x.index_copy_(-2, at, rows),
    "index_put_": lambda x, at, rows: torch.ops.aten.index_put_(x, [None, None, at], rows),
    "setitem": lambda x, at, rows: x.__setitem__((slice(None), slice(None), at), rows),
}


def padded(rows: Tensor) -> Tensor:
    """Dense tokens with zeros up to the capacity."""
    return torch.nn.functional.pad(rows, (0, 0, 0, CAPACITY - rows.shape[2]))


def check(made: Prefill, models: Any) -> None:
    for state, model in zip(made.states, models, strict=True):
        assert state.shape[2] == CAPACITY
        torch.testing.assert_close(state.dense(), padded(model.rows), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("length", [0, 1, 12, CAPACITY])
def test_a_state_is_worth_its_tokens_and_zeros(length: int, config: str) -> None:
    made = static(CONFIGS[config], length, CAPACITY)
    check(made, made.models())


STEPS = st.lists(st.tuples(st.integers(0, CAPACITY), st.integers(1, 12)), max_size=10)


@given(st.sampled_from(list(CONFIGS)), st.integers(0, 20), STEPS, st.booleans())
@settings(max_examples=80, deadline=None)
def test_steps_at_any_position_are_those_of_dense_rows(
    config: str, length: int, steps: list[tuple[int, int]], with_query: bool
) -> None:
    made = static(CONFIGS[config], length, CAPACITY)
    models = made.models()
    buffers = [t for state in made.states for t in state.stored().values()]
    pointers = [t.data_ptr() for t in buffers]
    for start, count in steps:
        start, query = min(start, length), queries(count)
        position, new = torch.arange(start, start + count), tokens(count)
        if start + count > CAPACITY:
            continue
        if with_query:
            text = made.keys.spec.text
            ops.step(query, *new, *buffers, None, None, None, ALL, position, text)
        else:
            for state, rows in zip(made.states, new, strict=True):
                state.index_copy_(2, position, rows)
        for model, rows in zip(models, new, strict=True):
            model.crop(start)
            model.append(rows, ALL, query if with_query else None)
        length = start + count
        check(made, models)
    assert [t.data_ptr() for s in made.states for t in s.stored().values()] == pointers


@pytest.mark.parametrize("write", WRITES)
def test_writes_are_those_into_a_dense_tensor(write: str, recwarn: pytest.WarningsRecorder) -> None:
    for state in static(CONFIGS["exact"], 12, CAPACITY).states:
        dense = state.dense()
        for start, count in ((12, 1), (13, 9), (20, 10)):
            at, rows = torch.arange(start, start + count), new_rows(state, count)
            for tensor in (state, dense):
                WRITES[write](tensor, at, rows)
            dense[:, :, start + count :] = 0  # what followed is forgotten
            assert torch.equal(state.dense(), dense)
    assert not recwarn.list


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    ("at", "error"),
    [([13], ValueError), ([12, 14], ValueError), ([5, 4], ValueError), ([-1], ValueError),
     (list(range(12, CAPACITY + 1)), IndexError), (list(range(9, 40)), IndexError)],
    ids=str,
)  # fmt: skip
def test_a_wrong_position_raises_and_writes_nothing(
    at: list[int], error: type[Exception], write: str
) -> None:
    for state in static(CONFIGS["pruned"], 12, CAPACITY).states:
        before = [t.clone() for t in state.stored().values()]
        with pytest.raises(error, match="position"):
            WRITES[write](state, torch.tensor(at), new_rows(state, len(at)))
        assert all(map(torch.equal, before, state.stored().values()))


@pytest.mark.parametrize("write", ["index_copy_", "index_put_"])
@pytest.mark.parametrize(
    "change", [lambda x: x.double(), lambda x: x[:, :, :1], lambda x: x[:, :1], lambda x: x[:1]],
    ids=["dtype", "tokens", "heads", "batch"],
)  # fmt: skip
def test_rows_that_do_not_fit_write_nothing_of_their_own(
    change: Callable[[Tensor], Tensor], write: str
) -> None:
    """``index_put_`` broadcasts, as it does into a dense tensor; ``index_copy_`` does not."""
    for state in static(CONFIGS["exact"], 12, CAPACITY).states:
        at, rows = torch.tensor([12, 13]), change(new_rows(state, 2))
        before, dense = [t.clone() for t in state.stored().values()], state.dense()
        try:
            WRITES[write](dense, at, rows)
        except (RuntimeError, IndexError):
            with pytest.raises((TypeError, RuntimeError)):
                WRITES[write](state, at, rows)
            assert all(map(torch.equal, before, state.stored().values()))
        else:
            WRITES[write](state, at, rows)
            assert torch.equal(state.dense(), dense)


COPIES: dict[str, Any] = {
    "clone": (torch.clone, slice(None)),
    "deepcopy": (copy.deepcopy, slice(None)),
    "saved": (reloaded, slice(None)),
    "selected": (lambda state: state.index_select(0, torch.tensor([1, 1, 0])), [1, 1, 0]),
    "batch": (lambda state: state[1:], slice(1, None)),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_static_and_independent(name: str) -> None:
    change, entries = COPIES[name]
    for state in static(CONFIGS["pruned"], 12, CAPACITY).states:
        before = state.dense()
        copied = change(state)
        assert type(copied) is type(state)
        assert copied.static
        assert copied.shape[2] == CAPACITY
        assert torch.equal(copied.dense(), before[entries])
        copied.index_copy_(2, torch.tensor([12]), new_rows(copied, 1))
        assert torch.equal(state.dense(), before)
        assert copied.dense()[:, :, 12].all()


@pytest.mark.filterwarnings("ignore::spark_compile.SparkWarning")
def test_a_detached_state_is_the_same_one() -> None:
    for state in static(CONFIGS["exact"], 12, CAPACITY).states:
        alias, rows = state.detach(), new_rows(state, 1)
        state.index_copy_(2, torch.tensor([12]), rows)
        assert torch.equal(alias[:, :, 12:13], rows)


def test_zero_forgets_every_token() -> None:
    for state in static(CONFIGS["pruned"], 25, CAPACITY).states:
        buffers = [t.data_ptr() for t in state.stored().values()]
        assert state.zero_() is state
        assert not state.dense().any()
        assert state.packed_tokens() == 0
        rows = new_rows(state, 4)
        state.index_copy_(2, torch.arange(4), rows)
        assert torch.equal(state.dense(), padded(rows))
        assert [t.data_ptr() for t in state.stored().values()] == buffers


@pytest.mark.filterwarnings("ignore::spark_compile.SparkWarning")
def test_other_operators_get_the_dense_tensor() -> None:
    for state in static(CONFIGS["exact"], 12, CAPACITY).states:
        dense = state.dense()
        assert torch.equal(state[:, :, :5], dense[:, :, :5])
        longer = torch.cat((state, new_rows(state, 1)), 2)
        assert not isinstance(longer, SparkTensor)
        assert torch.equal(longer[:, :, :-1], dense)
        with pytest.raises(TypeError, match=r"call \.dense"):
            state.add_(1)
        at = [None, None, torch.tensor([12])]
        with pytest.raises(TypeError, match=r"call \.dense"):
            torch.ops.aten.index_put_(state, at, new_rows(state, 1), True)
        assert torch.equal(state.dense(), dense)
