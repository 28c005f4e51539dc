"""States of one rank, which stores its own tokens of a context."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from states import HEADS, KEY_DIM, VALUE_DIM, spec_of, tokens
from torch import Tensor

from spark_compile import SparkConfig, SparkError, SparkWarning, spread_ops
from spark_compile.form import StateForm
from spark_compile.kernels.reference.store import Store
from spark_compile.kernels.spec import SIDES
from spark_compile.kernels.spread import Spread
from spark_compile.state import SparkTensor, new_state

CONFIG = SparkConfig(key_ratio=0, window=4, sink_tokens=1)
RANKS, BATCH = 3, 2


def states_of(rows: tuple[Tensor, Tensor], rank: int) -> list[SparkTensor]:
    """Keys and values, as a prefill graph makes them."""
    spec, length = spec_of(CONFIG), rows[0].shape[2]
    built = spread_ops.build_own(*rows, [], spec.text, [RANKS, rank])
    form = StateForm(spec, ranks=RANKS, rank=rank)
    return [
        new_state(side, form, *built[2 * i : 2 * i + 2], length) for i, side in enumerate(SIDES)
    ]


def check(state: SparkTensor, rows: Tensor) -> None:
    """What the state stores, and what it says of itself, are a rank's of these tokens."""
    form = state.form
    assert tuple(state.shape) == tuple(rows.shape)
    spread = Spread(RANKS, form.rank, 4)
    store = Store(*state.stored().values(), state.spec, state.SIDE)
    store.check()
    assert torch.equal(store.rows(), spread.taken(rows, 0))
    assert state.packed_tokens() == store.packed


@pytest.mark.parametrize("rank", range(RANKS))
def test_what_becomes_of_a_state(rank: int) -> None:
    for length in (0, 1, 5, 21, 50):
        rows = tokens(length, BATCH)
        for state, all_rows in zip(states_of(rows, rank), rows, strict=True):
            check(state, all_rows)
            check(copy.deepcopy(state), all_rows)
            for cut in range(0, length + 1, 3):
                check(state[:, :, :cut], all_rows[:, :, :cut])
            assert state[:1].shape[0] == 1
            check(state.index_select(0, torch.tensor([1, 0])), all_rows[[1, 0]])
            dim = KEY_DIM if state.SIDE == "key" else VALUE_DIM
            for count in (1, 2, 11):
                new = torch.randn(BATCH, HEADS, count, dim)
                all_rows = torch.cat((all_rows, new), 2)
                state = torch.cat((state, new), 2)
                check(state, all_rows)
            check(state.clone().zero_(), torch.zeros_like(all_rows))
            other = torch.randn_like(all_rows)
            check(state.clone().copy_(other), other)


def test_continuations_of_one_prefix_do_not_see_each_other() -> None:
    keys, _ = states_of(rows := tokens(21, BATCH), 1)
    new = [torch.randn(BATCH, HEADS, 9, KEY_DIM) for _ in range(2)]
    both = [torch.cat((keys, each), 2) for each in new]
    for state, each in zip(both, new, strict=True):
        check(state, torch.cat((rows[0], each), 2))
    check(keys, rows[0])


def test_a_file_has_the_rank() -> None:
    keys, _ = states_of(rows := tokens(21, BATCH), 1)
    file = io.BytesIO()
    torch.save(keys, file)
    file.seek(0)
    loaded = torch.load(file)
    assert loaded.form == keys.form
    check(loaded, rows[0])


def test_a_file_of_another_rank_is_damaged() -> None:
    keys, _ = states_of(tokens(22, BATCH), 1)
    make, (kind, shape, form, stored) = keys.__reduce_ex__(4)
    for place in ((3, 2), (3, 3), (0, 0), (3, -1)):
        with pytest.raises(ValueError, match="no state that can be loaded"):
            make(kind, shape, (*form[:4], *place), stored)


def test_there_is_no_dense_tensor(recwarn: pytest.WarningsRecorder) -> None:
    keys, _ = states_of(tokens(21, BATCH), 1)
    for read in (SparkTensor.dense, lambda state: state + 1):
        with pytest.raises(
            SparkError, match="what rank 1 of 3 stores of a cache: there is no dens"
        ):
            read(keys)


def test_a_graph_that_reads_it_otherwise_says_what_it_cannot() -> None:
    keys, _ = states_of(tokens(21, BATCH), 1)
    mean = torch.compile(lambda keys: keys.mean(), backend="spark", options={"inner": "eager"})
    with (
        pytest.warns(SparkWarning, match="is spread over ranks, none of which can make it dense"),
        pytest.raises(SparkError, match="what rank 1 of 3 stores of a cache"),
    ):
        mean(keys)
