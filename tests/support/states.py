"""Compressed states made from random keys and values, as a prefill graph makes them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
from side_model import SideModel
from torch import Tensor

from spark_compile import PrunedKeys, SparkConfig, StoredValues, ops
from spark_compile.form import StateForm
from spark_compile.kernels.reference.store import ALL, Store
from spark_compile.kernels.spec import SIDES, Spec
from spark_compile.state import SparkTensor, new_state

BATCH, HEADS, KEY_DIM, VALUE_DIM = 2, 3, 12, 10


@dataclass(frozen=True)
class Prefill:
    """Dense tensors and the two states that were made from them."""

    query: Tensor
    key: Tensor
    value: Tensor
    keys: PrunedKeys
    values: StoredValues

    @property
    def states(self) -> tuple[SparkTensor, SparkTensor]:
        return self.keys, self.values

    def models(self) -> tuple[SideModel, SideModel]:
        """What both states must be worth."""
        models = []
        for side, rows in zip(SIDES, (self.key, self.value), strict=True):
            model = SideModel(self.keys.spec, side, *rows.shape[:2])
            model.append(rows, ALL, self.query)
            models.append(model)
        return models[0], models[1]


def spec_of(config: SparkConfig, dtype: torch.dtype = torch.float32) -> Spec:
    """The spec of a site with the dimensions of this module."""
    key = config.format_for("key", KEY_DIM, dtype)
    return config.spec(key, config.format_for("value", VALUE_DIM, dtype))


def prefill(
    config: SparkConfig, length: int = 21, batch: int = BATCH, dtype: torch.dtype = torch.float32
) -> Prefill:
    """States of ``length`` random tokens; two query heads share a key head."""
    query = torch.randn(batch, 2 * HEADS, length, KEY_DIM, dtype=dtype)
    key, value = tokens(length, batch, dtype)
    stored = ops.build(key, value, [query], spec_of(config, dtype).text, None)
    keys, values = _states(StateForm(spec_of(config, dtype)), stored, length)
    return Prefill(query, key, value, keys, values)


def static(config: SparkConfig, length: int, capacity: int) -> Prefill:
    """States of a fixed capacity that hold ``length`` random tokens."""
    query, (key, value), spec = queries(length), tokens(length), spec_of(config)
    stored = ops.build(key, value, [query], spec.text, capacity)
    return Prefill(query, key, value, *_states(StateForm(spec, True), stored, capacity))


def _states(
    form: StateForm, stored: tuple[Tensor, ...], length: int
) -> tuple[PrunedKeys, StoredValues]:
    keys, values = (
        new_state(side, form, *stored[first : first + 2], length)
        for side, first in zip(SIDES, (0, 2), strict=True)
    )
    assert isinstance(keys, PrunedKeys)
    assert isinstance(values, StoredValues)
    return keys, values


def step(
    keys: Any, values: Any, query: Tensor, new: tuple[Tensor, Tensor], keep: int = ALL
) -> tuple[Any, Any]:
    """The states after one decoding step, made as the runtime makes them."""
    keys, values = (state.grown(new[0].shape[2], keep) for state in (keys, values))
    buffers = keys.pages, keys.head, values.pages, values.head
    ops.step(query, *new, *buffers, None, None, None, keep, None, keys.spec.text)
    return keys, values


def queries(count: int = 1, batch: int = BATCH, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random queries of ``count`` tokens."""
    return torch.randn(batch, 2 * HEADS, count, KEY_DIM, dtype=dtype)


def tokens(
    count: int, batch: int = BATCH, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Random keys and values of ``count`` tokens."""
    key = torch.randn(batch, HEADS, count, KEY_DIM, dtype=dtype)
    return key, torch.randn(batch, HEADS, count, VALUE_DIM, dtype=dtype)


def reloaded(state: Any) -> Any:
    """What ``torch.load`` makes of a saved state."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def new_rows(state: Tensor, count: int) -> Tensor:
    """Random dense tokens that can be appended to a state."""
    return torch.randn(*state.shape[:2], count, state.shape[3], dtype=state.dtype)


def dense(value: Tensor) -> Tensor:
    """The dense tensor of a state; a plain tensor is itself."""
    return value.dense() if isinstance(value, SparkTensor) else value


def model_of(state: SparkTensor) -> SideModel:
    """The model of what a state is now, from which both can be continued."""
    stored, spec = state.stored(), state.spec
    store = Store(stored["pages"], stored["head"], spec, state.SIDE)
    model = SideModel(spec, state.SIDE, *state.shape[:2])
    model.packed, model.first = store.packed, store.first
    store.first = 0  # those that have left are still there, and take part in constants
    model.all_rows = store.rows()
    if store.packed:
        model.constants = {name: t.clone() for name, t in store.constants.items()}
    if store.stats is not None:
        model.stats = store.stats[:, :, store.step % 2].clone()
    return model


def check_state(state: SparkTensor, model: SideModel) -> None:
    """A state is worth what its model is, statistics included."""
    own = model_of(state)
    assert state.shape[2] == model.rows.shape[2]
    assert own.packed - own.first == model.packed - model.first
    torch.testing.assert_close(own.rows, model.rows, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state.dense(), own.rows.to(state.dtype), rtol=0, atol=0)
    torch.testing.assert_close(own.stats, model.stats)
