"""Results, their comparison, and that what gets worse turns it red."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import (
    compare,
    counted,
    exact,
    history,
    measure,
    pictures,
    regressions,
    spread_cost,
    timed,
)
from benchmarks.__main__ import app
from benchmarks.bench_kernels import BASELINES
from benchmarks.measure import Contender, interleave
from benchmarks.results import Metric, Result

METRICS = {
    "sites": Metric("exact"),
    "instructions": Metric("counted"),
    "speedup": Metric("ratio", "more"),
}
ROW = {"case": "a", "sites": 2, "instructions": 1000, "speedup": 2.0}


def result(*rows: dict, **facts: str) -> Result:
    return Result("x", ["case"], METRICS, list(rows), machine={"cpu": "c", **facts})


def verdicts(old: Result, new: Result, **limits: float) -> dict[str, str]:
    found = compare.differences(old, new, {**compare.LIMITS, **limits})
    return {d.metric: d.verdict + "!" * d.fails for d in found}


def test_a_result_is_read_as_it_was_written(tmp_path):
    made = replace(result(ROW), settings={"repeats": 3}, comparable=["cpu"])
    path = made.write(tmp_path / "x.jsonl")
    assert Result.read(path) == made
    assert len(path.read_text().splitlines()) == 2
    assert {"cpu", "torch", "commit", "date"} <= measure.machine_facts().keys()
    path.write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"x\.jsonl is no result"):
        Result.read(path)


def test_each_kind_of_metric_has_its_own_limit():
    same = {"sites": "same", "instructions": "same", "speedup": "same"}
    assert verdicts(result(ROW), result(ROW)) == same
    near = {**ROW, "instructions": 1019, "speedup": 1.6}
    assert verdicts(result(ROW), result(near)) == same
    far = {"case": "a", "sites": 3, "instructions": 1021, "speedup": 1.4}
    worse = {"sites": "changed!", "instructions": "worse!", "speedup": "worse!"}
    assert verdicts(result(ROW), result(far)) == worse
    # A win of a count is to be written down, one of a time is not.
    won = {"case": "a", "sites": 2, "instructions": 900, "speedup": 3.0}
    better = {"sites": "same", "instructions": "better!", "speedup": "better"}
    assert verdicts(result(ROW), result(won)) == better
    assert verdicts(result(ROW), result(near), speedup=0.1)["speedup"] == "worse!"


def test_an_uncertain_ratio_is_not_accused():
    slow = {**ROW, "speedup": 1.4}
    unsure, sure = ({**slow, "speedup_interval": [1.3, high]} for high in (1.6, 1.45))
    assert verdicts(result(ROW), result(unsure))["speedup"] == "same"
    assert verdicts(result(ROW), result(sure))["speedup"] == "worse!"


def test_lost_rows_fail_and_new_ones_do_not():
    other = {**ROW, "case": "b"}
    assert set(verdicts(result(ROW), result()).values()) == {"lost!"}
    found = compare.differences(result(ROW), result(ROW, other))
    assert {d.verdict for d in found if d.row == "b"} == {"new"}
    assert not any(d.fails for d in found)


def test_the_command_compares_files(tmp_path):
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    replace(result(ROW), comparable=["cpu"]).write(old)
    run = partial(CliRunner().invoke, app)
    result({**ROW, "speedup": 1.0}).write(new)
    red = run(["compare", str(old), str(new)])
    assert red.exit_code == 1, red.output
    assert "worse" in red.output
    assert run(["compare", str(old), str(new), "--limit", "speedup=60%"]).exit_code == 0
    assert run(["compare", str(old), str(new), "--limit", "speedup"]).exit_code == 2
    result(ROW, cpu="other").write(new)
    refused = run(["compare", str(old), str(new)])
    assert refused.exit_code == 2
    assert "cpu was 'c', is 'other'" in refused.output
    assert run(["compare", str(old), str(new), "--anyway"]).exit_code == 0


@pytest.fixture(scope="module")
def llama() -> Result:
    return exact.result([exact.measure("llama", "sdpa", "growing")])


def test_a_model_gives_what_is_expected_of_it(llama):
    expected = Result.read(regressions.EXPECTED / "exact.jsonl")
    assert {(row["architecture"], row["cache"]) for row in expected.rows} == {
        (name, cache) for name in exact.ARCHITECTURES for cache in exact.CACHES
    }
    if compare.obstacles(expected, llama):
        pytest.skip("expected of other versions")
    (key,) = llama.by_key()
    assert llama.by_key()[key] == expected.by_key()[key]


def test_a_lost_match_is_red(llama, monkeypatch):
    from spark_compile.passes import find_attention

    monkeypatch.setattr(find_attention, "MATCHERS", ())
    lost = exact.result([exact.measure("llama", "sdpa", "growing")])
    found = {d.metric: d for d in compare.differences(llama, lost)}
    assert found["rewritten"].fails
    assert found["rewritten"].new == 0


def test_a_grown_byte_is_red(llama):
    grown = exact.result([exact.measure("llama", "sdpa", "growing", recent_tokens=8)])
    found = {d.metric: d for d in compare.differences(llama, grown)}
    assert found["stored_bytes"].fails
    assert not found["rewritten"].fails


def test_a_slow_down_is_red():
    def timed_rows(ours_s: float) -> Result:
        contenders = [
            Contender(BASELINES["attend"], [partial(time.sleep, 0.002)], 1),
            Contender("ours", [partial(time.sleep, ours_s)], 1),
        ]
        interleave(contenders, 9, pass_ms=4)
        return timed.result(timed.rows_of("attend", 64, contenders))

    before = timed_rows(0.001)
    low, high = before.rows[0]["speedup_interval"]
    assert low <= before.rows[0]["speedup"] <= high
    (difference,) = compare.differences(before, timed_rows(0.004))
    assert difference.verdict == "worse"
    assert difference.fails


@pytest.mark.slow
def test_slower_kernels_are_red(monkeypatch):
    try:
        counted.check_installed()
    except counted.Missing as error:
        pytest.skip(str(error))
    before = counted.result(counted.run(["avx2"]))
    monkeypatch.setenv("SPARK_COMPILE_CXXFLAGS", "-O1")
    found = compare.differences(before, counted.result(counted.run(["avx2"])))
    assert len(found) == len(before.rows)
    assert sum(d.verdict == "worse" for d in found) > len(found) // 2


def test_counts_become_rows(tmp_path):
    text = "desc: Trigger: Client Request: attend|spark int8\ntotals: 8192000\n"
    (tmp_path / "counts.1").write_text(text)
    text = "desc: Trigger: Client Request: passes|llama, decode\ntotals: 77\n"
    (tmp_path / "counts.2").write_text(text)
    (tmp_path / "counts").write_text("desc: Trigger: Program termination\ntotals: 5\n")
    rows = list(counted.rows_of("avx2", dict(counted.counts(tmp_path))))
    assert [row["instructions"] for row in rows] == [2000, 77]
    assert [row["level"] for row in rows] == ["avx2", "python"]


@pytest.fixture
def planted(monkeypatch, tmp_path) -> dict:
    """The command with a kind of metrics that costs nothing, and folders of its own."""
    row = dict(ROW)
    monkeypatch.setattr(regressions, "KINDS", {"exact": lambda jobs: result(dict(row))})
    monkeypatch.setattr(regressions, "EXPECTED", tmp_path / "expected")
    monkeypatch.setattr(regressions, "HISTORY", tmp_path / "history.jsonl")
    return row


def test_check_is_green_until_something_gets_worse(planted, tmp_path):
    run, summary = partial(CliRunner().invoke, app), tmp_path / "summary.md"
    missing = run(["check", "--kinds", "exact"])
    assert missing.exit_code == 1, "nothing is expected yet"
    assert run(["check", "--kinds", "exact", "--update", "--record"]).exit_code == 0
    assert run(["check", "--kinds", "exact"]).exit_code == 0
    planted["instructions"] = 1100
    red = run(["check", "--kinds", "exact", "--summary", str(summary), "--record"])
    assert red.exit_code == 1
    assert "red" in summary.read_text()
    assert "| a | instructions | 1000 | 1100 | worse |" in summary.read_text()
    planted["instructions"] = 900
    assert "--update" in run(["check", "--kinds", "exact"]).output
    with pytest.raises(typer.BadParameter, match="--kinds is 'fast'"):
        regressions.main(kinds="fast")
    runs = history.read(regressions.HISTORY)
    assert [run["values"]["x: a: instructions"] for run in runs] == [1000, 1100]
    metrics = history.relative(runs, "x")
    assert metrics["x: a: instructions"] == [1.0, 1.1]
    picture = pictures.history(metrics, ["1", "2"], tmp_path / "history.png", "x")
    assert picture.stat().st_size > 10_000


def test_more_rows_than_expected_are_red(planted, monkeypatch):
    regressions.main(kinds="exact", update=True)
    more = result(ROW, {**ROW, "case": "b"})
    monkeypatch.setattr(regressions, "KINDS", {"exact": lambda jobs: more})
    with pytest.raises(typer.Exit):
        regressions.main(kinds="exact")


def test_every_command_has_help():
    for name in ("check", "compare", "decode", "gpu", "history", "kernels", "memory", "overhead",
                 "spread"):  # fmt: skip
        shown = CliRunner().invoke(app, [name, "--help"])
        assert shown.exit_code == 0, name
    assert json.loads(regressions.history_line([result(ROW)]))["values"]["x: a: sites"] == 2


def test_only_tasks_needs_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    ran = CliRunner().invoke(app, ["tasks"])
    assert ran.exit_code == 2
    assert "pip install -c .venv/torch.txt -e '.[tasks]'" in ran.output
    assert CliRunner().invoke(app, ["tasks", "--help"]).exit_code == 0


def test_what_a_spread_context_costs():
    attention, shape = spread_cost.Attention.measured(), spread_cost.SHAPES[0]
    for tokens, us in ((32_768, 48.5), (131_072, 138.3)):  # as measured
        assert attention.us(shape.token_bytes * tokens) == pytest.approx(us)
    # By hand: 7 hops of NVLink; then 14 of them and one between nodes.
    part = 4 * 32 * 129
    assert spread_cost.collective_us(shape, 1) == 0
    assert spread_cost.collective_us(shape, 8) == pytest.approx(6.6 + 7 * 0.6 + 7 * part / 141e3)
    across = 6.6 + 14 * 0.6 + 2.7 + 15 * part / 45e3
    assert spread_cost.collective_us(shape, 16) == pytest.approx(across)
    one, two = (spread_cost.token_us(shape, 1 << 20, ranks, 1, attention) for ranks in (1, 2))
    assert one == pytest.approx(32 * (attention.start_us + 4096 * 2**20 / attention.bytes_per_us))
    assert two < one
