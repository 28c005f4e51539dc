"""Methods beside the dense cache and beside the paper: averages, differences, their errors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .quality_report import mean_and_error
from .tasks_methods import DENSE, SNAPKV_NAME
from .tasks_results import ESSAYS, VISIBLE, Key

Rows = Mapping[Key, dict[str, Any]]
PAPER = {
    DENSE: 44.27,
    SNAPKV_NAME: 32.38,
    f"{SNAPKV_NAME} + spark .5": 32.04,
    f"{SNAPKV_NAME} + spark .8": 31.16,
    f"{SNAPKV_NAME} + think .5": 28.20,
    f"{SNAPKV_NAME} + think .8": 16.97,
}
"""LongBench averages in the paper, arXiv 2508.15212, with SnapKV at a budget of 128 tokens."""


class Setting(NamedTuple):
    """What is compared with each other."""

    context: int
    question: str


class Value(NamedTuple):
    """A mean and its standard error, None of a single sample."""

    mean: float
    error: float | None


@dataclass(frozen=True)
class Line:
    """A method in a setting."""

    method: str
    share: float
    """Stored bytes over dense bytes, mean over the tasks."""
    scores: dict[str, Value]
    """By task."""
    changes: dict[str, Value]
    """Score less that of the dense cache on the same samples, by task."""
    perplexity: Value | None
    """Of the essays."""
    samples: int
    """Least of a task."""

    @property
    def average(self) -> Value:
        return _average(list(self.scores.values()))

    @property
    def change(self) -> Value | None:
        """None without the dense cache."""
        return _average(list(self.changes.values())) if self.changes else None

    def lost(self) -> list[str]:
        """Tasks lower than with the dense cache by more than the standard error of that."""
        return [t for t, change in self.changes.items() if change.mean < -(change.error or 0)]


def settings(rows: Rows) -> list[Setting]:
    """What has been measured: short prompts first, visible questions before hidden ones."""
    found = {Setting(key.context, key.question) for key in rows if key.task != ESSAYS}
    return sorted(found, key=lambda setting: (setting.context, setting.question != VISIBLE))


def lines(rows: Rows, setting: Setting) -> list[Line]:
    """From most bytes to fewest the methods that have all tasks which most methods have."""
    tasks = _by_method(rows, setting)
    named = dict.fromkeys(task for own in tasks.values() for task in own)
    compared = [t for t in named if 2 * sum(t in own for own in tasks.values()) > len(tasks)]
    dense, found = tasks.get(DENSE, {}), []
    for method, all_rows in tasks.items():
        if not set(compared) <= set(all_rows):
            continue
        own = {task: all_rows[task] for task in compared}
        essays = rows.get(Key(method, ESSAYS, setting.context, VISIBLE))
        line = Line(
            method,
            statistics.fmean(row["share"] for row in own.values()),
            {task: Value(row["score"], row["stderr"]) for task, row in own.items()},
            {t: _change(own[t]["scores"], dense[t]["scores"]) for t in own if t in dense},
            Value(essays["score"], essays["stderr"]) if essays else None,
            min(row["samples"] for row in own.values()),
        )
        found.append(line)
    return sorted(found, key=lambda line: -line.share)


def not_compared(rows: Rows, setting: Setting, found: Sequence[Line]) -> dict[Key, Value]:
    """What has been measured besides."""
    shown = {(line.method, task) for line in found for task in line.scores}
    return {
        key: Value(row["score"], row["stderr"])
        for key, row in rows.items()
        if (key.context, key.question) == setting
        and key.task != ESSAYS
        and (key.method, key.task) not in shown
    }


def _by_method(rows: Rows, setting: Setting) -> dict[str, dict[str, dict[str, Any]]]:
    """The rows of a setting by method and task."""
    tasks: dict[str, dict[str, dict[str, Any]]] = {}
    for key, row in rows.items():
        if (key.context, key.question) == setting and key.task != ESSAYS:
            tasks.setdefault(key.method, {})[key.task] = row
    return tasks


def relative(found: Sequence[Line]) -> dict[str, tuple[float, float]]:
    """Of the paper's methods the average over SnapKV's: in the paper, and in ours."""
    averages = {line.method: line.average.mean for line in found}
    base = averages.get(SNAPKV_NAME)
    if not base:
        return {}
    return {
        method: (score / PAPER[SNAPKV_NAME], averages[method] / base)
        for method, score in PAPER.items()
        if method in averages
    }


def _change(scores: Sequence[float], dense: Sequence[float]) -> Value:
    """Of the samples that both have: they differ from each other more than methods do."""
    return Value(*mean_and_error([a - b for a, b in zip(scores, dense, strict=False)]))


def _average(values: Sequence[Value]) -> Value:
    errors = [value.error for value in values if value.error is not None]
    error = math.hypot(*errors) / len(values) if errors else None
    return Value(statistics.fmean(value.mean for value in values), error)
