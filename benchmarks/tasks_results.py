"""Results of tasks: a row per measurement."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from . import measure
from .quality_methods import Ours
from .quality_report import mean_and_error
from .results import Metric, Result, differing

ESSAYS = "essays"
"""The task whose score is a perplexity: lower is better, and it is part of no average."""
VISIBLE, HIDDEN = "visible", "hidden"
METRICS = {"score": Metric("ratio", "more"), "share": Metric("ratio")}
_VERSIONS = ("torch", "transformers", "lm_eval")


class ResultsError(ValueError):
    """Results that do not belong together."""


class Key(NamedTuple):
    """What a row is of."""

    method: str
    task: str
    context: int
    """Tokens of the prompt."""
    question: str
    """Visible to the observation window, or hidden from it."""


class Results:
    """One result file."""

    def __init__(
        self, model: str, settings: dict[str, Any], machine: dict[str, Any], fresh: bool = False
    ) -> None:
        """Go on with the file of an earlier run, or begin one.

        Args:
            fresh: begin in any case.

        Raises:
            ResultsError: there is a file of other settings or versions.
        """
        self.path = measure.RESULTS / f"tasks-{model}.jsonl"
        self.settings, self.commit = settings, machine["commit"]
        self.rows: dict[Key, dict[str, Any]] = {}
        self._result = Result(
            f"tasks-{model}", [*Key._fields], METRICS, [], settings, machine, [*_VERSIONS]
        )
        if not fresh and self.path.exists():
            earlier = Result.read(self.path)
            if changes := differing(earlier, self._result, _VERSIONS):
                raise ResultsError(f"{self.path} is of other settings: {changes}")
            self._result, self.rows = earlier, by_key(earlier)

    def missing(self, key: Key, what: str, samples: int) -> range:
        """Numbers of the samples that have not been measured."""
        row = self.rows.get(key)
        return range(len(row["scores"]) if row and row["what"] == what else 0, samples)

    def add(
        self, key: Key, method: Ours, scores: Sequence[float], shares: Sequence[float],
        seconds: float,
    ) -> dict[str, Any]:  # fmt: skip
        """Add samples to those of a key, and write the row.

        Args:
            scores: of a sample each, between 0 and 1; of essays negative log-likelihoods per token.
            shares: stored bytes over dense bytes after a prompt each.
        """
        row = self.rows.get(key)
        if row and row["what"] == method.what:
            scores, seconds = [*row["scores"], *scores], row["seconds"] + seconds
            shares = [*[row["share"]] * row["samples"], *shares]
        score, error = summary(key.task, scores)
        self.rows[key] = {
            **key._asdict(), "what": method.what, "score": score, "stderr": error,
            "samples": len(scores), "share": round(statistics.fmean(shares), 5),
            "seconds": round(seconds, 1), "commit": self.commit,
            "scores": [round(score, 5) for score in scores],
        }  # fmt: skip
        self._result.rows = [*self.rows.values()]
        self._result.write(self.path)
        return self.rows[key]


def summary(task: str, scores: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error of scores; of essays the perplexity with its own."""
    mean, error = mean_and_error(scores)
    if task != ESSAYS:
        return mean, error
    return math.exp(mean), None if error is None else math.exp(mean) * error


def by_key(result: Result) -> dict[Key, dict[str, Any]]:
    """The rows of a file by what they are of."""
    return {Key(*(row[name] for name in Key._fields)): row for row in result.rows}
