"""``make coverage``: every architecture of transformers that writes text, tiny, under the backend.

Each generates eagerly and under spark at key ratio 0 (which must equal eager) and at a real one
(which must equal ``simulated.Simulated``); where that fails, under plain ``torch.compile`` too.
Sites are counted in the eager model's cache, whatever the passes find. ``results/coverage.json`` is
written after every architecture, a later run goes on from there; at the end comes
``docs/coverage.md``.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .coverage_case import Settings
from .coverage_models import architectures
from .coverage_process import run_all
from .coverage_report import markdown, summary_table
from .measure import RESULTS, wide_console

DOCS = Path(__file__).parents[1] / "docs"


def load(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    """The rows of an earlier run with the same header."""
    if not path.exists():
        return {}
    data = json.loads(path.read_text())
    same = all(data.get(name) == value for name, value in header.items())
    return dict(data["architectures"]) if same else {}


def save(path: Path, header: dict[str, Any], rows: dict[str, Any]) -> None:
    """Write all rows, by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {**header, "architectures": dict(sorted(rows.items()))}
    path.write_text(json.dumps(data, indent=1) + "\n")


def main(
    only: Annotated[str, typer.Option(help="names, separated by commas; empty: all")] = "",
    jobs: Annotated[int, typer.Option(help="processes at the same time")] = 1,
    inner: Annotated[str, typer.Option(help="compiler of the graphs")] = "eager",
    limit_s: Annotated[float, typer.Option(help="time limit of an architecture")] = 300,
    fresh: Annotated[bool, typer.Option(help="run again what has been run")] = False,
    results: Annotated[Path, typer.Option(help="folder of coverage.json")] = RESULTS,
    docs: Annotated[Path, typer.Option(help="folder of coverage.md")] = DOCS,
) -> None:
    """Count what is rewritten, and check that nothing is wrong."""
    console, settings, path = wide_console(), Settings(inner=inner), results / "coverage.json"
    header: dict[str, Any] = {
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),  # as the file is read
    }
    wanted = only.split(",") if only else architectures()
    if unknown := sorted(set(wanted) - set(architectures())):
        raise typer.BadParameter(f"no such architecture: {', '.join(unknown)}")
    rows = load(path, header)
    todo = [name for name in wanted if fresh or name not in rows]
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("", total=len(todo))
        for name, row in run_all(todo, settings, limit_s, jobs):
            rows[name] = row
            save(path, header, rows)
            progress.update(task, advance=1, description=name)
    console.print(summary_table(rows))
    if not only:
        docs.mkdir(parents=True, exist_ok=True)
        (docs / "coverage.md").write_text(markdown(header, rows))
        console.print(f"{path}\n{docs / 'coverage.md'}", markup=False)
