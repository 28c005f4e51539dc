"""Counting bytes: every storage whole and once, in whatever it is nested."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from states import BATCH, HEADS, KEY_DIM, VALUE_DIM, prefill, tokens
from transformers import DynamicCache

from spark_compile import SparkConfig, kv_bytes
from spark_compile.kernels.layout import kept_channels, key_token_bytes

CONFIG = SparkConfig(key_ratio=0.6, window=4, sink_tokens=2)
LENGTH = 40


def test_a_tensor_counts_with_its_whole_storage() -> None:
    tensor = torch.zeros(3, 5, dtype=torch.bfloat16)
    assert kv_bytes(tensor) == 30
    assert kv_bytes(tensor[0]) == 30
    assert kv_bytes(torch.zeros(0)) == 0


def test_nested_tensors_are_summed_and_shared_storage_counts_once() -> None:
    a, b, c = torch.zeros(4), torch.zeros(5), torch.zeros(6, dtype=torch.int8)
    assert kv_bytes(((a, b), [c])) == 16 + 20 + 6
    assert kv_bytes({"k": a, "v": [b, {"again": a}]}) == 16 + 20
    assert kv_bytes((a, a[1:], a.view(2, 2))) == 16
    assert kv_bytes(SimpleNamespace(keys=a, more=SimpleNamespace(values=b), count=3)) == 16 + 20
    assert kv_bytes(()) == 0


def test_a_state_counts_with_all_that_it_stores() -> None:
    made = prefill(CONFIG, LENGTH)
    for state in (made.keys, made.values):
        stored = sum(t.numel() * t.element_size() for t in state.stored().values())
        assert kv_bytes(state) == state.stored_bytes() == stored
    assert kv_bytes(made.keys) + kv_bytes(made.values) == kv_bytes((made.keys, made.values))


def test_the_bytes_are_those_of_the_layout() -> None:
    made, rows = prefill(CONFIG, LENGTH), BATCH * HEADS
    packed, dense = CONFIG.packed_length(LENGTH), CONFIG.dense_room
    assert kept_channels(KEY_DIM, CONFIG.key_ratio) == 5
    per_token = key_token_bytes(KEY_DIM, CONFIG.key_ratio, 4, CONFIG.recovery)
    expected = packed * per_token + dense * KEY_DIM * 4 + 2 * KEY_DIM * 4  # two norms
    assert kv_bytes(made.keys) == rows * expected + 8  # the packed length
    assert kv_bytes(made.values) == rows * (LENGTH + CONFIG.window) * VALUE_DIM * 4


def test_handles_on_one_storage_count_once() -> None:
    made = prefill(CONFIG, LENGTH)
    alone = kv_bytes(made.keys)
    handles = (made.keys, made.keys[:, :, :20], made.keys.appended(tokens(1)[0]))
    assert alone <= kv_bytes(handles) <= alone + 2 * 8  # a packed length each
    assert kv_bytes((made.keys, made.keys.clone())) == 2 * alone


def cache_of(keys: torch.Tensor, values: torch.Tensor, layers: int) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), layer)
        cache.layers[layer].keys, cache.layers[layer].values = keys, values
    return cache


def test_a_transformers_cache_dense_and_compressed() -> None:
    made, cache = prefill(CONFIG, LENGTH), DynamicCache()
    for layer in range(3):
        cache.update(made.key.clone(), made.value.clone(), layer)
    assert kv_bytes(cache) == 3 * BATCH * HEADS * LENGTH * (KEY_DIM + VALUE_DIM) * 4
    compressed = cache_of(made.keys, made.values, layers=1)
    assert kv_bytes(compressed) == made.keys.stored_bytes() + made.values.stored_bytes()
    assert kv_bytes(cache_of(made.keys, made.values, layers=3)) == kv_bytes(compressed)
    assert kv_bytes(DynamicCache()) == 0


@pytest.mark.parametrize(
    "wrong", [3, 2.5, None, True, "cache", b"cache", torch.nn.Linear(2, 2), DynamicCache, len]
)
def test_what_holds_no_tensors_raises_and_is_named(wrong: object) -> None:
    with pytest.raises(TypeError) as caught:
        kv_bytes(wrong)
    assert repr(wrong) in str(caught.value)
    assert "a cache or tensors" in str(caught.value)
