"""``python -m benchmarks history``: counts over commits, as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from . import pictures
from .measure import RESULTS, wide_console
from .regressions import HISTORY


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a history, oldest first."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def relative(runs: list[dict[str, Any]], kind: str) -> dict[str, list[float | None]]:
    """Each metric of a kind over its first value, None where a run does not have it."""
    names = {name: None for run in runs for name in run["values"] if name.startswith(f"{kind}: ")}
    found: dict[str, list[float | None]] = {}
    for name in names:
        values = [run["values"].get(name) for run in runs]
        first = next(value for value in values if value is not None)
        if isinstance(first, (int, float)) and first:
            found[name] = [None if value is None else value / first for value in values]
    return found


def main(
    kind: Annotated[str, typer.Option(help="exact, counted or timed")] = "counted",
    path: Annotated[Path, typer.Option(exists=True, dir_okay=False)] = HISTORY,
    out: Annotated[Path | None, typer.Option(help="the picture")] = None,
) -> None:
    """Draw what has changed over the recorded runs."""
    runs = read(path)
    commits = [run["machine"]["commit"][:10] for run in runs]
    picture = pictures.history(
        relative(runs, kind), commits, out or RESULTS / f"history-{kind}.png", kind
    )
    wide_console().print(picture, markup=False)
