"""States inside the layers of a transformers cache: its methods find what they need."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from states import dense, prefill, tokens
from transformers import DynamicCache

from spark_compile import PrunedKeys, SparkConfig, StoredValues

CONFIG = SparkConfig(key_ratio=0.6, value_ratio=0.5, window=4, sink_tokens=1)
EXACT = SparkConfig(key_ratio=0, window=4, sink_tokens=1)


def caches(layers: int = 2, config: SparkConfig = CONFIG) -> tuple[DynamicCache, DynamicCache]:
    """A cache of compressed states and one of the dense tensors that they are worth."""
    compressed, plain = DynamicCache(), DynamicCache()
    for layer in range(layers):
        made = prefill(config)
        plain.update(made.keys.dense(), made.values.dense(), layer)
        compressed.update(made.key, made.value, layer)
        compressed.layers[layer].keys = made.keys
        compressed.layers[layer].values = made.values
    return compressed, plain


def check_same(compressed: DynamicCache, plain: DynamicCache) -> None:
    assert len(compressed) == len(plain)
    for layer, expected in zip(compressed.layers, plain.layers, strict=True):
        assert layer.get_seq_length() == expected.get_seq_length()
        assert layer.get_mask_sizes(3) == expected.get_mask_sizes(3)
        assert isinstance(layer.keys, PrunedKeys)
        assert isinstance(layer.values, StoredValues)
        assert torch.equal(layer.keys.dense(), expected.keys)
        assert torch.equal(layer.values.dense(), expected.values)


CHANGES: dict[str, Callable[[DynamicCache], object]] = {
    "crop": lambda cache: cache.crop(-4),
    "crop of all that is packed": lambda cache: cache.crop(-20),
    "crop of everything": lambda cache: cache.crop(-21),
    "no crop": lambda cache: cache.crop(0),
    "batch_select_indices": lambda cache: cache.batch_select_indices(torch.tensor([1, 1, 0])),
    "batch_repeat_interleave": lambda cache: cache.batch_repeat_interleave(3),
    "reorder_cache": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "offload": lambda cache: [layer.offload() for layer in cache.layers],
    "prefetch": lambda cache: [layer.prefetch() for layer in cache.layers],
}


@pytest.mark.parametrize("name", CHANGES)
def test_methods_do_what_they_do_to_a_dense_cache_and_keep_it_compressed(name: str) -> None:
    compressed, plain = caches()
    for cache in (compressed, plain):
        CHANGES[name](cache)
    check_same(compressed, plain)


@pytest.mark.parametrize("name", CHANGES)
def test_update_continues_after_each_method(name: str) -> None:
    """Every channel is stored: what is packed on the way must be what a dense cache has."""
    compressed, plain = caches(layers=1, config=EXACT)
    for cache in (compressed, plain):
        CHANGES[name](cache)
    batch = compressed.layers[0].keys.shape[0]
    for _ in range(3):
        new = tokens(2, batch)
        returned = compressed.update(*new, 0)
        expected = plain.update(*new, 0)
        for state, tensor in zip(returned, expected, strict=True):
            assert torch.equal(dense(state), tensor)
    check_same(compressed, plain)


def test_a_deepcopy_is_independent() -> None:
    compressed, plain = caches()
    copied = copy.deepcopy(compressed)
    check_same(copied, plain)
    for cache in (compressed, plain):
        cache.crop(-5)
    new = tokens(3)
    copied.update(*new, 0)
    check_same(compressed, plain)
    assert copied.get_seq_length() == 24
    assert torch.equal(copied.layers[0].keys.dense()[:, :, 21:], new[0])


def test_a_reset_cache_starts_again() -> None:
    compressed, plain = caches()
    for cache in (compressed, plain):
        cache.reset()
        assert cache.get_seq_length() == 0
    new = tokens(3)
    for cache in (compressed, plain):
        cache.update(*new, 0)
    assert torch.equal(dense(compressed.layers[0].keys), plain.layers[0].keys)


def test_rejected_guesses_leave_the_accepted_tokens() -> None:
    """Append guesses, crop most of them, and again: as speculative decoding does."""
    compressed, plain = caches(layers=1, config=EXACT)
    for accepted in (1, 4, 0, 3):
        guesses = tokens(4)
        for cache in (compressed, plain):
            cache.update(*guesses, 0)
            cache.crop(accepted - 4)
        check_same(compressed, plain)


def test_iteration_and_repr_need_nothing_dense(recwarn: pytest.WarningsRecorder) -> None:
    compressed, _ = caches()
    for keys, values, *_ in compressed:
        assert isinstance(keys, PrunedKeys)
        assert isinstance(values, StoredValues)
    assert "DynamicCache" in repr(compressed)
    assert not recwarn.list
