"""``python -m benchmarks compare OLD NEW``: what got better, worse or lost between two results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from .measure import wide_console
from .results import Metric, Result, Row

LIMITS: Mapping[str, float] = {"exact": 0.0, "counted": 0.02, "ratio": 0.25}
"""By how much a metric of a kind may differ, relative to the old value."""
Verdict = Literal["same", "better", "worse", "changed", "lost", "new"]
COLORS = {"better": "green", "new": "green", "worse": "red", "changed": "red", "lost": "red"}


@dataclass(frozen=True)
class Difference:
    """One metric of one row in two results; None where a result does not have it."""

    row: str
    metric: str
    old: Any
    new: Any
    verdict: Verdict
    kind: str

    @property
    def fails(self) -> bool:
        """Whether the comparison is red: also a count that fell, so that the file is updated."""
        return self.verdict in ("worse", "changed", "lost") or (
            self.verdict == "better" and self.kind == "counted"
        )


def obstacles(old: Result, new: Result) -> list[str]:
    """Why two results cannot be compared, in sentences; none if they can."""
    if (old.name, old.keys) != (new.name, new.keys):
        return [f"{old.name} by {old.keys} against {new.name} by {new.keys}"]
    return [
        f"{fact} was {old.machine.get(fact)!r}, is {new.machine.get(fact)!r}"
        for fact in old.comparable
        if old.machine.get(fact) != new.machine.get(fact)
    ]


def differences(old: Result, new: Result, limits: Mapping[str, float] = LIMITS) -> list[Difference]:
    """Every metric of every row.

    Args:
        limits: relative limits by the name of a metric, or by its kind.
    """
    before, after, found = old.by_key(), new.by_key(), []
    for key in {**before, **after}:
        for name, metric in {**new.metrics, **old.metrics}.items():
            a, b = before.get(key, {}).get(name), after.get(key, {}).get(name)
            if a is None and b is None:
                continue
            limit = limits.get(name, limits.get(metric.kind, LIMITS[metric.kind]))
            verdict = _verdict(metric, a, b, after.get(key, {}), name, limit)
            found.append(Difference(key, name, a, b, verdict, metric.kind))
    return found


def _verdict(metric: Metric, old: Any, new: Any, row: Row, name: str, limit: float) -> Verdict:
    if old is None or new is None:
        return "new" if old is None else "lost"
    if metric.kind == "exact":
        return "same" if old == new else "changed"
    low, high = row.get(f"{name}_interval", (new, new))
    if low <= old * (1 + limit) and high >= old * (1 - limit):
        return "same"
    return "better" if (new < old) == (metric.better == "less") else "worse"


def table_of(found: Iterable[Difference], title: str) -> Table:
    """A table of the differences."""
    table = Table(title=title, title_justify="left")
    for name in ("row", "metric", "old", "new", "", ""):
        table.add_column(name, overflow="fold")
    for d in found:
        color = COLORS.get(d.verdict, "")
        change = f"{d.new / d.old - 1:+.1%}" if _are_numbers(d.old, d.new) and d.old else ""
        verdict = f"[{color}]{d.verdict}[/]" if color else d.verdict
        table.add_row(d.row, d.metric, _text(d.old), _text(d.new), change, verdict)
    return table


def markdown(title: str, found: list[Difference]) -> str:
    """The same for a comment on a change."""
    bad = [d for d in found if d.fails]
    lines = [f"### {title}: {'red' if bad else 'green'}, {len(found)} compared", ""]
    told = [d for d in found if d.verdict != "same"]
    if told:
        lines += ["| row | metric | old | new | |", "|---|---|---|---|---|"]
        lines += [
            f"| {d.row} | {d.metric} | {_text(d.old)} | {_text(d.new)} | {d.verdict} |"
            for d in told
        ]
    return "\n".join(lines) + "\n"


def show(found: list[Difference], title: str, console: Console) -> bool:
    """Print what differs; whether nothing fails."""
    told = [d for d in found if d.verdict != "same"]
    if told:
        console.print(table_of(told, title))
    bad = sum(d.fails for d in found)
    console.print(f"{title}: {len(found)} compared, {len(told)} differ, {bad} fail", markup=False)
    return not bad


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _limits(texts: Iterable[str]) -> dict[str, float]:
    """``speedup=10%`` and the like."""
    limits = dict(LIMITS)
    for text in texts:
        name, _, share = text.partition("=")
        try:
            limits[name] = float(share.removesuffix("%")) / 100
        except ValueError:
            wanted = "a metric or kind, =, and percent, such as speedup=10%"
            raise typer.BadParameter(f"--limit is {text!r}: allowed is {wanted}") from None
    return limits


def main(
    old: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    new: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    limit: Annotated[list[str], typer.Option(help="metric or kind=percent")] = [],  # noqa: B006
    anyway: Annotated[bool, typer.Option(help="also if machines or versions differ")] = False,
) -> None:
    """Compare two results of one benchmark; exit code 1: something failed, 2: not comparable."""
    console = wide_console()
    try:
        before, after = Result.read(old), Result.read(new)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    reasons = obstacles(before, after)
    if reasons and (not anyway or before.keys != after.keys):
        console.print("not comparable: " + "; ".join(reasons), markup=False)
        raise typer.Exit(2)
    found = differences(before, after, _limits(limit))
    if not show(found, f"{before.name}: {old} to {new}", console):
        raise typer.Exit(1)
