"""What the commands of exported graphs share: how they tell what they do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..report import SparkWarning

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="What `export` has written.")]


def as_size(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / 1e6:,.1f} MB"


@contextmanager
def shown_progress(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A line that says what is being done, and for how long."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        task = None

        def told(step: str) -> None:
            nonlocal task
            if task is not None:
                progress.update(task, completed=1)
            task = progress.add_task(step, total=1)

        yield told
        if task is not None:
            progress.update(task, completed=1)


@contextmanager
def shown_warnings(quiet: bool) -> Iterator[None]:
    """Print our warnings as lines, at once."""
    show = warnings.showwarning

    def line(message: Any, category: type[Warning], *rest: Any, **keywords: Any) -> None:
        if issubclass(category, SparkWarning):
            typer.echo(f"warning: {message}", err=True)
        else:
            show(message, category, *rest, **keywords)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore" if quiet else "always", category=SparkWarning)
        warnings.showwarning = line
        yield
