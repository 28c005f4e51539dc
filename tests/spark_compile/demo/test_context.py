"""That what fits is what a cache of that length takes."""

from __future__ import annotations

import pytest
import torch
from states import prefill

from spark_compile import SparkConfig, kv_bytes
from spark_compile.demo.context import longest_context

CONFIG = SparkConfig(key_ratio=0.6, window=4, sink_tokens=2)


def test_a_dense_cache() -> None:
    sides = [torch.zeros(1, 2, 10, 8), torch.zeros(1, 2, 10, 4)]  # 96 bytes per token
    assert longest_context(sides, 10, 9600) == 100
    assert longest_context(sides, 10, 95) == 0


def test_a_compressed_cache() -> None:
    short, room_bytes = prefill(CONFIG, 1002), 1_000_000
    tokens = longest_context(short.states, 1002, room_bytes)
    assert kv_bytes(prefill(CONFIG, tokens).states) == pytest.approx(room_bytes, rel=0.01)


def test_nothing_is_packed() -> None:
    sides = prefill(CONFIG, 3).states
    assert longest_context(sides, 3, 10 * kv_bytes(sides)) == 30


def test_no_room() -> None:
    assert longest_context(prefill(CONFIG, 40).states, 40, 1) == 0
