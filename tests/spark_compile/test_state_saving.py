"""States on disk: torch.save, a safe torch.load, pickle; and only what the handle needs."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from states import (
    HEADS,
    KEY_DIM,
    VALUE_DIM,
    check_state,
    model_of,
    new_rows,
    prefill,
    queries,
    static,
    step,
    tokens,
)
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from spark_compile import SparkConfig
from spark_compile.state import SparkTensor

CONFIG = SparkConfig(
    key_ratio=0.6, value_ratio=0.5, key_dtype="int8", window=4, sink_tokens=2, recovery="gaussian"
)


def check_same(loaded: Any, saved: SparkTensor) -> None:
    assert type(loaded) is type(saved)
    assert loaded.shape == saved.shape
    assert loaded.dtype == saved.dtype
    assert loaded.spec is saved.spec
    assert loaded.static == saved.static
    assert torch.equal(loaded.dense(), saved.dense())
    if saved.static:
        return
    model = model_of(saved)
    check_state(loaded, model)
    for count in (1, 9):
        new = new_rows(saved, count)
        model.append(new)
        saved, loaded = saved.appended(new), loaded.appended(new)
        check_state(loaded, model)
        check_state(saved, model)


def saved_and_loaded(value: Any, path: Path) -> Any:
    torch.save(value, path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [5, 21])
def test_states_are_saved_and_safely_loaded(
    length: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    made = prefill(CONFIG, length, dtype=dtype)
    for state in (made.keys, made.values):
        check_same(saved_and_loaded(state, tmp_path / "state.pt"), state)


def test_a_tuple_of_states_is_saved_and_safely_loaded(tmp_path: Path) -> None:
    made = prefill(CONFIG)
    pairs = ((made.keys, made.values), (made.keys[:, :, :9], made.values[:, :, :9]))
    loaded = saved_and_loaded(pairs, tmp_path / "states.pt")
    for pair, loaded_pair in zip(pairs, loaded, strict=True):
        for state, loaded_state in zip(pair, loaded_pair, strict=True):
            check_same(loaded_state, state)


def test_static_states_are_saved_and_safely_loaded(tmp_path: Path) -> None:
    for state in static(CONFIG, 21, 40).states:
        check_same(saved_and_loaded(state, tmp_path / "state.pt"), state)


def test_superseded_and_slid_handles_are_saved_as_they_are(tmp_path: Path) -> None:
    config = SparkConfig(key_ratio=0.6, window=4)
    made = prefill(config)
    longer = step(*made.states, queries(3), tokens(3))
    slid = step(*longer, queries(2), tokens(2), 9)
    for state in (*made.states, *longer, *slid):
        check_same(saved_and_loaded(state, tmp_path / "state.pt"), state)


def test_a_transformers_cache_is_saved_and_safely_loaded(tmp_path: Path) -> None:
    made, cache = prefill(CONFIG), DynamicCache()
    for layer in range(2):
        cache.update(made.key, made.value, layer)
        cache.layers[layer].keys = made.keys
        cache.layers[layer].values = made.values
    path = tmp_path / "cache.pt"
    torch.save(cache, path)
    # The import allows states alone: which classes of others may be made is the user's to say.
    with pytest.raises(pickle.UnpicklingError, match="DynamicCache"):
        torch.load(path)
    with torch.serialization.safe_globals([DynamicCache, DynamicLayer]):
        loaded = torch.load(path)
    assert isinstance(loaded, DynamicCache)
    assert loaded.get_seq_length() == 21
    for layer in loaded.layers:
        check_same(layer.keys, made.keys)
        check_same(layer.values, made.values)


def test_pickle_works() -> None:
    made = prefill(CONFIG)
    for state in (made.keys, made.values):
        check_same(pickle.loads(pickle.dumps(state)), state)


def test_a_loaded_state_shares_nothing(tmp_path: Path) -> None:
    made = prefill(CONFIG)
    before = made.keys.dense()
    saved_and_loaded(made.keys, tmp_path / "state.pt").zero_()
    loaded = saved_and_loaded(made.keys, tmp_path / "state.pt")
    loaded.head.zero_()
    loaded.pages.zero_()
    assert torch.equal(made.keys.dense(), before)


@pytest.mark.parametrize("policy", [{}, {"recent_tokens": 900}, {"min_tokens": 2000}], ids=str)
def test_a_short_crop_of_a_long_state_is_saved_short(
    policy: dict[str, int], tmp_path: Path
) -> None:
    config = SparkConfig(key_ratio=0.6, window=4, **policy)
    made = prefill(config, 1000)
    short = prefill(config, 10)
    for state, alone in ((made.keys, short.keys), (made.values, short.values)):
        crop = state[..., :10, :]
        torch.save(crop, tmp_path / "crop.pt")
        loaded = pickle.loads(pickle.dumps(crop))
        assert torch.equal(loaded.dense(), crop.dense())
        token_bytes = 2 * HEADS * (KEY_DIM + VALUE_DIM) * 4
        # A crop may be packed where a fresh short state is dense, and the other way round.
        allowed = alone.stored_bytes() + 2 * config.window * token_bytes
        assert loaded.stored_bytes() <= allowed
        assert (tmp_path / "crop.pt").stat().st_size <= allowed + 8192  # names, options, padding
