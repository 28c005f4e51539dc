"""The plans that a sweep has made for a model: a row and a file of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import measure
from .quality_methods import PLAN, Ours, planned
from .quality_results import VERSIONS
from .quality_run import DTYPE
from .results import Metric, Result, differing
from .sweep_jobs import Text, Tuned

METRICS = {"share": Metric("exact"), "kl": Metric("ratio")}
CONTEXT, SCORED_TOKENS = 1024, 128
"""Tokens of the prompts that plans are made by, and of what follows each of them."""


def settings(model: str, windows: int) -> dict[str, Any]:
    """How a sweep makes the plans of a model.

    Args:
        windows: pieces of the text.
    """
    return {
        "model": model,
        "context": CONTEXT,
        "windows": windows,
        "scored": SCORED_TOKENS,
        "dtype": str(DTYPE).removeprefix("torch."),
    }


class Plans:
    """The result file of a model's plans, a row per budget, and the folder of the plans."""

    def __init__(self, model: str, windows: int, machine: dict[str, Any], folder: Path) -> None:
        self._model, self._folder = model, folder / "plans"
        self._result = Result(
            f"plans-{model}", ["budget"], METRICS, [], settings(model, windows), machine
        )
        self._path = folder / f"plans-{model}.jsonl"

    @property
    def settings(self) -> dict[str, Any]:
        return self._result.settings

    def go_on(self) -> str:
        """As ``quality_results.Results.go_on``."""
        if not self._path.exists():
            return ""
        earlier = Result.read(self._path)
        if changes := differing(earlier, self._result, VERSIONS):
            return f"{self._path} is replaced: {changes}"
        self._result.rows = earlier.rows
        return ""

    def path(self, budget: float) -> Path:
        """Where the plan for a budget is, if it is there."""
        return self._folder / f"{self._model}-{budget:g}.json"

    def name(self, budget: float) -> str:
        """Of the method that is measured."""
        return f"{PLAN}{self.path(budget).stem}"

    def method(self, budget: float, contexts: Sequence[int], windows: int) -> Ours | None:
        """What to measure of an earlier plan; None without one, or where it has seen the text."""
        for row in self._result.rows:
            text = Text(**row["text"])
            if row["budget"] == budget and text.is_apart(contexts, windows):
                return planned(self.path(budget)) if self.path(budget).exists() else None
        return None

    def add(self, tuned: Tuned) -> Ours:
        """Write a plan; the method to measure."""
        plan, path = tuned.plan, self.path(tuned.plan.budget)
        path.parent.mkdir(parents=True, exist_ok=True)
        plan.save(path)
        row = {
            "budget": plan.budget,
            "share": plan.share,
            "kl": plan.kl,
            "seconds": tuned.seconds,
            "commit": tuned.machine["commit"],
            "text": vars(tuned.text),
            "machine": measure.lasting(dict(tuned.machine)),
        }
        self._result.rows = [r for r in self._result.rows if r["budget"] != plan.budget] + [row]
        self._result.write(self._path)
        return planned(path)
