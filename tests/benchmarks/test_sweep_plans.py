"""Plans of a sweep: made once, by text that is not measured, and measured like methods."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sweeps import CONTEXTS, TEXT_TOKENS, measured, plan, rows, tuned

from benchmarks import quality
from benchmarks.sweep_jobs import Text, Tune, unmeasured
from spark_compile.plan import Plan


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
