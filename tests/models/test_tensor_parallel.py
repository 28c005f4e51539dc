"""Models sharded over ranks: each rank compresses the cache of its own heads."""

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
    planned,
    planned_eagerly,
    told_otherwise,
)
from zoo import CACHE, tiny

import spark_compile

GATHERED = {f"model.layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in "kv"}
"""Rules in place of a plan's: every rank has all keys and values."""


def saved(folder: Path, **changes: Any) -> tuple[str, torch.Tensor]:
    """A tiny model's folder, and the tokens that it generates in one process, dense."""
    model = tiny("llama", "sdpa")
    if changes:
        torch.manual_seed(0)
        model = type(model)(type(model.config)(**{**model.config.to_dict(), **changes})).eval()
    model.save_pretrained(folder / "model")
    return str(folder / "model"), model.generate(IDS, **ARGUMENTS)


def whole_logits() -> torch.Tensor:
    torch.manual_seed(0)
    return decode(decoder("sdpa_masked", layers=1), TOKENS, None, STEPS)[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """What two ranks found, and the tokens of one process."""
    folder = tmp_path_factory.mktemp("ranks")
    path, tokens = saved(folder)
    scenarios: Scenarios = {
        "planned": (planned, path),
        "parallelized": (parallelized,),
        "told otherwise": (told_otherwise,),
    }
    return many_ranks.run(scenarios, 2, folder), tokens


def check(found: dict[str, Any], query_heads: int, kv_heads: int, layers: int = 2) -> None:
    assert found["phases"] == ["prefill", "decode"]
    assert not found["breaks"]
    assert found["compressed"]
    assert found["sites"] == [(query_heads, kv_heads, None)] * 2 * layers
    assert found["shape"][1] == kv_heads


def test_a_model_with_a_plan_of_transformers(two: Any) -> None:
    ranks, tokens = two
    for rank in ranks:
        check(rank["planned"], 2, 1)
        assert torch.equal(rank["planned"]["tokens"], tokens)


def test_a_module_that_is_parallelized_by_hand(two: Any) -> None:
    for rank in two[0]:
        check(rank["parallelized"], 2, 1, layers=1)
        torch.testing.assert_close(
            rank["parallelized"]["logits"], whole_logits(), atol=2e-5, rtol=2e-5
        )


def test_ranks_with_other_options_are_told_so_by_each_of_them(two: Any) -> None:
    for rank in two[0]:
        assert rank["told otherwise"]["error"] == (
            "the ranks of a model have been given different options: 'key_ratio' is 0.0 on rank "
            "0, 0.25 on rank 1: allowed is the same on every rank"
        )


def test_one_process_stores_what_the_ranks_store_together(two: Any) -> None:
    model = spark_compile.optimize(tiny("llama", "sdpa"), **EXACT)
    output = model.generate(IDS, return_dict_in_generate=True, **ARGUMENTS)
    alone = spark_compile.kv_bytes(output[CACHE])
    assert sum(rank["planned"]["bytes"] for rank in two[0]) == alone


@pytest.mark.slow
def test_four_ranks(tmp_path: Path) -> None:
    path, tokens = saved(tmp_path, num_key_value_heads=4)
    scenarios: Scenarios = {
        "planned": (planned, path),
        "more ranks than key heads": (parallelized, True),
        "told otherwise": (told_otherwise,),
    }
    for rank in many_ranks.run(scenarios, 4, tmp_path):
        check(rank["planned"], 1, 1)
        assert torch.equal(rank["planned"]["tokens"], tokens)
        check(rank["more ranks than key heads"], 1, 1, layers=1)
        logits = rank["more ranks than key heads"]["logits"]
        torch.testing.assert_close(logits, whole_logits(), atol=2e-5, rtol=2e-5)
        assert "0.75 on rank 3" in rank["told otherwise"]["error"]


@pytest.mark.slow
def test_more_ranks_than_key_heads_by_a_plan_that_gathers_them(tmp_path: Path) -> None:
    path, tokens = saved(tmp_path, num_key_value_heads=1)
    scenarios: Scenarios = {
        "by its own plan": (planned_eagerly, path),
        "planned": (planned, path, {}, GATHERED),
    }
    for rank in many_ranks.run(scenarios, 2, tmp_path):
        # Each rank gets half a head of 16 channels for 20 tokens: the model itself cannot use it.
        assert "shape '[1, 20, -1, 16]' is invalid" in rank["by its own plan"]["error"]
        check(rank["planned"], 2, 1)
        assert torch.equal(rank["planned"]["tokens"], tokens)


@pytest.mark.slow
def test_with_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A process that multiprocessing started waits at its end for the threads of Inductor's pool.
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    path, tokens = saved(tmp_path, num_hidden_layers=1)
    scenarios: Scenarios = {"planned": (planned, path, {"inner": "inductor"})}
    for rank in many_ranks.run(scenarios, 2, tmp_path):
        check(rank["planned"], 2, 1, layers=1)
        assert torch.equal(rank["planned"]["tokens"], tokens)
