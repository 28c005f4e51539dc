"""Bytes, rows and statistics of the kernel benchmark; nothing here is timed in earnest."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_kernels, measure, store_case
from benchmarks.attend_case import PACKED, STORED, WINDOW, Case, Shape, filled, relative_errors
from benchmarks.measure import Contender
from spark_compile.kernels.layout import LENGTH, counters

SHAPE = Shape("tiny", query_heads=4, kv_heads=2, head_dim=16)


@pytest.fixture
def case():
    torch.manual_seed(0)
    return Case(SHAPE, batch=2, tokens=100, dtype=torch.float32)


def test_contenders_compute_the_same_attention(case):
    errors = relative_errors(case.contenders(rotate_bytes=1))
    assert all(error < 1e-5 for name, error in errors.items() if not name.startswith("spark"))
    assert errors[STORED[0].name] < 1e-5
    assert errors["spark 0.5"] < errors["spark 0.8"] < 1


def test_contenders_rotate_over_the_asked_bytes(case):
    contenders = case.contenders(rotate_bytes=100_000)
    least = min(c.moved_bytes for c in contenders)
    counts = {len(c.calls) for c in contenders}
    assert counts == {-(-100_000 // least)}


@pytest.mark.parametrize("stored", STORED, ids=lambda stored: stored.name)
def test_bytes_are_those_of_the_layout(case, stored):
    named = {c.name: c.moved_bytes for c in case.contenders(rotate_bytes=1)}
    spec, total = stored.spec(16, torch.float32), 0
    for side in ("key", "value"):
        total += spec.pages(side).page_bytes + spec.head(side).offsets["tail"] + 48 * 16 * 4
    assert named[stored.name] == 2 * 2 * total  # a page, and 48 tokens that wait
    assert named[PACKED] == 2 * 2 * 81 * 16 * 4 * 2


@pytest.mark.parametrize("tokens", [96, 4096 + 96, 5000])
def test_pages_and_tail_are_the_tokens_that_dense_attention_reads(tokens):
    case = Case(SHAPE, batch=1, tokens=tokens, dtype=torch.float32)
    output = case.step(case.layer(STORED[0]), keep=None)
    dense = case.packed_queries(*case.rows(0, case.cached + 1))
    torch.testing.assert_close(output, dense)
    assert tokens - WINDOW - 1 <= case.cached < tokens


def test_filled_repeats_into_memory_of_its_own():
    drawn = torch.arange(6.0).view(1, 1, 3, 2)
    rows = filled(drawn, 4, spare=1)
    assert rows[0, 0].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [0, 0]]
    assert rows.data_ptr() != drawn.data_ptr()


@pytest.mark.parametrize("make", [store_case.build_contenders, store_case.step_contenders])
def test_storing_contenders_run(case, make):
    contenders = make(case, 1)
    for contender in contenders:
        contender.calls[0]()
        assert contender.moved_bytes > 0
    assert {stored.name for stored in STORED} <= {c.name for c in contenders}


def test_one_step_in_a_window_packs(case):
    count, stored = 5, STORED[2]
    calls = [
        store_case.Appending(case, stored, store_case.first_packing(index, count))
        for index in range(count)
    ]
    pages = [call.layer.pages[0][:, :, -1] for call in calls]
    packed = []
    for number in range(2 * WINDOW + 9):
        call, page = calls[number % count], pages[number % count]
        page.zero_()
        call()
        packed += [number] if page.any() else []
    assert packed == [0, WINDOW, 2 * WINDOW]
    lengths = [int(counters(call.layer.heads[0])[0, 0, LENGTH]) for call in calls]
    assert all(64 <= length < 64 + WINDOW for length in lengths)


def test_a_row_compares_within_the_run():
    row = bench_kernels.row_of(Contender("x", [], 1000, times_ms=[2.0, 1.0, 9.0]), 4.0, 1e6)
    assert (row["median_ms"], row["min_ms"], row["max_ms"], row["repeats"]) == (2, 1, 9, 3)
    assert (row["speedup"], row["bytes_per_s"]) == (2, 500_000)
    assert (row["limit_ms"], row["limit_share"]) == (1, 0.5)


def test_interleave_takes_turns_and_changes_layers():
    log = []
    contenders = [
        Contender(name, [lambda name=name, i=i: log.append((name, i)) for i in range(3)], 1)
        for name in "ab"
    ]
    measure.interleave(contenders, repeats=4, pass_ms=0)
    assert [name for name, _ in log] == list("aabb" + "ab" * 4)
    assert [layer for name, layer in log if name == "a"] == [0, 1, 2, 0, 1, 2]
    assert [len(c.times_ms) for c in contenders] == [4, 4]


def test_interleave_times_whole_periods():
    log = []
    contender = Contender("a", [lambda: log.append(1)], 1, period=7)
    measure.interleave([contender], repeats=2, pass_ms=0)
    assert len(log) == 2 + 2 * 7


def test_other_load_counts_what_is_not_ours(monkeypatch):
    clock = iter([(0.0, 10.0, 1.0), (2.0, 13.0, 2.0)])  # 3 s busy in all, 1 s of them ours
    monkeypatch.setattr(measure.OtherLoad, "_now", staticmethod(lambda: next(clock)))
    monkeypatch.setattr(measure.os, "cpu_count", lambda: 2)
    assert measure.OtherLoad().share() == 0.5
