"""``make bench-quality``: what the ways to store a cache cost in quality, at equal bytes.

On real models and real text: KL divergence from the dense model's next-token distributions and the
change of perplexity, over the share of bytes. Formats of ours run compiled, on caches that are
really compressed; others are simulated (``quality_methods.py`` has the list, ``quality_run.py``
what is measured). Results are written after every window, and a later run goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from . import measure, pictures
from .quality_methods import Method, methods, planned
from .quality_models import MODELS, disjoint_windows, essays, load
from .quality_report import quality_table
from .quality_results import Results
from .quality_run import LAST_TOKENS, SCORED_TOKENS, Windows, run_method


def run_context(
    model: Any, texts: Sequence[Tensor], methods: Sequence[Method], results: Results,
    console: Console,
) -> None:  # fmt: skip
    """Measure the methods at one context, print the table and draw the picture."""
    present, left_out = installed(methods)
    windows, count = Windows(model, texts), len(texts)
    columns = (TextColumn("{task.description:48}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("", total=len(present) * count)

        def done() -> None:
            due = sum(len(results.due(method, count)) for method in present)
            progress.update(task, completed=len(present) * count - due)

        def note() -> None:
            results.save()
            done()

        done()
        for method in present:
            progress.update(task, description=f"{title(results)}: {method.name}")
            numbers, inner = results.due(method, count), results.settings["inner"]
            entry = results.entry(method)
            run_method(model, method, windows, numbers, entry, inner, results.machine, note)
    tell(results, left_out, console)


def installed(methods: Sequence[Method]) -> tuple[list[Method], list[str]]:
    """The methods whose packages are installed, and a sentence about each of the others."""
    left_out = [f"{m.name} left out: {m.missing()} not installed" for m in methods if m.missing()]
    return [method for method in methods if not method.missing()], left_out


def title(results: Results) -> str:
    """What a file is about."""
    name, tokens = results.settings["model"], results.settings["context"]
    return f"{MODELS[name].title}, prompt of {tokens} tokens"


def tell(results: Results, left_out: Sequence[str], console: Console) -> None:
    """Print the table of a file and draw its picture."""
    rows, about = results.rows(), title(results)
    console.print(quality_table(about, rows, results.errors(), left_out))
    if rows:
        picture = pictures.quality(rows, results.path.with_suffix(".png"), about)
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


def named(model: str) -> list[str]:
    """The models that an option names.

    Raises:
        BadParameter: one of them is unknown.
    """
    names = model.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        raise typer.BadParameter(f"--model is {unknown[0]!r}: allowed is {', '.join(MODELS)}")
    return names


def contexts_of(context: str) -> list[int]:
    """The contexts that an option names, in tokens.

    Raises:
        BadParameter: one of them is too short.
    """
    contexts = [int(tokens) for tokens in context.split(",")]
    if min(contexts) < 2 * LAST_TOKENS:
        raise typer.BadParameter(f"--context is {min(contexts)}: allowed is {2 * LAST_TOKENS} up")
    return contexts


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
    names, contexts, console = named(model), contexts_of(context), measure.wide_console()
    torch.set_num_threads(threads)
    failed = False
    for name in names:
        known = (*methods(MODELS[name].head_dim), *map(planned, plan))
        selected = chosen(only, known)
        loaded, tokenizer = load(name)
        for tokens in contexts:
            texts = disjoint_windows(tokenizer, essays(), tokens + SCORED_TOKENS + 1, windows)
            results = Results.of(name, tokens, inner, measure.machine_facts())
            if replaced := results.go_on(known):
                console.print(replaced, markup=False)
            results.forget(method.name for method in selected if fresh)
            run_context(loaded, texts, selected, results, console)
            failed |= bool(results.errors())
    if failed:
        raise typer.Exit(1)
