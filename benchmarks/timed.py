"""Times over those of dense attention in the same run, with how sure they are."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

import torch

from .attend_case import SHAPES, Case
from .bench_kernels import BASELINES, MAKERS
from .measure import Contender, interleave, machine_facts
from .results import Metric, Result, Row

CASES = {"attend": (512, 8192), "step": (8192,), "build": (4096,)}
"""Operations, and cached tokens or those of a prompt."""
SHAPE = "llama"
REPEATS, ROTATE_BYTES, RESAMPLES = 15, 256 << 20, 2000
METRICS = {"speedup": Metric("ratio", "more")}
"""Over the fastest dense way of attending, appending by cat, and copying."""


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median (Efron 1979)."""
    draw = random.Random(0)
    medians = sorted(
        statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES)
    )
    return medians[round(0.025 * RESAMPLES)], medians[round(0.975 * RESAMPLES) - 1]


def rows_of(operation: str, tokens: int, contenders: Sequence[Contender]) -> list[Row]:
    """Rows of contenders that have been timed in turns: of each turn, the ratio of two times."""
    base = next(c for c in contenders if c.name == BASELINES[operation])
    rows = []
    for contender in contenders:
        if contender is base:
            continue
        ratios = [b / own for b, own in zip(base.times_ms, contender.times_ms, strict=True)]
        rows.append(
            {
                "operation": operation, "tokens": tokens, "contender": contender.name,
                "speedup": statistics.median(ratios), "speedup_interval": interval(ratios),
            }
        )  # fmt: skip
    return rows


def run() -> list[Row]:
    """Time all cases on one thread, their contenders in turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[Row] = []
    try:
        for operation, lengths in CASES.items():
            for tokens in lengths:
                contenders = MAKERS[operation](
                    Case(SHAPES[SHAPE], 1, tokens, torch.bfloat16), ROTATE_BYTES
                )
                # None may sit out a round: the interval is that of pairs.
                interleave(contenders, REPEATS, budget_s=float("inf"))
                rows += rows_of(operation, tokens, contenders)
    finally:
        torch.set_num_threads(threads)
    return rows


def result(rows: list[Row]) -> Result:
    """The rows as a file; ratios of another processor are others."""
    machine = machine_facts()
    return Result(
        "timed", ["operation", "tokens", "contender"], METRICS, rows, {}, machine, ["cpu", "isa"]
    )
