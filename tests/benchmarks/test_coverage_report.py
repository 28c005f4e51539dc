"""Counting, judging and writing down, with rows that are made up."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import coverage, coverage_process
from benchmarks.coverage_case import NOT_FOUND, Settings
from benchmarks.coverage_models import MOST_LAYERS, architectures, chosen_layers, tiny_config
from benchmarks.coverage_report import figures, judge, markdown, summarize
from spark_compile.passes.eligibility import LATENT

HEADER = {"torch": "2.0", "transformers": "5.0", "settings": {
    "inner": "eager", "prompt": 16, "steps": 24, "window": 4, "key_ratio": 0.5,
    "again": [2, 11, 8]}}  # fmt: skip
GOOD = {"status": "ok", "error": 1e-7, "same_tokens": 24}
CRASH = {"status": "crash", "crash": "ValueError: a | b"}


def names(start: int, end: int) -> list[str]:
    return [str(index) for index in range(start, end)]


def case(growing: int, rewritten: int, sliding: int = 0, **changed: Any) -> dict[str, Any]:
    """A row of one implementation of attention whose first sites were rewritten."""
    pruned = {**GOOD, "compressed": names(0, rewritten), "refusals": {}, "effect": 0.1}
    sites = {"growing": names(0, growing), "sliding": names(growing, growing + sliding)}
    row: dict[str, Any] = {"supported": True, "sites": sites, "plain": GOOD, "exact": GOOD}
    return {**row, "pruned": pruned, **changed}


def rows() -> dict[str, Any]:
    refused = case(2, 1, sliding=1)
    refused["pruned"]["refusals"] = {"an odd mask": 1}
    refused["sites"]["static"] = names(0, 2)
    refused["static"] = {**GOOD, "compressed": names(1, 2), "refusals": {"an odd write": 1}}
    latent = case(5, 2, not_static="ValueError: no")
    latent["pruned"]["refusals"] = {f"the keys {LATENT}": 3}
    return {
        "b": {"sdpa": case(2, 2), "eager": refused},
        "a": {"sdpa": {"supported": False}, "eager": case(3, 0)},
        "c": {"sdpa": {"supported": True, "not_built": "ImportError: timm"}},
        "d": {"sdpa": case(1, 0, pruned=CRASH), "error": "stopped after 300 s"},
        "f": {"eager": latent},
        "g": {
            "eager": case(
                0,
                0,
                static={"status": "differs", **{k: GOOD[k] for k in ("error", "same_tokens")}},
                plain_static=CRASH,
            )
        },
        "e": {"sdpa": case(1, 1, plain=CRASH, exact=CRASH)},
    }


def test_figures() -> None:
    summary = summarize(rows())
    assert (summary.architectures, summary.ran) == (7, 6)
    assert (summary.growing, summary.rewritten, summary.sliding) == (14, 6, 1)
    assert summary.latent == 3
    assert (summary.static, summary.rewritten_static) == (2, 1)
    assert summary.static_reasons == {"an odd write": ["b (eager)"]}
    assert summary.not_static == {"ValueError: no": ["f (eager)"]}
    assert ("rewritten of the others", "54.5%") in figures(summary)
    assert summary.reasons == {
        "an odd mask": ["b (eager)"], NOT_FOUND: ["a (eager)"], "the run crashed": ["d (sdpa)"],
        f"the keys {LATENT}": ["f (eager)"],
    }  # fmt: skip
    assert summary.without == {"ImportError: timm": ["c"], "stopped after 300 s": ["d"]}
    assert (len(summary.crashes), len(summary.not_ours), summary.wrong) == (1, 2, [])


@pytest.mark.parametrize(
    ("plain", "ours", "verdict"),
    [
        ("ok", "ok", "ok"),
        ("ok", "differs", "wrong"),
        ("ok", "no oracle", "wrong"),
        ("ok", "given up", "wrong"),
        ("ok", "crash", "crash"),
        ("crash", "crash", "not ours"),
        ("differs", "differs", "not ours"),
        ("differs", "ok", "ok"),
    ],
)
def test_who_is_to_blame(plain: str, ours: str, verdict: str) -> None:
    assert judge({"plain": {"status": plain}, "exact": {"status": ours}}, "exact") == verdict
    row = {"plain_static": {"status": plain}, "static": {"status": ours}}
    assert judge(row, "static") == verdict


def test_the_page_depends_on_nothing_but_the_rows() -> None:
    page = markdown(HEADER, rows())
    assert page == markdown(HEADER, dict(reversed(rows().items())))
    assert "| b | 2/2 | 1/2 + 0/1; 1/2 | ok | an odd mask |" in page
    assert "| an odd write | 1 | b (eager) |" in page
    assert "| a | - | 0/3 | ok |" in page
    assert "a \\| b" in page


def test_layers_of_every_kind_are_chosen() -> None:
    kinds = ["s", "s", "s", "f", "s", "f"]
    assert chosen_layers({"num_hidden_layers": 6, "layer_types": kinds}) == [0, 3]
    assert chosen_layers({"n_layer": 6}) == [0, 1]
    many = [str(index) for index in range(20)]
    assert len(chosen_layers({"num_hidden_layers": 20, "layer_types": many})) == MOST_LAYERS


def test_a_configuration_is_shrunk_inside_too() -> None:
    config = tiny_config("llama4").get_text_config()
    assert (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads) == (2, 64, 2)
    assert set(config.layer_types) == {"chunked_attention", "full_attention"}
    assert len(architectures()) > 150


def test_a_run_goes_on_where_it_stopped(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def pretend(names: list[str], settings: Settings, limit_s: float, jobs: int) -> Any:
        for name in names:
            ran.append(name)
            yield name, {"sdpa": case(1, 1)}

    monkeypatch.setattr(coverage, "run_all", pretend)
    folders = {"results": tmp_path, "docs": tmp_path}
    coverage.main(only="llama,gpt2", **folders)
    coverage.main(only="llama,opt", **folders)
    coverage.main(only="llama", fresh=True, **folders)
    coverage.main(only="llama", inner="inductor", **folders)
    assert ran == ["llama", "gpt2", "opt", "llama", "llama"]
    with pytest.raises(Exception, match="no such architecture: nothing"):
        coverage.main(only="nothing", **folders)


def test_a_process_that_takes_too_long_is_stopped() -> None:
    ((name, row),) = coverage_process.run_all(["llama"], Settings(), limit_s=0.01, jobs=1)
    assert name == "llama"
    assert row["error"] == "stopped after 0.01 s"
