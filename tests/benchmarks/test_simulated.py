"""The generic simulation equals the one of the tests, and notices keys that it loses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from oracle import TOLERANCE, SimulatedSpark
from torch import Tensor
from zoo import ARCHITECTURES, heads, tiny

from benchmarks.coverage_case import Run, Settings, compare, generate
from benchmarks.simulated import Simulated
from spark_compile import SparkConfig

SETTINGS = Settings()
CONFIG = SparkConfig(key_ratio=0.5, window=4, sink_tokens=1)


def by_order(model: Any, config: SparkConfig) -> Run:
    """The simulation that tells attentions apart by their order, in every forward."""
    with SimulatedSpark(config, *heads(model)) as simulated:
        model.register_forward_pre_hook(lambda *_: simulated.begin_step())
        return generate(model, SETTINGS)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_simulations_agree(name: str, attention: str) -> None:
    # The other one knows sinks only where nothing slides.
    config = replace(CONFIG, sink_tokens=0) if name.endswith("sliding") else CONFIG
    expected = by_order(tiny(name, "sdpa"), config)
    model = tiny(name, attention)
    with Simulated(config, ("0", "1")) as simulated:
        actual = generate(model, SETTINGS)
    assert not simulated.lost()
    result = compare(actual, expected)
    assert result["error"] <= TOLERANCE[torch.float32], result
    assert compare(actual, generate(model, SETTINGS))["error"] > 1e-3, "it changed nothing"


def test_only_the_named_layers_are_changed() -> None:
    model = tiny("llama", "sdpa")
    plain = generate(model, SETTINGS)
    with Simulated(CONFIG, ()):
        assert torch.equal(generate(model, SETTINGS).logits, plain.logits)
    with Simulated(CONFIG, ("1",)) as simulated:
        generate(model, SETTINGS)
    assert list(simulated.states) == ["1"]


def test_keys_that_meet_no_query_are_noticed() -> None:
    cache, key = transformers.DynamicCache(), torch.randn(1, 2, 9, 8)
    with Simulated(CONFIG, ("0",)) as simulated:
        keys, _ = cache.update(key, key, 0)
        torch.randn(1, 2, 9, 8) @ torch.tanh(keys).mT
    assert simulated.lost() == ["0"]


def product(way: str, query: Tensor, keys: Tensor) -> Tensor:
    """Scores [B, Hq, L, S] of 4 query heads against 2 key heads."""
    batch, heads, length, dim = query.shape
    repeated = keys.repeat_interleave(2, dim=1)
    if way == "matmul":
        return torch.matmul(query, repeated.transpose(2, 3))
    if way == "keys first":
        return (repeated @ query.mT).mT
    if way == "groups":
        return (query.unflatten(1, (2, 2)) @ keys.unsqueeze(2).mT).flatten(1, 2)
    if way == "rows":
        return (query.reshape(batch, 2, -1, dim) @ keys.mT).reshape(batch, heads, length, -1)
    if way == "bmm":
        flat = repeated.reshape(batch * heads, -1, dim) * 2.0
        return torch.bmm(query.flatten(0, 1) / 2, flat.transpose(1, 2)).unflatten(0, (batch, heads))
    assert way == "einsum"
    return torch.einsum("bhld,bhsd->bhls", query, repeated)


@pytest.mark.parametrize("way", ["matmul", "keys first", "groups", "rows", "bmm", "einsum"])
def test_every_way_of_meeting_the_queries(way: str) -> None:
    scores = {}
    for form in ("matmul", way):
        torch.manual_seed(0)
        cache = transformers.DynamicCache()
        with Simulated(CONFIG, ("0",)) as simulated:
            for length in (12, 1, 1, 5, 1, 1):
                key, query = torch.randn(2, 2, length, 8), torch.randn(2, 4, length, 8)
                keys, _ = cache.update(key, key, 0)
                scores[form] = product(form, query, keys)
        assert not simulated.lost()
        exact = product("matmul", query, cache.layers[0].keys)
        assert (scores[form] - exact).abs().max() > 1e-2
    torch.testing.assert_close(scores[way], scores["matmul"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["matmul", "groups", "rows"])
def test_a_second_reader_may_ask_about_the_last_token_alone(way: str) -> None:
    scores = {}
    for form in ("matmul", way):
        torch.manual_seed(0)
        cache = transformers.DynamicCache()
        with Simulated(CONFIG, ("0",)):
            for length in (12, 1, 5, 1):
                key, query = torch.randn(2, 2, length, 8), torch.randn(2, 4, length, 8)
                keys, _ = cache.update(key, key, 0)
                product("matmul", query, keys)
                scores[form] = product(form, torch.randn(2, 4, 1, 8), keys)
    torch.testing.assert_close(scores[way], scores["matmul"], rtol=1e-4, atol=1e-4)
