"""Counting bytes: every storage whole and once, in whatever it is nested."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from states import BATCH, HEADS, KEY_DIM, VALUE_DIM, prefill, tokens
from transformers import DynamicCache

from spark_compile import SparkConfig, kv_bytes
from spark_compile.kernels.formats import kept_channels

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
        stored = sum(t.numel() for t in state.stored().values())  # bytes
        assert kv_bytes(state) == state.stored_bytes() == stored
    assert kv_bytes(made.keys) + kv_bytes(made.values) == kv_bytes((made.keys, made.values))


def test_the_bytes_are_those_of_the_declared_fields() -> None:
    made, rows = prefill(CONFIG, LENGTH), BATCH * HEADS
    assert kept_channels(KEY_DIM, CONFIG.key_ratio) == 5
    packed, dense = 32, 8  # of 40 tokens 2 sinks and at least 4 recent ones stay dense
    assert made.keys.packed_tokens() == packed
    pages = packed // 4
    # amplitude, channels, two bit planes of 12 bits
    token = 4 + 5 * 4 + 2 + 2
    # counters, norms, statistics, the tail at a multiple of 16
    head = 5 * 8 + KEY_DIM * 4 + 2 * KEY_DIM * 4 + 8 + dense * KEY_DIM * 4
    assert kv_bytes(made.keys) == rows * (pages * 4 * token + head)
    # dense values: the row alone, and no constants
    head = 5 * 8 + 8 + dense * VALUE_DIM * 4
    assert kv_bytes(made.values) == rows * (pages * 4 * VALUE_DIM * 4 + head)


def test_caches_that_have_packed_nothing_share_their_empty_pages() -> None:
    """Two pages of room in each would be more than the dense tokens are."""
    states = [state for length in (5, 9) for state in prefill(CONFIG, length).states]
    heads = sum(state.head.numel() for state in states)
    assert kv_bytes(states) - heads == sum(state.pages.numel() for state in states[:2])
    copies = [copy.deepcopy(state) for state in states]
    assert kv_bytes((states, copies)) - kv_bytes(states) == heads


FORMATS: list[dict[str, Any]] = [
    {"key_ratio": 0}, {"key_ratio": 0.7, "value_ratio": 0.4}, {"key_dtype": "int8"},
    {"key_ratio": 0, "key_dtype": "int8", "value_dtype": "int8"}, {"recovery": "gaussian"},
    {"value_ratio": 0.9, "value_dtype": "int8"},
]  # fmt: skip


@pytest.mark.parametrize("options", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_format_stores_its_fields_and_little_more(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Padding aside: at most an item per token and 8 bytes per page and per field of a head."""
    config = SparkConfig(window=8, **options)
    made = prefill(config, 8 * 8, dtype=dtype)
    for state in made.states:
        fields = state.spec.format(state.SIDE).fields()
        token, page, head = (
            sum(field.nbytes for field in fields if field.per == per)
            for per in ("token", "page", "head")
        )
        stats = 2 * 4 * state.shape[3] if state.SIDE == "key" and token and head else 0
        tail, pages = 8 * state.shape[3] * dtype.itemsize, 7
        least = pages * (8 * token + page) + head + stats + tail + 32
        slack = pages * (8 * (dtype.itemsize - 1) + 8) + 24
        assert BATCH * HEADS * least <= kv_bytes(state) <= BATCH * HEADS * (least + slack)
        assert state.packed_tokens() == 7 * 8


def test_handles_on_one_storage_count_once() -> None:
    made = prefill(CONFIG, LENGTH - 1)  # whose tail has room
    alone, head = kv_bytes(made.keys), made.keys.head.nbytes
    longer = made.keys.appended(tokens(1)[0])
    assert kv_bytes((made.keys, longer)) == alone
    assert kv_bytes(longer) == alone
    handles = (made.keys, longer, made.keys[:, :, :20])  # a crop has a head of its own
    assert kv_bytes(handles) == alone + head
    assert kv_bytes((made.keys, made.keys.clone())) == 2 * alone


def test_superseded_handles_count_as_many_bytes_as_others() -> None:
    made = [prefill(CONFIG, LENGTH - 1) for _ in range(5)]
    longer = [each.keys.appended(tokens(1)[0]) for each in made]
    assert kv_bytes([each.keys for each in made]) == 5 * made[0].keys.stored_bytes()
    assert kv_bytes([[each.keys for each in made], longer]) == 5 * made[0].keys.stored_bytes()


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
