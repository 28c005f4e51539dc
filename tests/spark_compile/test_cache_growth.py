"""A state that grows token by token: what is packed when, and how much room is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from states import HEADS, KEY_DIM, expected_keys, prefill, pruned_and_recovered, tokens
from torch import Tensor

from spark_compile import PrunedKeys, SparkConfig, StoredValues

POLICIES: list[dict[str, Any]] = [
    {},
    {"sink_tokens": 3},
    {"recent_tokens": 0},
    {"recent_tokens": 9, "sink_tokens": 1},
    {"min_tokens": 25},
    {"min_tokens": 25, "sink_tokens": 2, "recent_tokens": 1},
]


def new_stats(batch: int = 2) -> Tensor:
    return torch.rand(batch, HEADS, KEY_DIM) + 0.1


def step(keys: PrunedKeys, new: Tensor, stats: Tensor) -> PrunedKeys:
    """One decoding step, as the runtime does it."""
    longer = keys.appended(new)
    return longer.with_stats(longer.stats + stats)


@pytest.mark.parametrize("length", [1, 8, 21])
@pytest.mark.parametrize("chunk", [1, 3, 11])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_the_tail_is_packed_when_it_has_outgrown(
    policy: dict[str, Any], chunk: int, length: int
) -> None:
    config = SparkConfig(key_ratio=0, window=4, **policy)
    made = prefill(config, length)
    keys, dense, packed = made.keys, made.key, config.packed_length(length)
    for _ in range(33 // chunk):
        assert keys.packed_tokens() == packed
        new, _ = tokens(chunk)
        keys, dense = step(keys, new, new_stats()), torch.cat((dense, new), 2)
        surplus = dense.shape[2] - packed - config.sink_tokens - config.recent
        if surplus >= config.window and dense.shape[2] >= config.min_tokens:
            packed += surplus
        assert keys.shape[2] == dense.shape[2]
        assert torch.equal(keys.dense(), dense)
    assert keys.packed_tokens() == packed > 0


@pytest.mark.parametrize("saliency", ["squared", "absolute"])
@pytest.mark.parametrize("length", [5, 21])
def test_sinks_and_recent_tokens_stay_dense_and_the_rest_is_pruned_by_the_latest_queries(
    length: int, saliency: Any
) -> None:
    config = SparkConfig(key_ratio=0.6, window=4, sink_tokens=2, saliency=saliency)
    made = prefill(config, length)
    keys, dense, expected = made.keys, made.key, expected_keys(made, config)
    norms, stats = (made.keys.norms if made.keys.packed_tokens() else None), made.keys.stats
    for _ in range(13):
        new, seen, packed = tokens(1)[0], new_stats(), keys.packed_tokens()
        keys, stats = step(keys, new, seen), stats + seen
        dense, expected = torch.cat((dense, new), 2), torch.cat((expected, new), 2)
        if keys.packed_tokens() > packed:
            norms = stats.sqrt() if norms is None else norms
            block = slice(2 + packed, 2 + keys.packed_tokens())
            body = pruned_and_recovered(dense[:, :, block], stats.sqrt(), norms, config)
            expected[:, :, block] = body
            stats = torch.zeros_like(stats)
        torch.testing.assert_close(keys.stats, stats)
        torch.testing.assert_close(keys.dense(), expected)
        recent = slice(2 + keys.packed_tokens(), None)
        assert torch.equal(keys.dense()[:, :, :2], dense[:, :, :2])
        assert torch.equal(keys.dense()[:, :, recent], dense[:, :, recent])
        assert keys.shape[2] - keys.packed_tokens() - 2 >= min(config.recent, length - 2)
    assert keys.packed_tokens() >= config.packed_length(length) + 8


def test_packing_keeps_earlier_handles() -> None:
    config = SparkConfig(key_ratio=0.6, window=4)
    made = prefill(config)
    longer = made.keys.appended(tokens(4)[0])
    before = made.keys.dense(), longer.dense()
    packed = longer.with_stats(new_stats())
    assert packed.packed_tokens() == made.keys.packed_tokens() + 4
    assert torch.equal(made.keys.dense(), before[0])
    assert torch.equal(longer.dense(), before[1])
    assert longer.packed_tokens() == made.keys.packed_tokens()


def room_allowed(rows: int, config: SparkConfig) -> int:
    return rows + max(config.window, rows // 32)


def check_room(keys: PrunedKeys, values: StoredValues, config: SparkConfig) -> None:
    packed, length = keys.packed_tokens(), keys.shape[2]
    assert values.rows.shape[2] <= room_allowed(length, config)
    assert keys.tail.shape[2] <= room_allowed(length - packed, config)
    assert keys.kept.shape[2] <= room_allowed(packed, config)
    assert keys.kept.shape[2] == keys.bits.shape[2] == keys.scale.shape[2]


@pytest.mark.parametrize("length", [3, 300])
@pytest.mark.parametrize("policy", [{}, {"min_tokens": 1000}], ids=str)
def test_room_is_bounded_and_growing_rarely_copies(policy: dict[str, int], length: int) -> None:
    config = SparkConfig(window=4, **policy)
    made = prefill(config, length, batch=1)
    keys, values, stats = made.keys, made.values, new_stats(1)
    moves, pointers = [0, 0, 0], [0, 0, 0]
    for _ in range(100):
        check_room(keys, values, config)
        new = tokens(1, batch=1)
        keys, values = step(keys, new[0], stats), values.appended(new[1])
        now = [t.data_ptr() for t in (keys.kept, keys.tail, values.rows)]
        moves = [m + (a != b) for m, a, b in zip(moves, now, pointers, strict=True)]
        pointers = now
    assert max(moves) <= 100 // config.window + 2


def test_a_copied_prefix_keeps_no_more_room_than_it_needs() -> None:
    config = SparkConfig(window=4, key_ratio=0.5)
    made = prefill(config, 300)
    shorter = made.keys[:, :, :20], made.values[:, :, :20]
    new = tokens(1)
    keys, values = (state.appended(t) for state, t in zip(shorter, new, strict=True))
    assert keys.tail.data_ptr() != made.keys.tail.data_ptr()
    assert isinstance(values, StoredValues)
    assert values.rows.shape[2] <= room_allowed(21, config)
    assert isinstance(keys, PrunedKeys)
    assert keys.tail.shape[2] <= room_allowed(keys.shape[2] - keys.packed_tokens(), config)
