"""Reports made by hand: one line each, a table and data that tell every site and every reason."""

from __future__ import annotations

import io
import json
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.console import Console

from spark_compile import Report, SparkWarning
from spark_compile.report import (
    GraphReport,
    Refusal,
    Site,
    collect_report,
    forget_warnings,
    record,
    warn_once,
)

REWRITTEN = Site("layers.0.attn", 9, 3, 64, 32, dense_token_bytes=400, stored_token_bytes=300)
REFUSED = Site("layers.1.attn", 8, 8, 16, 16, 256, 200, Refusal("the mask is [b, h, l]", "add_3"))
ALSO_REFUSED = Site("layers.2.attn", 8, 8, 16, 16, 256, 200, Refusal("dropout of 0.1", "sdpa"))
PREFILL = GraphReport("prefill", (REWRITTEN, REWRITTEN), matches={"lower": 1}, passes_ms=1.5)
DECODE = GraphReport("decode", (REWRITTEN, REFUSED, ALSO_REFUSED, REFUSED))
LEFT = GraphReport("no cache", left_alone="pass Normalize failed: KeyError")
REFUSING = GraphReport("decode", (REFUSED,))
EMPTY = GraphReport("no cache")


def rendered(report: Report, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(report.table())
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_summary_has_a_line_per_graph() -> None:
    assert Report().summary() == "no graph was compiled"
    assert Report([PREFILL, DECODE, LEFT, REFUSING, EMPTY]).summary().splitlines() == [
        "prefill: 2 of 2 sites rewritten, 800 bytes per token become 600 (75%); "
        "passes 2 ms after 0 ms of tracing",
        "decode: 1 of 4 sites rewritten, 400 bytes per token become 300 (75%); refused: "
        "2 x the mask is [b, h, l] (node add_3); 1 x dropout of 0.1 (node sdpa)",
        "no cache: left alone: pass Normalize failed: KeyError",
        "decode: 0 of 1 sites rewritten; refused: 1 x the mask is [b, h, l] (node add_3)",
        "no cache: 0 of 0 sites rewritten",
    ]


def test_refusals_name_each_reason_once_and_the_most_frequent_first() -> None:
    reasons = ["a", "b", "b", "c", "d", "b", "c", "e"]
    sites = (
        Site("x", 1, 1, 8, 8, 1, 1, Refusal(reason, f"n_{number}"))
        for number, reason in enumerate(reasons)
    )
    text = GraphReport("decode", tuple(sites)).refusals()
    assert text == "3 x b (node n_1); 2 x c (node n_3); 1 x a (node n_0); 2 x other reasons"
    assert PREFILL.refusals() == ""
    assert DECODE.rewritten == (REWRITTEN,)


def test_as_dict_is_json_with_everything() -> None:
    report = Report([PREFILL, DECODE, LEFT])
    data = json.loads(json.dumps(report.as_dict()))
    assert data["summary"] == report.summary()
    prefill, decode, left = data["graphs"]
    assert [graph["rewritten"] for graph in data["graphs"]] == [2, 1, 0]
    assert prefill["matches"] == {"lower": 1}
    assert prefill["passes_ms"] == 1.5
    assert left["left_alone"] == "pass Normalize failed: KeyError"
    assert decode["sites"][0] == {
        "layer": "layers.0.attn", "query_heads": 9, "kv_heads": 3, "key_dim": 64, "value_dim": 32,
        "dense_token_bytes": 400, "stored_token_bytes": 300, "refusal": None,
        "formats": ["", ""], "evict": "",
    }  # fmt: skip
    assert decode["sites"][1]["refusal"] == {"reason": "the mask is [b, h, l]", "node": "add_3"}


def test_table_has_a_row_per_site() -> None:
    lines = rendered(Report([PREFILL, DECODE])).splitlines()
    rewritten = [line for line in lines if "layers.0.attn" in line]
    assert len(rewritten) == 3
    for part in ("9/3", "64/32", "400", "300", "rewritten"):
        assert all(part in line for line in rewritten)
    refused = [line for line in lines if "refused" in line]
    assert len(refused) == 3
    assert all("200" not in line for line in refused)  # nothing is stored in that form


def test_sites_whose_prompts_are_evicted_say_so() -> None:
    site = Site("layers.0.attn", 9, 3, 64, 32, 400, 300, evict="knorm(tokens=9)")
    report = Report([GraphReport("prefill", (site, REWRITTEN, site))])
    assert rendered(report).count("rewritten, evicts: knorm(tokens=9)") == 2
    assert report.summary().count("; prompts are evicted by knorm(tokens=9)") == 1
    assert "evict" not in Report([PREFILL]).summary() + rendered(Report([PREFILL]))


def test_table_shows_reasons_as_they_are() -> None:
    text = rendered(Report([DECODE]))
    assert text.count("the mask is [b, h, l] (node add_3)") == 2  # no markup, for all its brackets
    assert text.count("dropout of 0.1 (node sdpa)") == 1


def test_table_shows_module_paths_as_they_are() -> None:
    odd = Site("L['self'][/x].layers[last]", 1, 1, 8, 8, 32, 20)
    assert "L['self'][/x].layers[last]" in rendered(Report([GraphReport("decode", (odd,))]))


def test_a_narrow_table_shows_names_whole() -> None:
    site = Site("model.decoder.layers.17.self_attention", 1, 1, 8, 8, 32, 20)
    lines = rendered(Report([GraphReport("decode", (site,))]), width=80).splitlines()
    cells = [line.split("│")[2].strip() for line in lines if "│" in line]
    assert "".join(cells) == site.layer


def test_table_tells_of_graphs_without_sites() -> None:
    text = rendered(Report([LEFT]))
    assert "no cache" in text
    assert "left alone: pass Normalize failed: KeyError" in text


def test_collecting_is_nested_and_ends() -> None:
    record(EMPTY)  # nobody listens
    with collect_report() as outer:
        record(PREFILL)
        with collect_report() as inner:
            record(DECODE)
        record(LEFT)
    record(EMPTY)
    assert outer.graphs == [PREFILL, LEFT]
    assert inner.graphs == [DECODE]


def test_a_warning_is_given_once_until_it_is_forgotten() -> None:
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(warn_once, ["one"] * 200))
        warn_once("another", RuntimeWarning)
        forget_warnings()
        warn_once("one")
    expected = [("one", SparkWarning), ("another", RuntimeWarning), ("one", SparkWarning)]
    assert [(str(warning.message), warning.category) for warning in given] == expected


def test_a_warning_points_at_the_code_that_gave_it() -> None:
    with pytest.warns(SparkWarning, match="here") as given:
        warn_once("here")
    assert given[0].filename == __file__
