"""Many architectures, chosen for how differently they write attention, masks and caches.

All of transformers' are run by ``make coverage``; these take a few seconds each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from architectures import BOTH, EAGER, LEFT_ALONE

from benchmarks.coverage_case import Case, Settings, refusals
from benchmarks.coverage_models import architectures, tiny_model
from spark_compile.report import GraphReport, Report, Site

SETTINGS = Settings(steps=12, again=None)
OTHER_SIZES = {"bloom", "falcon", "mistral", "phi"}
"""Run at another batch size and length as well, which takes as long again,
and with a static cache."""
LONG = {
    "cohere2", "ctrl", "deepseek_v2", "doge", "falcon", "falcon_h1", "gemma2", "gemma4_text",
    "gpt_neo", "gpt_oss", "granite_swa", "jamba", "llama4_text", "mistral", "phi", "qwen3_next",
    "recurrent_gemma", "zamba2",
}  # fmt: skip
"""More than ten seconds each: left to the slow tests."""
LIKE_OTHERS = {
    "gpt_bigcode", "gpt_neox", "gptj", "granite", "phi3", "qwen3", "roformer", "stablelm",
}  # fmt: skip
"""What they do, fast ones do too."""


def cases() -> Iterator[Any]:
    for number, name in enumerate(BOTH):
        attention = ("sdpa", "eager")[number % 2]
        marks = [pytest.mark.slow] if name in LONG | LIKE_OTHERS else []
        yield pytest.param(name, attention, id=f"{name}-{attention}", marks=marks)
    for name in EAGER:
        marks = [pytest.mark.slow] if name in LONG | LIKE_OTHERS else []
        yield pytest.param(name, "eager", id=f"{name}-eager", marks=marks)


@pytest.mark.parametrize(("name", "attention"), list(cases()))
def test_an_architecture(name: str, attention: str) -> None:
    if name not in architectures():
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    settings = replace(SETTINGS, again=Settings.again) if name in OTHER_SIZES else SETTINGS
    case = Case(tiny_model(name, attention, least_layers=1), settings)
    exact = case.spark(0.0)
    assert exact["status"] == "ok", exact
    pruned = case.spark(0.5)
    assert pruned["status"] == "ok", pruned
    assert pruned["compressed"] == exact["compressed"]
    if name in OTHER_SIZES:
        torch._dynamo.reset()
        static = case.static()
        assert static["status"] == "ok", static
        assert static["compressed"] == case.sites["static"], static["refusals"]
    assert not pruned["compressed"] or pruned["effect"] > 1e-3, "the simulation is blind"
    sites = {*case.sites["growing"], *case.sites["sliding"]}
    allowed = LEFT_ALONE.get(name)
    if allowed is None:
        assert set(pruned["compressed"]) == sites, pruned["refusals"]
    elif sites - set(pruned["compressed"]):
        assert pruned["refusals"]
        assert all(re.search(allowed, reason) for reason in pruned["refusals"]), pruned["refusals"]


def test_a_graph_break_where_no_site_is_found_is_a_reason() -> None:
    place = "Unsupported Tensor.item() call at /somewhere/modeling_mpt.py:121"
    site = Site("0", 4, 2, 8, 8, 64, 32)
    graphs = [
        GraphReport("no attention", graph_break=place), GraphReport("no attention"),
        GraphReport("decode", (site,), graph_break="another break at /somewhere/other.py:1"),
    ]  # fmt: skip
    expected = "graph break: Unsupported Tensor.item() call at modeling_mpt.py:121"
    assert refusals(Report(graphs)) == {expected: 1}
