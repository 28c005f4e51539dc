"""``make bench-quality``: what the ways to store a cache cost in quality, at equal bytes.

On real models and real text: KL divergence from the dense model's next-token distributions and the
change of perplexity, over the share of bytes. Formats of ours run compiled, on caches that are
really compressed; others are simulated (``quality_methods.py`` has the list, ``quality_run.py``
what is measured). Results are written after every window, and a later run goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from . import measure, pictures
from .quality_methods import Method, Ours, methods, planned
from .quality_models import MODELS, disjoint_windows, essays, load
from .quality_report import quality_table, summary, with_front
from .quality_run import LAST_TOKENS, SCORED_TOKENS, Window, prepared, read_window
from .quality_run import measure as measure_window
from .results import Metric, Result, ratios

STATE = ("family", "what", "compile_s", "error")
"""What is kept of a method besides its windows."""
METRICS = {"packed_share": Metric("exact"), "whole_share": Metric("exact")} | ratios(
    "less", ["kl", "perplexity"]
)


@dataclass
class Results:
    """One result file: a model and a context. A row has its windows under "measured"."""

    name: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name; "windows" are rows by number."""

    @property
    def path(self) -> Path:
        return measure.RESULTS / f"{self.name}.jsonl"

    def go_on(self, known: Iterable[Method]) -> None:
        """Take over what an earlier run with equal settings has measured of methods still known."""
        if not self.path.exists():
            return
        earlier = Result.read(self.path)
        versions = all(earlier.machine[n] == self.machine[n] for n in ("torch", "transformers"))
        if earlier.settings != self.settings or not versions:
            return
        whats = {method.name: method.what for method in known}
        for row in earlier.rows:
            if row["what"] == whats.get(row["method"]):
                entry = {name: row[name] for name in STATE if name in row}
                self.methods[row["method"]] = {**entry, "windows": row["measured"]}

    def entry(self, method: Method) -> dict[str, Any]:
        """The entry of a method, made if needed."""
        empty = {"family": method.family, "what": method.what, "windows": {}}
        return self.methods.setdefault(method.name, empty)

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
        summaries = [{"method": name} for name in failed] + self.rows()
        rows = [_with_state(row, self.methods[row["method"]]) for row in summaries]
        Result(self.name, ["method"], METRICS, rows, self.settings, self.machine).write(self.path)


def _with_state(row: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """A row and what going on needs of a method."""
    state = {part: entry[part] for part in STATE if part in entry}
    return {**row, **state, "measured": entry["windows"]}


class Windows:
    """Windows of a text and what the dense model says to them, read when first asked for."""

    def __init__(self, model: Any, texts: Sequence[Tensor]) -> None:
        self._model, self._texts = model, texts
        self._read: dict[int, Window] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, number: int) -> Window:
        if number not in self._read:
            self._read[number] = read_window(self._model, self._texts[number])
        return self._read[number]


def run_method(
    model: Any, method: Method, windows: Windows, results: Results, note: Callable[[], object]
) -> None:
    """Measure a method on the windows that its entry does not have; an error becomes part of it.

    Args:
        note: called after each window.
    """
    entry = results.entry(method)
    entry.pop("error", None)
    todo = [number for number in range(len(windows)) if str(number) not in entry["windows"]]
    if not todo:
        return
    try:
        reader = prepared(model, method, results.settings["inner"])
        if isinstance(method, Ours):  # compiles
            entry["compile_s"] = measure_window(reader, method, windows[todo[0]])["seconds"]
        for number in todo:
            row = measure_window(reader, method, windows[number])
            entry["windows"][str(number)] = {**row, "commit": results.machine["commit"]}
            results.save()
            note()
    except Exception as error:
        entry["error"] = f"{type(error).__name__}: {error}"
        results.save()


def run_context(
    model_name: str, model: Any, texts: Sequence[Tensor], methods: Sequence[Method],
    results: Results, console: Console,
) -> None:  # fmt: skip
    """Measure the methods at one context, print the table and draw the picture."""
    left_out = [f"{m.name} left out: {m.missing()} not installed" for m in methods if m.missing()]
    methods = [method for method in methods if not method.missing()]
    windows = Windows(model, texts)
    title = f"{MODELS[model_name].title}, prompt of {results.settings['context']} tokens"
    columns = (TextColumn("{task.description:48}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        done = sum(
            str(number) in results.entry(method)["windows"]
            for method in methods
            for number in range(len(windows))
        )
        task = progress.add_task("", total=len(methods) * len(windows), completed=done)
        for method in methods:
            progress.update(task, description=f"{title}: {method.name}")
            run_method(model, method, windows, results, lambda: progress.advance(task))
    rows = results.rows()
    console.print(quality_table(title, rows, results.errors(), left_out))
    if rows:
        picture = pictures.quality(rows, results.path.with_suffix(".png"), title)
        console.print(f"{results.path}\n{picture}", markup=False)


def chosen(only: str, known: Sequence[Method]) -> list[Method]:
    """The known methods whose names one of the patterns, separated by commas, matches.

    Raises:
        BadParameter: there are none.
    """
    patterns = only.split(",")
    found = [m for m in known if any(fnmatchcase(m.name, pattern) for pattern in patterns)]
    if not found:
        names = ", ".join(method.name for method in known)
        raise typer.BadParameter(f"--only is {only!r}: allowed are patterns of {names}")
    return found


def main(
    model: Annotated[str, typer.Option(help="names, separated by commas")] = ",".join(MODELS),
    context: Annotated[str, typer.Option(help="tokens of the prompts")] = "1024,4096",
    windows: Annotated[int, typer.Option(help="disjoint stretches of text")] = 8,
    only: Annotated[str, typer.Option(help="patterns of methods, separated by commas")] = "*",
    fresh: Annotated[bool, typer.Option(help="measure again what has been measured")] = False,
    inner: Annotated[str, typer.Option(help="compiler of our graphs")] = "eager",
    threads: Annotated[int, typer.Option(help="of torch")] = 2,
    plan: Annotated[list[Path], typer.Option(help="a plan to measure too")] = [],  # noqa: B006
) -> None:
    """Compare the quality of ways to store a cache on real models."""
    names, console = model.split(","), measure.wide_console()
    if unknown := [name for name in names if name not in MODELS]:
        raise typer.BadParameter(f"--model is {unknown[0]!r}: allowed is {', '.join(MODELS)}")
    contexts = [int(tokens) for tokens in context.split(",")]
    if min(contexts) < 2 * LAST_TOKENS:
        raise typer.BadParameter(f"--context is {min(contexts)}: allowed is {2 * LAST_TOKENS} up")
    torch.set_num_threads(threads)
    failed = False
    for name in names:
        known = (*methods(MODELS[name].head_dim), *map(planned, plan))
        selected = chosen(only, known)
        loaded, tokenizer = load(name)
        for tokens in contexts:
            texts = disjoint_windows(tokenizer, essays(), tokens + SCORED_TOKENS + 1, windows)
            results = Results(
                f"quality-{name}-{tokens}",
                {"model": name, "context": tokens, "scored": SCORED_TOKENS, "inner": inner},
                measure.machine_facts(),
            )
            results.go_on(known)
            for method in selected if fresh else ():
                results.methods.pop(method.name, None)
            run_context(name, loaded, texts, selected, results, console)
            failed |= bool(results.errors())
    if failed:
        raise typer.Exit(1)
