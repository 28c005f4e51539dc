"""Results of tasks as lines of JSON: what was run first, then a row per measurement."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import measure
from .quality_methods import Ours
from .quality_report import mean_and_error

ESSAYS = "essays"
"""The task whose score is a perplexity: lower is better, and it is part of no average."""
VISIBLE, HIDDEN = "visible", "hidden"
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
    """One result file. Later rows of a key replace earlier ones."""

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
        self.header: dict[str, Any] = {"machine": machine, "settings": settings}
        self.rows: dict[Key, dict[str, Any]] = {}
        header, rows = ({}, {}) if fresh else read(self.path)
        if header:
            if differing := _differing(header, self.header):
                raise ResultsError(f"{self.path} is of other settings: {differing}")
            self.header, self.rows = header, rows
        self.commit = machine["commit"]
        measure.RESULTS.mkdir(exist_ok=True)
        # Written anew: a run that was killed may have left half a line.
        lines = [self.header, *self.rows.values()]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines))

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
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[key]) + "\n")
        return self.rows[key]


def summary(task: str, scores: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error of scores; of essays the perplexity with its own."""
    mean, error = mean_and_error(scores)
    if task != ESSAYS:
        return mean, error
    return math.exp(mean), None if error is None else math.exp(mean) * error


def read(path: Path) -> tuple[dict[str, Any], dict[Key, dict[str, Any]]]:
    """The first line and the rows of a file; both are empty if it is not there."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # of a run that was killed
            continue
    if not found:
        return {}, {}
    return found[0], {Key(*(row[name] for name in Key._fields)): row for row in found[1:]}


def _differing(one: dict[str, Any], other: dict[str, Any]) -> str:
    """What two first lines differ in, and both say of it."""
    pairs = [(n, one["machine"].get(n), other["machine"].get(n)) for n in _VERSIONS]
    pairs += [(n, one["settings"].get(n), value) for n, value in other["settings"].items()]
    return ", ".join(f"{name} {a}, now {b}" for name, a, b in pairs if a != b)
