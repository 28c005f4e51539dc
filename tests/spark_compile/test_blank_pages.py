"""Caches that have packed nothing share the room for their first pages, and none writes there."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from compiled import compiled, is_compressed
from decoders import decode, decoder, prompt
from states import prefill, queries, reloaded, step, tokens

from spark_compile import SparkConfig, kv_bytes, sharing
from spark_compile.report import collect_report

CONFIG = SparkConfig(key_ratio=0, window=4)
COPIES = {"itself": lambda states: states, "deepcopy": copy.deepcopy, "loaded": reloaded}


@pytest.mark.parametrize("again", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("as_inference", [False, True])
def test_what_is_packed_goes_elsewhere(again: Any, as_inference: bool) -> None:
    with torch.inference_mode(as_inference):
        made = [prefill(CONFIG, 5) for _ in range(3)]
        rows: list[Any] = [(one.key, one.value) for one in made]
        states = [again(one.states) for one in made]
        for _ in range(9):
            for index, pair in enumerate(states):
                new = tokens(1)
                states[index] = step(*pair, queries(), new)
                both = zip(rows[index], new, strict=True)
                rows[index] = tuple(torch.cat(parts, 2) for parts in both)
        for pair, dense in zip(states, rows, strict=True):
            for state, expected in zip(pair, dense, strict=True):
                assert state.packed_tokens()
                assert torch.equal(state.dense(), expected)
        assert not any(state.pages.any() for state in prefill(CONFIG, 5).states)


def test_what_comes_of_a_file_shares_nothing() -> None:
    states = reloaded(prefill(CONFIG, 5).states)
    assert kv_bytes(states) == sum(state.stored_bytes() for state in states)


def test_they_go_with_the_last_cache() -> None:
    gc.collect()
    before = len(sharing._blanks)
    states = prefill(CONFIG, 5, batch=7).states
    assert len(sharing._blanks) == before + 2
    del states
    gc.collect()
    assert len(sharing._blanks) == before


def test_a_graph_that_was_compiled_for_them_packs() -> None:
    """Both sides of both layers have the same pages: to the compiler they would be one input."""
    plain = decoder(layers=2)
    model = compiled(plain, inner="aot_eager", strict=True)
    exact, _ = decode(plain, ids := prompt(3), None, 12)
    with collect_report() as report:
        logits, past = decode(model, ids, None, 12)
    torch.testing.assert_close(logits, exact, atol=2e-5, rtol=2e-5)
    assert is_compressed(past)
    assert all(state.packed_tokens() for pair in past for state in pair)
    assert [graph.phase for graph in report.graphs] == ["prefill", "decode"]
