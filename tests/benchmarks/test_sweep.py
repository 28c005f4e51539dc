"""Sweeps without Ray: what is due, going on, failures, Ctrl-C, machines."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import typer
from sweeps import CONTEXTS, INT8, KIVI, described, measured, rows

from benchmarks import measure, sweep
from benchmarks.quality_methods import Peer
from benchmarks.quality_peers import Rounded
from benchmarks.quality_results import Results
from benchmarks.results import Result
from benchmarks.sweep_jobs import Measure, Setup, Tune, WorkerError

ROUNDED = Peer("bfloat16", Rounded(), Rounded())


def test_what_is_measured_is_not_run_again(swept, tmp_path):
    titles, status = swept(context="1024,2048", windows=1)
    assert titles == [
        f"smollm2, {context} tokens: {name}" for context in CONTEXTS for name in ("int8", "KIVI-4")
    ]
    assert status == 0
    assert swept(context="1024,2048", windows=1) == ([], 0)
    asked = []
    swept(lambda job: asked.append(job.numbers) or measured(job), only="KIVI*", windows=3)
    assert asked == [(1, 2)]
    found = rows(tmp_path)
    assert {name: row["windows"] for name, row in found.items()} == {"int8": 1, "KIVI-4": 3}
    assert rows(tmp_path, 2048)["KIVI-4"]["windows"] == 1
    assert (tmp_path / "quality-smollm2-1024.png").stat().st_size > 10_000
    assert len(swept(only="KIVI*", fresh=True)[0]) == 1


def test_the_quality_benchmark_goes_on_from_a_sweep(swept, tmp_path):
    swept(budget="0.28")
    settings, machine = Results.of("smollm2", 1024, "eager", {}).settings, measure.machine_facts()
    results = Results("quality-smollm2-1024", settings, machine, folder=tmp_path)
    assert results.go_on([INT8, KIVI]) == ""
    assert [results.due(method, 3) for method in (INT8, KIVI, ROUNDED)] == [(2,), (2,), (0, 1, 2)]
    results.save()
    assert set(rows(tmp_path)) == {"int8", "KIVI-4", "plan smollm2-0.28"}


def test_ctrl_c_keeps_what_was_written_and_the_next_sweep_goes_on(swept, tmp_path, capsys):
    def answer(job):
        if job.method is KIVI:
            raise KeyboardInterrupt
        return measured(job)

    titles, status = swept(answer)
    assert (len(titles), status) == (2, 130)
    assert list(rows(tmp_path)) == ["int8"]
    assert "the same command goes on from here" in capsys.readouterr().out
    assert swept() == (["smollm2, 1024 tokens: KIVI-4"], 0)
    assert set(rows(tmp_path)) == {"int8", "KIVI-4"}


def test_a_job_that_fails_is_told_and_the_others_go_on(swept, tmp_path, capsys):
    def answer(job):
        if job.method is INT8:
            raise RuntimeError("no [room] for it")
        return measured(job)

    titles, status = swept(answer)
    assert (len(titles), status) == (2, 1)
    failure = "failed: smollm2, 1024 tokens: int8: RuntimeError: no [room] for it"
    assert failure in capsys.readouterr().out
    assert rows(tmp_path)["int8"]["error"] == "RuntimeError: no [room] for it"
    assert rows(tmp_path)["KIVI-4"]["windows"] == 2
    assert swept() == (["smollm2, 1024 tokens: int8"], 0)
    assert "error" not in rows(tmp_path)["int8"]


def test_windows_from_before_an_error_are_kept(swept, tmp_path):
    def answer(job):
        found = measured(job)
        return {"windows": {"0": found["windows"]["0"]}, "error": "ValueError: odd"}

    assert swept(answer, only="KIVI-4")[1] == 1
    row = rows(tmp_path)["KIVI-4"]
    assert (row["windows"], row["error"]) == (1, "ValueError: odd")
    asked = []
    swept(lambda job: asked.append(job.numbers) or measured(job), only="KIVI-4")
    assert asked == [(1,)]


def test_rows_say_on_which_other_machine_they_were_measured(swept, tmp_path, capsys, monkeypatch):
    swept(lambda job: measured(job, **({"cpu": "Elsewhere"} if job.method is KIVI else {})))
    found = rows(tmp_path)
    assert "machine" not in found["int8"]["measured"]["0"]
    assert found["KIVI-4"]["measured"]["0"]["machine"] == described(cpu="Elsewhere")
    assert "measured on several machines: " in capsys.readouterr().out
    # Gone on with on a third machine, whose file it is then.
    here, facts = described(), measure.machine_facts()
    monkeypatch.setattr(measure, "machine_facts", lambda: facts | {"cpu": "Third"})
    swept(lambda job: measured(job), windows=3, only="int8")
    found = rows(tmp_path)
    assert found["int8"]["measured"]["0"]["machine"] == here
    assert "machine" not in found["int8"]["measured"]["2"]
    assert found["KIVI-4"]["measured"]["0"]["machine"]["cpu"] == "Elsewhere"
    assert found["int8"]["cpus"] == sorted([here["cpu"], "Third"])


def test_results_of_other_versions_or_settings_are_not_gone_on_with(swept, tmp_path, capsys):
    swept()
    path = tmp_path / "quality-smollm2-1024.jsonl"
    earlier = Result.read(path)
    changes = {"machine": {**earlier.machine, "transformers": "5.0.0"}}
    dataclasses.replace(earlier, **changes).write(path)
    assert len(swept(only="KIVI-4")[0]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "is replaced: transformers 5.0.0, now" in said
    assert list(rows(tmp_path)) == ["KIVI-4"]
    assert len(swept(only="KIVI-4", inner="aot_eager")[0]) == 1
    assert "is replaced: inner eager, now aot_eager" in " ".join(capsys.readouterr().out.split())


def test_a_worker_with_other_versions_measures_nothing():
    threads, facts = torch.get_num_threads(), measure.machine_facts()
    assert Setup.here(threads, facts | {"commit": "c"}).begin()["commit"] == "c"
    for name in ("torch", "transformers"):
        setup = Setup.here(threads, facts | {name: "0.1"})
        with pytest.raises(WorkerError, match=f"has {name} .*, but the sweep was .* with 0.1"):
            Measure("smollm2", 1024, KIVI, (0,), 1, "eager", setup).run()
        with pytest.raises(WorkerError, match=name):
            Tune("smollm2", 0.3, (1024,), 1, {}, setup).run()


def test_options_are_checked(swept, monkeypatch):
    for wrong, message in (
        ({"budget": "0.3,huge"}, "--budget is 'huge'"),
        ({"budget": "0"}, "--budget is '0'"),
        ({"threads": 3, "cpus": 2}, "allowed is 1 to 2"),
        ({"address": "auto", "cpus": 2}, "allowed is --address or --cpus"),
        ({"model": "gpt5"}, "--model is 'gpt5'"),
        ({"context": "100"}, "--context is 100"),
        ({"only": "none such"}, "allowed are patterns of int8"),
    ):
        with pytest.raises(typer.BadParameter, match=message):
            swept(**wrong)


def test_without_ray_a_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(sweep, "find_spec", lambda _: None)
    with pytest.raises(typer.Exit) as raised:
        sweep.on_ray("", 1, 1)
    assert raised.value.exit_code == 2
    assert capsys.readouterr().err == "sweep needs ray: pip install 'spark-compile[sweep]'\n"
