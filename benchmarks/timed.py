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


def interval(ours: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval (Efron 1979) of the speed ratio of times measured in turns."""
    draw = random.Random(0)
    pairs = list(zip(ours, base, strict=True))
    found = []
    for _ in range(RESAMPLES):
        drawn = draw.choices(pairs, k=len(pairs))
        one, other = (statistics.median(times) for times in zip(*drawn, strict=True))
        found.append(other / one)
    found.sort()
    return found[round(0.025 * RESAMPLES)], found[round(0.975 * RESAMPLES) - 1]


def rows_of(operation: str, tokens: int, contenders: Sequence[Contender]) -> list[Row]:
    """Rows of contenders that have been timed."""
    base = next(c for c in contenders if c.name == BASELINES[operation])
    return [
        {
            "operation": operation, "tokens": tokens, "contender": c.name,
            "speedup": statistics.median(base.times_ms) / statistics.median(c.times_ms),
            "speedup_interval": interval(c.times_ms, base.times_ms),
        }
        for c in contenders
        if c is not base
    ]  # fmt: skip


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
