"""Threads that read and continue one handle at the same time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from states import new_rows, prefill
from torch import Tensor

from spark_compile import SparkConfig
from spark_compile.state import SparkTensor

TRIALS = 3000
CONFIG = SparkConfig(key_ratio=0, window=3, recent_tokens=1)


@pytest.fixture(autouse=True)
def switch_often() -> Iterator[None]:
    """Let threads take turns after a few bytecodes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def continued(barrier: Barrier, state: SparkTensor, new: list[Tensor]) -> list[Tensor]:
    """What a thread sees after each of its appends, read once all have been done."""
    barrier.wait()
    handles = [state]
    for rows in new:
        handles.append(handles[-1].appended(rows))
    return [handle.dense() for handle in handles]


@pytest.mark.parametrize("length", [4, 5, 6])
def test_threads_that_continue_one_handle_never_see_each_others_tokens(length: int) -> None:
    """In a page, on the verge of packing one, and right after that."""
    barrier, failures = Barrier(2), 0
    with ThreadPoolExecutor(2) as pool:
        for _ in range(TRIALS // 3):
            state = prefill(CONFIG, length, batch=1).keys
            expected, news = state.dense(), [[new_rows(state, 1) for _ in range(2)] for _ in "ab"]
            runs = [pool.submit(continued, barrier, state, new) for new in news]
            for run, new in zip(runs, news, strict=True):
                seen, dense = run.result(), expected
                for rows, after in zip((None, *new), seen, strict=True):
                    dense = dense if rows is None else torch.cat((dense, rows), 2)
                    failures += not torch.equal(after, dense)
    assert failures == 0


def test_a_handle_is_read_while_another_thread_continues_it() -> None:
    barrier, failures = Barrier(2), 0

    def read(state: SparkTensor) -> list[Tensor]:
        barrier.wait()
        return [state.dense(), state.clone().dense(), state[:, :, :3].dense(), state.dense()]

    with ThreadPoolExecutor(2) as pool:
        for _ in range(TRIALS // 3):
            state = prefill(CONFIG, 4, batch=1).keys
            dense, new = state.dense(), [new_rows(state, 1) for _ in range(4)]
            writing = pool.submit(continued, barrier, state, new)
            seen = pool.submit(read, state).result()
            for after, tokens in zip(seen, (4, 4, 3, 4), strict=True):
                failures += not torch.equal(after, dense[:, :, :tokens])
            failures += not torch.equal(writing.result()[-1], torch.cat((dense, *new), 2))
    assert failures == 0


def test_a_loaded_handle_is_read_and_continued_at_the_same_time() -> None:
    """Its counters are first read when somebody asks."""
    barrier = Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(TRIALS // 6):
            made = prefill(CONFIG, 4, batch=1).keys
            state = type(made)(tuple(made.shape), made.form, made.stored())
            news = [[new_rows(state, 1)], [new_rows(state, 1)]]
            runs = [pool.submit(continued, barrier, state, new) for new in news]
            for run, new in zip(runs, news, strict=True):
                assert torch.equal(run.result()[1], torch.cat((made.dense(), new[0]), 2))
