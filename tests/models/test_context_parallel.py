"""Caches that are spread over ranks: each stores its own tokens, and they attend together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import many_ranks
import pytest
import torch
from compiled import EXACT
from decoders import decode, decoder
from many_ranks import (
    ARGUMENTS,
    IDS,
    STEPS,
    TOKENS,
    Scenarios,
    parallelized,
    spread,
    spread_by_hand,
)
from many_ranks import spread_told_otherwise as told_otherwise
from zoo import CACHE, tiny

import spark_compile

LONG = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}

PADDED = {
    "inputs": torch.arange(1, 41).reshape(2, 20),
    "attention_mask": torch.tensor([[0] * 7 + [1] * 13, [1] * 20]),
}


def tokens_of(name: str, **arguments: Any) -> torch.Tensor:
    """What one process generates, dense."""
    sequences: torch.Tensor = tiny(name, "sdpa", 1).generate(**{"inputs": IDS, **LONG, **arguments})
    return sequences


def whole_logits() -> torch.Tensor:
    torch.manual_seed(0)
    return decode(decoder("sdpa_masked", layers=1), TOKENS, None, STEPS)[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks found."""
    scenarios: Scenarios = {
        "told otherwise": (told_otherwise,),
        "plain": (spread, "llama", LONG),
        "by hand": (spread_by_hand,),
    }
    return many_ranks.run(scenarios, 2, tmp_path_factory.mktemp("ranks"))


def check(found: dict[str, Any], expected: torch.Tensor) -> None:
    assert torch.equal(found["tokens"], expected)
    assert found["compressed"]
    assert not found["breaks"]
    assert all(refusal is None for *_, refusal in found["sites"])


def test_the_tokens_are_those_of_one_process(two: Any) -> None:
    for rank in two:
        check(rank["plain"], tokens_of("llama"))
        assert rank["plain"]["phases"] == ["prefill", "decode"]


def test_each_rank_stores_its_own_tokens(two: Any) -> None:
    model = spark_compile.optimize(tiny("llama", "sdpa", 1), **EXACT)
    cache = model.generate(IDS, return_dict_in_generate=True, **LONG)[CACHE]
    tokens = cache.layers[0].keys.shape[2]
    for rank in two:
        assert rank["plain"]["shape"][2] == tokens
    own = [rank["plain"]["stored"] for rank in two]
    assert sum(own) == tokens
    assert abs(own[0] - own[1]) <= EXACT["window"]
    alone = spark_compile.kv_bytes(cache)
    # What each has besides are its tail and room for the next pages.
    assert all(rank["plain"]["bytes"] < 0.75 * alone for rank in two)


def test_a_decoder_by_hand(two: Any) -> None:
    for rank in two:
        torch.testing.assert_close(rank["by hand"]["logits"], whole_logits(), atol=2e-5, rtol=2e-5)
        assert rank["by hand"]["compressed"]


def test_ranks_with_other_options_are_told_so_by_each_of_them(two: Any) -> None:
    for rank in two:
        assert rank["told otherwise"]["error"] == (
            "the ranks of a model have been given different options: 'key_ratio' is 0.0 on rank "
            "0, 0.25 on rank 1: allowed is the same on every rank"
        )


@pytest.mark.slow
def test_ways_to_generate(tmp_path: Path) -> None:
    static = {**LONG, "cache_implementation": "static", "disable_compile": True}
    scenarios: Scenarios = {
        "by layers": (spread, "llama", LONG, {"regional": True}),
        "chunks": (spread, "llama", {**LONG, "prefill_chunk_size": 7}),
        "beams": (spread, "llama", {**LONG, "num_beams": 2}),
        "int8": (spread, "llama", LONG, {"key_dtype": "int8", "value_dtype": "int8"}),
        "slides": (spread, "mistral_sliding", LONG),
        "padded": (spread, "llama", {**LONG, **PADDED}),
        "static": (spread, "llama", static, {"strict": False}),
    }
    for rank in many_ranks.run(scenarios, 2, tmp_path):
        for name in ("by layers", "chunks", "int8"):
            check(rank[name], tokens_of("llama"))
            assert rank[name]["ranks"] == 2
        check(rank["beams"], tokens_of("llama", num_beams=2))
        check(rank["padded"], tokens_of("llama", **PADDED))
        check(rank["slides"], tokens_of("mistral_sliding"))
        assert rank["slides"]["ranks"] == 1
        assert torch.equal(rank["static"]["tokens"], tokens_of("llama"))
        reasons = [refusal for *_, refusal in rank["static"]["sites"]]
        assert all("a cache with a capacity is not spread over ranks" in why for why in reasons)


@pytest.mark.slow
def test_four_ranks(tmp_path: Path) -> None:
    """Also two by two: the heads over one dimension of a mesh, the tokens over the other one."""
    scenarios: Scenarios = {
        "plain": (spread, "llama", LONG),
        "both": (parallelized, False, 2),
    }
    for rank in many_ranks.run(scenarios, 4, tmp_path):
        check(rank["plain"], tokens_of("llama"))
        assert rank["both"]["phases"] == ["prefill", "decode"]
        assert rank["both"]["compressed"]
        assert rank["both"]["shape"][1] == 1
        torch.testing.assert_close(rank["both"]["logits"], whole_logits(), atol=2e-5, rtol=2e-5)


@pytest.mark.slow
def test_with_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A process that multiprocessing started waits at its end for the threads of Inductor's pool.
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    scenarios: Scenarios = {"plain": (spread, "llama", ARGUMENTS, {"inner": "inductor"})}
    for rank in many_ranks.run(scenarios, 2, tmp_path):
        check(rank["plain"], tokens_of("llama", **ARGUMENTS))
