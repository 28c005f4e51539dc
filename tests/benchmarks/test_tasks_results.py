"""Results of tasks: going on, differences from the dense cache, the page. Needs no lm-eval."""

from __future__ import annotations

import json
import math

import pytest
from rich.console import Console

from benchmarks import measure, tasks_report
from benchmarks.quality_methods import ours
from benchmarks.results import Result
from benchmarks.tasks_compare import lines, not_compared, relative, settings
from benchmarks.tasks_methods import DENSE, SNAPKV_NAME, methods
from benchmarks.tasks_results import ESSAYS, Key, Results, ResultsError, summary

MACHINE = {
    "torch": "2", "transformers": "5", "lm_eval": "0", "commit": "c", "cpu": "x", "threads": 1,
    "date": "2026-01-01T00:00:00",
}  # fmt: skip
SETTINGS = {"model": "smollm2", "dtype": "bfloat16", "answer_tokens": 0, "inner": "eager"}
SPARK = f"{SNAPKV_NAME} + spark .5"


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    return lambda settings=SETTINGS, machine=MACHINE, fresh=False: Results(
        "smollm2", settings, machine, fresh
    )


def filled(results):
    """Two tasks, three methods; SnapKV loses a third of a task, SparK half of the rest."""
    scores = {
        DENSE: ([1, 1, 1], [1, 0, 0.5]),
        SNAPKV_NAME: ([1, 1, 1], [0.5, 0, 0.5]),
        SPARK: ([1, 0, 0.5], [0.5, 0, 0]),
    }
    for share, (name, both) in zip((1.06, 0.3, 0.2), scores.items(), strict=True):
        for task, own in zip(("niah_single_1", "ruler_vt"), both, strict=True):
            key = Key(name, task, 1024, "visible")
            results.add(key, ours(name), own, [share] * 3, 1)
    results.add(Key(DENSE, ESSAYS, 1024, "visible"), ours(DENSE), [3.0, 3.2], [1, 1], 1)
    return results


def test_what_is_measured_is_not_measured_again(results):
    key, method = Key("m", "t", 1024, "hidden"), ours("m", key_ratio=0.5)
    first = results()
    assert first.missing(key, method.what, 2) == range(2)
    first.add(key, method, [1.0, 0.0], [0.5, 0.5], 3)
    again = results()
    assert again.missing(key, method.what, 2) == range(2, 2)
    assert again.missing(key, method.what, 4) == range(2, 4)
    row = again.add(key, method, [1.0, 1.0], [0.25, 0.25], 1)
    assert row["scores"] == [1, 0, 1, 1]
    assert (row["score"], row["samples"], row["seconds"]) == (0.75, 4, 4)
    assert row["stderr"] == pytest.approx(0.25)
    assert row["share"] == pytest.approx(0.375)
    assert again.missing(key, "another", 2) == range(2)
    assert len(Result.read(again.path).rows) == 1


def test_other_settings_or_versions_are_not_mixed(results):
    key, method = Key("m", "t", 1024, "visible"), ours("m")
    results().add(key, method, [1.0], [1], 1)
    assert results(machine=MACHINE | {"cpu": "y"}).rows
    with pytest.raises(ResultsError, match="of other settings: dtype bfloat16, now float32"):
        results(SETTINGS | {"dtype": "float32"})
    with pytest.raises(ResultsError, match="lm_eval 0, now 1"):
        results(machine=MACHINE | {"lm_eval": "1"})
    assert not results(SETTINGS | {"dtype": "float32"}, fresh=True).rows


def test_perplexity_and_its_error():
    assert summary("t", [0.5]) == (0.5, None)
    perplexity, error = summary(ESSAYS, [3.0, 3.2])
    assert perplexity == pytest.approx(math.exp(3.1))
    assert error == pytest.approx(math.exp(3.1) * 0.1)


def test_differences_are_those_of_the_same_samples(results):
    rows = filled(results()).rows
    assert settings(rows) == [(1024, "visible")]
    dense, snapkv, spark = lines(rows, settings(rows)[0])
    assert dense.average.mean == 0.75
    assert dense.changes["ruler_vt"] == (0, 0)
    assert dense.perplexity.mean == pytest.approx(math.exp(3.1))
    # The difference of the first sample alone: as large as its standard error, so not lower.
    assert snapkv.changes["ruler_vt"] == (pytest.approx(-1 / 6), pytest.approx(1 / 6))
    assert snapkv.lost() == []
    assert spark.lost() == ["niah_single_1", "ruler_vt"]
    error = math.hypot(0.2886751, 1 / 6) / 2
    assert spark.change == (pytest.approx(-5 / 12), pytest.approx(error))
    found = relative([dense, snapkv, spark])
    assert found[SPARK] == (pytest.approx(32.04 / 32.38), pytest.approx(0.5))
    assert relative([dense]) == {}


def test_tasks_are_compared_that_most_methods_have(results):
    written = filled(results())
    late, alone = Key("late", "ruler_vt", 1024, "visible"), Key(DENSE, "ruler_fwe", 1024, "visible")
    written.add(late, ours("late"), [1.0], [0.5], 1)
    written.add(alone, ours(DENSE), [0.5], [1.06], 1)
    setting = settings(written.rows)[0]
    found = lines(written.rows, setting)
    assert [line.method for line in found] == [DENSE, SNAPKV_NAME, SPARK]
    assert list(found[0].scores) == ["niah_single_1", "ruler_vt"]
    assert found[0].samples == 3
    assert not_compared(written.rows, setting, found) == {late: (1, None), alone: (0.5, None)}


def test_the_page(results, monkeypatch, tmp_path):
    monkeypatch.setattr(tasks_report, "PAGE", tmp_path / "results.md")
    written = filled(results())
    tasks_report.write(Console(width=120))
    page = (tmp_path / "results.md").read_text()
    assert "| SnapKV 128 + spark .5 | 20.0% | 33.3 ± 16.7 | -41.7 ± 16.7 | 50.0 ± 28.9 ↓ |" in page
    assert "| SnapKV 128 + spark .5 | 32.04 | 98.9% | 50.0% |" in page
    assert "| SnapKV 128 + think .8 | 16.97 | 52.4% | - |" in page
    assert "SparK over ThinK" not in page  # not measured
    think = Key(f"{SNAPKV_NAME} + think .5", "", 1024, "visible")
    for task in ("niah_single_1", "ruler_vt"):
        written.add(think._replace(task=task), ours("think"), [0, 0, 0.5], [0.2] * 3, 1)
    tasks_report.write(Console(width=120))
    page = (tmp_path / "results.md").read_text()
    assert (
        "SparK over ThinK at .5, on SnapKV 128: +16.7 points (the paper, on LongBench: +3.8)"
        in page
    )
    assert written.path.with_suffix(".png").stat().st_size > 10_000
    assert json.dumps(SETTINGS) in page


def test_methods_are_those_of_the_issue():
    names = [method.name for method in methods(64, 30)]
    assert names[:4] == [DENSE, "near-lossless", "balanced", "smallest"]
    assert {
        "budget 0.52",
        "budget 0.28",
        "budget 0.20",
        "spark .8",
        "PyramidKV 128 + think .8",
    } < set(names)
    spark = next(m for m in methods(64, 30) if m.name == f"{SNAPKV_NAME} + spark .8")
    assert spark.config.key_format == "spark(kept=13)"
    assert spark.config.evict == "snapkv(tokens=128)"
