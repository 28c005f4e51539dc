"""``python -m benchmarks check``: exact, counted and timed metrics against ``benchmarks/expected``.

python -m benchmarks check                  what CI runs: exact and counted
python -m benchmarks check --kinds timed    against times of the same machine, by --update
python -m benchmarks check --update         write what was measured as what is expected
python -m benchmarks check --record         and as a line of benchmarks/history.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import compare, counted, exact, timed
from .measure import wide_console
from .results import Result

EXPECTED = Path(__file__).parent / "expected"
HISTORY = Path(__file__).parent / "history.jsonl"
KINDS: dict[str, Callable[[int], Result]] = {
    "exact": lambda jobs: exact.result(list(exact.run(jobs))),
    "counted": lambda jobs: counted.result(counted.run(jobs=jobs)),
    "timed": lambda jobs: timed.result(timed.run()),
}
"""What measures each kind, given the number of processes."""


def against_expected(result: Result, console: Console) -> tuple[bool, str]:
    """Compare a result with the expected one; whether it is green, and a summary in Markdown.

    Other rows than the expected ones are red as well: the file says all that is guarded.
    """
    path = EXPECTED / f"{result.name}.jsonl"
    if not path.exists():
        return False, f"### {result.name}: red, there is no {path.name}: run with --update\n"
    expected = Result.read(path)
    if reasons := compare.obstacles(expected, result):
        why = f"{result.name}: not comparable: {'; '.join(reasons)}"
        console.print(why, markup=False)
        return True, f"### {why}\n"
    found = compare.differences(expected, result)
    green = compare.show(found, result.name, console)
    unknown = any(d.verdict == "new" for d in found)
    if unknown or any(d.fails and d.verdict != "worse" for d in found):
        console.print("if this is meant: python -m benchmarks check --update", markup=False)
    return green and not unknown, compare.markdown(result.name, found)


def history_line(results: list[Result]) -> str:
    """One line of the history: machine, commit, and every metric by its name."""
    values = {
        f"{result.name}: {key}: {name}": row[name]
        for result in results
        for key, row in result.by_key().items()
        for name in result.metrics
        if name in row
    }
    return json.dumps({"machine": results[0].machine, "values": values})


def measured(kinds: list[str], jobs: int, console: Console) -> Iterator[Result]:
    """Results of the kinds, each as soon as it is there."""
    for kind in kinds:
        with console.status(f"measuring: {kind}"):
            try:
                result = KINDS[kind](jobs)
            except counted.Missing as error:
                console.print(f"{error}; --kinds without counted goes without", markup=False)
                raise typer.Exit(2) from error
        yield result


def main(
    kinds: Annotated[str, typer.Option(help=", ".join(KINDS))] = "exact,counted",
    update: Annotated[bool, typer.Option(help="expect what is measured from now on")] = False,
    record: Annotated[bool, typer.Option(help="add it to the history")] = False,
    jobs: Annotated[int, typer.Option(help="processes at the same time")] = 2,
    out: Annotated[Path | None, typer.Option(help="folder for what is measured")] = None,
    summary: Annotated[Path | None, typer.Option(help="Markdown file to append to")] = None,
) -> None:
    """Measure, and compare with what is expected; exit code 1: red."""
    wanted, console = kinds.split(","), wide_console()
    if unknown := [kind for kind in wanted if kind not in KINDS]:
        raise typer.BadParameter(f"--kinds is {unknown[0]!r}: allowed is {', '.join(KINDS)}")
    results, green, texts = [], True, []
    for result in measured(wanted, jobs, console):
        results.append(result)
        if out:
            result.write(out / f"{result.name}.jsonl")
        if update:
            console.print(result.write(EXPECTED / f"{result.name}.jsonl"), markup=False)
            continue
        fine, text = against_expected(result, console)
        green, texts = green and fine, [*texts, text]
    if record:
        with HISTORY.open("a") as file:
            file.write(history_line(results) + "\n")
    if summary:
        with summary.open("a") as file:
            file.write("\n".join(texts))
    if not green:
        raise typer.Exit(1)
