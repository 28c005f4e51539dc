"""Sweeps without Ray: what is due, going on, failures, Ctrl-C, machines, plans."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import typer

from benchmarks import measure, quality, sweep
from benchmarks.quality_methods import Peer, ours
from benchmarks.quality_peers import PerChannel, PerToken, Rounded
from benchmarks.quality_results import Results
from benchmarks.results import Result
from benchmarks.sweep_jobs import Measure, Setup, Text, Tune, Tuned, WorkerError, unmeasured
from spark_compile.plan import Measured, Plan, PlannedLayer

CONTEXTS = (1024, 2048)
INT8 = ours("int8", key_dtype="int8", value_dtype="int8")
KIVI = Peer("KIVI-4", PerChannel(4), PerToken(4))
ROUNDED = Peer("bfloat16", Rounded(), Rounded())
ROW = {"kl": 0.1, "nll": 3.1, "dense_nll": 3.0, "packed_share": 0.5, "whole_share": 0.6,
       "seconds": 1.0, "commit": "c"}  # fmt: skip
TEXT_TOKENS = 100_000


def described(**changes):
    return measure.lasting(measure.machine_facts()) | changes


def measured(job, **changes):
    """What a worker returns for a job of measuring."""
    return {"windows": {str(n): {**ROW, "machine": described(**changes)} for n in job.numbers}}


def plan(budget, key="quantized(bits=4)"):
    layer = PlannedLayer("model.layers.0.self_attn", key, "int8", 0.2, {key: 0.1}, {"int8": 0.2})
    facts = Measured("Llama", "bfloat16", "float32", 0.0, ((64, 64),), 4, 1024, 128, {"torch": "2"})
    return Plan(budget, 0.2, (layer,), facts)


def tuned(job, key="quantized(bits=4)", used=None):
    """What a worker returns for a job of tuning."""
    text = unmeasured(TEXT_TOKENS, 0, job.contexts, job.windows, 1152, job.settings["windows"])
    machine = measure.machine_facts()
    return Tuned(plan(job.budget, key), Text(TEXT_TOKENS, 0, used or text.used), machine, 1.0)


class Here:
    """Answers jobs one after the other; an answer may be an exception."""

    def __init__(self, answer):
        self.answer, self.waiting, self.titles, self.stopped = answer, [], [], False

    def start(self, job):
        self.waiting.append(job)

    def next(self):
        if not self.waiting:
            return None
        job = self.waiting.pop(0)
        self.titles.append(job.title)
        try:
            return job, self.answer(job)
        except Exception as error:
            return job, error

    def stop(self):
        self.stopped = True


def answered(job):
    return tuned(job) if isinstance(job, Tune) else measured(job)


@pytest.fixture
def swept(monkeypatch, tmp_path):
    """Runs a sweep whose jobs are answered by a function: titles of the jobs, exit status."""
    monkeypatch.setattr(sweep, "methods", lambda _: (INT8, KIVI))

    def run(answer=answered, **options):
        started = []

        def executor(*_):
            started.append(Here(answer))
            return started[0]

        monkeypatch.setattr(sweep, "on_ray", executor)
        given = {"model": "smollm2", "context": "1024", "windows": 2, "only": "*", "budget": "",
                 "tune_windows": 4, "fresh": False, "inner": "eager", "threads": 1, "address": "",
                 "cpus": 0, "results": tmp_path, **options}  # fmt: skip
        status = 0
        try:
            sweep.main(**given)
        except typer.Exit as error:
            status = error.exit_code
        assert all(each.stopped for each in started)
        return (started[0].titles if started else []), status

    return run


def rows(folder, context=1024):
    result = Result.read(folder / f"quality-smollm2-{context}.jsonl")
    return {row["method"]: row for row in result.rows}


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


def test_plans_are_made_once_and_then_measured(swept, tmp_path):
    titles, status = swept(budget=".28,smallest,0.18", context="1024,2048", only="")
    assert titles[:2] == ["smollm2, plan for 0.28", "smollm2, plan for 0.18"]
    assert sorted(titles[2:]) == sorted(
        f"smollm2, {context} tokens: plan smollm2-{budget}"
        for context in CONTEXTS
        for budget in (0.28, 0.18)
    )
    assert status == 0
    loaded = Plan.load(tmp_path / "plans" / "smollm2-0.28.json")
    assert loaded == plan(0.28)
    assert rows(tmp_path, 2048)["plan smollm2-0.18"]["windows"] == 2
    again = {"budget": "0.28,0.18", "context": "1024,2048", "only": ""}
    assert swept(**again) == ([], 0)
    (tmp_path / "plans" / "smollm2-0.28.json").unlink()
    # The same plan comes again, and with it what was measured of it; another one is measured.
    assert swept(**again) == (["smollm2, plan for 0.28"], 0)
    (tmp_path / "plans" / "smollm2-0.28.json").unlink()
    other = "quantized(bits=3)"
    titles, _ = swept(
        lambda job: tuned(job, other) if isinstance(job, Tune) else measured(job), **again
    )
    assert len(titles) == 3
    assert other in rows(tmp_path)["plan smollm2-0.28"]["what"]
    assert len(swept(**again, fresh=True)[0]) == 6


def test_a_plan_that_has_seen_a_window_is_made_anew(swept):
    (third,) = Text(TEXT_TOKENS, 0, []).measured([1024], 3)[2:]
    seen = [(third[0] + 5, third[0] + 9)]

    def answer(job):
        return tuned(job, used=seen) if isinstance(job, Tune) else measured(job)

    assert len(swept(answer, budget="0.28", only="", windows=2)[0]) == 2
    titles, _ = swept(budget="0.28", only="", windows=3)
    assert titles == ["smollm2, plan for 0.28", "smollm2, 1024 tokens: plan smollm2-0.28"]


def test_a_plan_that_cannot_be_made_is_told(swept, capsys):
    def answer(job):
        if isinstance(job, Tune):
            raise ValueError("budget is 0.01: allowed is 0.1403 or more")
        return measured(job)

    titles, status = swept(answer, budget="0.01")
    assert (len(titles), status) == (3, 1)
    told = "failed: smollm2, plan for 0.01: ValueError: budget is 0.01: allowed is 0.1403 or more"
    assert told in capsys.readouterr().out
    assert swept(budget="0.01")[0][0] == "smollm2, plan for 0.01"


def test_plans_of_other_settings_are_replaced(swept, capsys):
    swept(budget="0.28", only="")
    assert swept(budget="0.28", only="", tune_windows=2)[0] == ["smollm2, plan for 0.28"]
    assert "is replaced: windows 4, now 2" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("before", [0, 1])
def test_plans_are_made_by_text_that_is_not_measured(before):
    text = unmeasured(TEXT_TOKENS, before, (1024, 4096), 8, 1152, 4)
    assert [stop - start for start, stop in text.used] == [1152 - before] * 4
    used = {place for start, stop in text.used for place in range(start, stop)}
    assert len(used) == 4 * (1152 - before)

    # The windows, as the quality benchmark draws them.
    def tokenizer(written):
        ids = range(10, 10 + len(written))
        return SimpleNamespace(input_ids=[0] * before + [*ids])

    for context in (1024, 4096):
        length = context + quality.SCORED_TOKENS + 1
        for window in quality.disjoint_windows(tokenizer, "x" * TEXT_TOKENS, length, 8):
            assert window.shape == (1, length)
            assert used.isdisjoint((window[0, before:] - 10).tolist())
    assert text.is_apart((1024, 4096), 8)
    with pytest.raises(ValueError, match=r"4 stretches of 1152 tokens .*: the text has 0"):
        unmeasured(10_000, before, (1024,), 7, 1152, 4)


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
