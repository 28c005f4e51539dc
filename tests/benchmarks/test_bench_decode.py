"""Comparisons and rows of the decode benchmark, with processes that only pretend."""

from __future__ import annotations

import pytest

from benchmarks import bench_decode, decode_run
from benchmarks.decode_models import COMPETITORS, DYNAMIC, SPARK, STATIC
from benchmarks.decode_run import WorkerError, growth, measure_context, with_speedups

SETTINGS = decode_run.Settings(
    repeats=2, steps=3, layers=1, dtype="float32", threads=1, side_by_side=2
)


class FakeProcess:
    """Answers as a worker does; ``fails`` names the command that it dies of."""

    def __init__(self, competitor, step_ms=1.0, fails=""):
        self.competitor, self.step_ms, self.fails, self.asked = competitor, step_ms, fails, []

    def send(self, do, **arguments):
        self.asked.append((do, arguments))

    def answer(self):
        do, _ = self.asked[-1]
        if do == self.fails:
            raise WorkerError("ended with -9: out of memory")
        return {
            "warm": {"warm_s": 1.0},
            "prefill": {"prefill_s": 2.0},
            "steps": {"steps_ms": [self.step_ms] * 3, "tokens": [1, 2, 3], "others_share": 0.0},
            "finish": {"kv_bytes": 5, "peak_bytes": 6, "process_peak_bytes": 7},
        }[do]

    def ask(self, do, **arguments):
        self.send(do, **arguments)
        return self.answer()

    def close(self):
        pass


def row(family, name, median_ms, context=512):
    return {"family": family, "competitor": name, "median_ms": median_ms, "context": context}


def test_rows_of_a_context():
    processes = [FakeProcess(COMPETITORS[0], 4.0), FakeProcess(COMPETITORS[-1], 2.0)]
    rows = measure_context(processes, "tiny", 100, SETTINGS)
    assert [r["tokens_per_s"] for r in rows] == [250, 500]
    assert [r["repeats"] for r in rows] == [6, 6]
    assert rows[0]["tokens"] == [1, 2, 3, 1, 2, 3]
    assert rows[0]["prefill_tokens_per_s"] == 50
    order = [do for do, _ in processes[0].asked]
    assert order == ["warm", "prefill", "steps", "steps", "finish"]


@pytest.mark.parametrize("command", ["warm", "prefill", "steps", "finish"])
def test_a_worker_that_dies_is_a_row_with_its_error(command):
    processes = [FakeProcess(COMPETITORS[0]), FakeProcess(COMPETITORS[2], fails=command)]
    rows = measure_context(processes, "tiny", 100, SETTINGS)
    assert "out of memory" in rows[1]["error"]
    assert "median_ms" in rows[0]
    assert [p.competitor for p in processes] == [COMPETITORS[0]]
    assert bench_decode.context_table(with_speedups(rows)).row_count == 2


def test_speed_is_relative_to_the_faster_setting():
    rows = [
        row(DYNAMIC, "a", 8.0),
        row(DYNAMIC, "b", 6.0),
        row(STATIC, "c", 12.0),
        {"family": STATIC, "competitor": "d", "error": "gone"},
        row(SPARK, "e", 3.0),
    ]
    compared = with_speedups(rows)
    assert [r["fastest_of_family"] for r in compared] == [False, True, True, False, False]
    assert compared[-1]["speedup_over_DynamicCache"] == 2
    assert compared[-1]["speedup_over_StaticCache"] == 4
    assert "speedup_over_StaticCache" not in compared[3]


def test_growth_is_the_least_squares_slope():
    rows = [row(SPARK, "e", 10 + tokens * 0.002, tokens) for tokens in (512, 1024, 2048, 4096)]
    rows.append(row(DYNAMIC, "only once", 1.0))
    (found,) = growth(rows, contexts=(512, 2048, 4096))
    assert found["us_per_1000_tokens"] == pytest.approx(2000)
    assert found["contexts"] == [512, 2048, 4096]
    assert found["longest_ms"] == pytest.approx(18.192)


def test_names_are_unique():
    assert len({c.name for c in COMPETITORS}) == len(COMPETITORS)
