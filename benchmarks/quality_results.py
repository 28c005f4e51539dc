"""The quality benchmark's result file for a model and a context, and how it is gone on with.

A method has its windows in it, and each window the commit that measured it. A window that was
measured on another machine than the file's has that machine's description, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import measure
from .quality_methods import PLAN, Method
from .quality_report import summary, with_front
from .quality_run import SCORED_TOKENS
from .results import Metric, Result, differing, ratios

VERSIONS = ("torch", "transformers")
"""Packages: what was measured with others of them is not gone on with."""
METRICS = {"packed_share": Metric("exact"), "whole_share": Metric("exact")} | ratios(
    "less", ["kl", "perplexity"]
)
STATE = ("family", "what", "compile_s", "error")
"""What is kept of a method besides its windows."""


@dataclass
class Results:
    """One result file: a model and a context. A row has its windows under "measured"."""

    name: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name; "windows" are rows by number, each with its "machine"."""
    folder: Path = field(default_factory=lambda: measure.RESULTS)

    @classmethod
    def of(
        cls, model: str, context: int, inner: str, machine: dict[str, Any],
        folder: Path | None = None,
    ) -> Results:  # fmt: skip
        """The file of a model and a context, with nothing in it yet.

        Args:
            inner: the compiler of our graphs.
            machine: the one that writes the file.
            folder: of the file; None: that of all results.
        """
        settings = {"model": model, "context": context, "scored": SCORED_TOKENS, "inner": inner}
        return cls(
            f"quality-{model}-{context}", settings, machine, folder=folder or measure.RESULTS
        )

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.jsonl"

    def go_on(self, known: Iterable[Method]) -> str:
        """Take over what an earlier run with equal settings has measured of methods still known.

        Plans are taken over without being known: theirs are files that may be anywhere.

        Returns:
            Why nothing is taken over of a file that is there and will be replaced, or nothing.
        """
        if not self.path.exists():
            return ""
        earlier = Result.read(self.path)
        if changes := differing(earlier, self._result([]), VERSIONS):
            return f"{self.path} is replaced: {changes}"
        whats = {method.name: method.what for method in known}
        place = measure.lasting(earlier.machine)
        for row in earlier.rows:
            kept = row["what"] if row["method"].startswith(PLAN) else None
            if row["what"] == whats.get(row["method"], kept):
                entry = {name: row[name] for name in STATE if name in row}
                windows = {n: {"machine": place, **w} for n, w in row["measured"].items()}
                self.methods[row["method"]] = {**entry, "windows": windows}
        return ""

    def entry(self, method: Method) -> dict[str, Any]:
        """The entry of a method, an empty one if there is none or it is of another definition."""
        found = self.methods.get(method.name)
        if found is None or found["what"] != method.what:
            found = {"family": method.family, "what": method.what, "windows": {}}
            self.methods[method.name] = found
        return found

    def due(self, method: Method, windows: int) -> tuple[int, ...]:
        """The numbers of the first ``windows`` windows that a method has not been measured on."""
        found = self.methods.get(method.name)
        measured = found["windows"] if found and found["what"] == method.what else {}
        return tuple(number for number in range(windows) if str(number) not in measured)

    def add(self, method: Method, found: Mapping[str, Any]) -> None:
        """Write what an entry that was filled elsewhere has, beside what there is.

        Args:
            found: has "windows" and, where there is one, "compile_s" and "error".
        """
        entry = self.entry(method)
        entry.pop("error", None)
        entry["windows"] |= found["windows"]
        entry |= {name: found[name] for name in ("compile_s", "error") if name in found}
        self.save()

    def forget(self, names: Iterable[str]) -> None:
        """Drop what there is of methods of some names, which are then measured again."""
        for name in names:
            self.methods.pop(name, None)

    def rows(self) -> list[dict[str, Any]]:
        """A summary of each method that has been measured."""
        done = {name: entry for name, entry in self.methods.items() if entry["windows"]}
        return with_front([summary(name, entry) for name, entry in done.items()])

    def errors(self) -> dict[str, str]:
        """What methods failed with in their latest run."""
        return {n: entry["error"] for n, entry in self.methods.items() if "error" in entry}

    def save(self) -> None:
        """Write all of it."""
        failed = [name for name, entry in self.methods.items() if not entry["windows"]]
        rows = [{"method": name} for name in failed] + self.rows()
        self._result([self._with_state(row) for row in rows]).write(self.path)

    def _result(self, rows: Sequence[dict[str, Any]]) -> Result:
        return Result(self.name, ["method"], METRICS, [*rows], self.settings, self.machine)

    def _with_state(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row and what going on needs of its method."""
        entry, own = self.methods[row["method"]], measure.lasting(self.machine)
        state = {part: entry[part] for part in STATE if part in entry}
        measured = {
            number: {n: v for n, v in window.items() if n != "machine" or v != own}
            for number, window in entry["windows"].items()
        }
        return {**row, **state, "measured": measured}
