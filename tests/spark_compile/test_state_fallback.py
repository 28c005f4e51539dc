"""Operators that a state does not know: right on the dense tensor, never silent, never in place."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import compiled
from decoders import decoder, prompt
from states import prefill
from torch import Tensor

from spark_compile import SparkConfig, SparkError, SparkWarning
from spark_compile.state import SparkTensor

CONFIG = SparkConfig(key_ratio=0.6, window=4, sink_tokens=1)

DENSE: dict[str, Callable[[Tensor], Any]] = {
    "add": lambda x: x + 1,
    "radd": lambda x: 1 + x,
    "sum": lambda x: x.sum(),
    "matmul": lambda x: x @ x.mT,
    "transpose": lambda x: x.transpose(1, 2),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
    "unbind": lambda x: x.unbind(0),
    "to another dtype": lambda x: x.to(torch.bfloat16),
    "half": lambda x: x.half(),
    "one token": lambda x: x[:, :, 3],
    "last tokens": lambda x: x[:, :, -3:],
    "every second token": lambda x: x[:, :, ::2],
    "channels": lambda x: x[..., :4],
    "one batch entry": lambda x: x[0],
    "tokens by index": lambda x: x[:, :, torch.tensor([2, 0])],
    "index of two dimensions": lambda x: x[torch.tensor([0, 1]), torch.tensor([2, 0])],
    "index by a matrix": lambda x: x[torch.tensor([[0, 1]])],
    "heads by index_select": lambda x: x.index_select(1, torch.tensor([0])),
    "cat in front": lambda x: torch.cat((torch.ones(x[:, :, :2].shape), x), 2),
    "cat with itself": lambda x: torch.cat((x, x), 2),
    "cat of batches": lambda x: torch.cat((x, torch.zeros(x.shape)), 0),
    "cat with another dtype": lambda x: torch.cat((x, torch.ones(x.shape).double()), 2),
    "repeat_interleave of heads": lambda x: x.repeat_interleave(2, dim=1),
    "copied into a tensor": lambda x: torch.empty(x.shape).copy_(x),
    "attention": lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x),
    "equal": lambda x: torch.equal(x, x),
    "foreach": lambda x: torch._foreach_add([x, x], 1),
}

WRITES: dict[str, Callable[[Tensor], Any]] = {
    "aten.add_": lambda x: x.add_(1),
    "aten.mul_": lambda x: x.mul_(2),
    "aten.fill_": lambda x: x.fill_(3),
    "aten.index_copy_": lambda x: x.index_copy_(2, torch.tensor([0]), torch.ones_like(x[:, :, :1])),
    "aten._foreach_add_": lambda x: torch._foreach_add_([torch.ones(1), x], 1),
    "aten.add.out": lambda x: torch.add(torch.ones(x.shape), 1, out=x),
    "slice": lambda x: x.__setitem__((slice(None), slice(None), slice(0, 3)), 0.0),
    "token": lambda x: x.__setitem__((slice(None), slice(None), 3), 0.0),
    "batch entry": lambda x: x.__setitem__(0, 0.0),
    "mask": lambda x: x.__setitem__(torch.ones(x.shape, dtype=torch.bool), 0.0),
}


def both() -> tuple[SparkTensor, SparkTensor]:
    return prefill(CONFIG).states


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.filterwarnings("ignore::spark_compile.SparkWarning")
def test_unknown_operators_get_the_dense_tensor(name: str) -> None:
    for state in both():
        before = state.dense()
        torch.testing.assert_close(DENSE[name](state), DENSE[name](before), rtol=0, atol=0)
        assert torch.equal(state.dense(), before)


def test_an_unknown_operator_warns_once() -> None:
    for state in both():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state + 1
            state + 2
            state.sum()
        told = [w for w in caught if issubclass(w.category, SparkWarning)]
        if state.shape[3] == 12:  # the keys came first: for the values nothing is new
            assert ["aten.add.Tensor" in str(w.message) for w in told] == [True, False]
            assert "aten.sum" in str(told[1].message)
        else:
            assert not told


@pytest.mark.parametrize("continued", [False, True])
def test_strict_raises_where_an_operator_needs_the_dense_tensor(continued: bool) -> None:
    model = compiled(decoder(layers=1), strict=True, key_ratio=0.5)
    past = model(prompt(13))[1]
    if continued:
        past = model(prompt(1), past)[1]
    for state in past[0]:
        for kin in (state, copy.deepcopy(state), state[:, :, :9], saved_and_loaded(state)):
            with pytest.raises(SparkError, match=r"^aten.add.Tensor does not work on a compressed"):
                kin + 1
            assert torch.equal(kin.dense() + 1, kin.dense() + 1)


def saved_and_loaded(state: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: Tensor = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.filterwarnings("ignore::spark_compile.SparkWarning")
def test_writing_into_a_state_raises_and_changes_nothing(name: str) -> None:
    for state in both():
        before = state.dense()
        with pytest.raises(TypeError, match=name if name.startswith("aten") else "compressed"):
            WRITES[name](state)
        assert torch.equal(state.dense(), before)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x.index_select(4, torch.tensor([0])),
        lambda x: x.index_select(0, torch.tensor([2])),
        lambda x: x[torch.tensor([2])],
        lambda x: torch.cat((x, torch.ones(x.shape)), 6),
        lambda x: torch.ops.aten.slice(x, 4, 0, 1),
        lambda x: torch.cat((x, torch.ones(1, *x.shape[1:])), 2),
        lambda x: torch.cat((x, torch.ones(*x.shape[:3], 1)), 2),
        lambda x: torch.cat((x, torch.ones(2, 2)), 2),
    ],
)
@pytest.mark.filterwarnings("ignore::spark_compile.SparkWarning")
def test_what_fails_on_the_dense_tensor_fails_on_the_state(wrong: Callable[[Tensor], Any]) -> None:
    for state in both():
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            wrong(state.dense())
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            wrong(state)
