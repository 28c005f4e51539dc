"""What a compile did: every attention site, rewritten or refused, as data and as a table.

Also the package's warnings: each is given once in a process.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from rich.markup import escape
from rich.table import Table

from .torch_private import ShortenTraceback


class SparkWarning(UserWarning):
    """Something was left as it was, or is slower than it could be."""


class SparkError(ShortenTraceback):
    """Raised under ``strict=True`` where a SparkWarning would have been given; a RuntimeError.

    Dynamo wraps what a backend raises in ``BackendCompilerFailed``, except for this base class.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)
        self.message = message

    def __str__(self) -> str:
        return self.message  # without the advice for people who debug Dynamo that it adds to args


class OptionError(SparkError, ValueError):
    """An option is unknown, of a wrong type or out of range."""


def wrong_option(name: str, value: object, allowed: str) -> OptionError:
    """What to raise where an option has a value that it must not have."""
    return OptionError(f"option {name!r} is {value!r}: allowed is {allowed}")


_given: set[str] = set()
_given_lock = threading.Lock()


def warn_once(message: str, category: type[Warning] = SparkWarning, *, stacklevel: int = 1) -> None:
    """Give a warning, unless one with this message has been given in this process.

    Args:
        stacklevel: as that of ``warnings.warn``, 1 being the caller of this function.
    """
    with _given_lock:
        if message in _given:
            return
        _given.add(message)
    warnings.warn(message, category, stacklevel=stacklevel + 1)


def forget_warnings() -> None:
    """Let every warning be given again; for tests."""
    with _given_lock:
        _given.clear()


@dataclass(frozen=True)
class Refusal:
    """Why a site was left as it was, and the graph node that shows it."""

    reason: str
    node: str

    def __str__(self) -> str:
        return f"{self.reason} (node {self.node})"


@dataclass(frozen=True)
class Site:
    """One attention with the appends that feed its key and value."""

    layer: str
    """Module path of the attention, or the graph node's name where there is none."""
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dense_token_bytes: int
    """Key and value bytes per token of one batch entry in the dense cache."""
    stored_token_bytes: int
    """The same in a page: what the formats of keys and values store of a token."""
    refusal: Refusal | None = None
    formats: tuple[str, str] = ("", "")
    """Texts of the formats of keys and values."""
    evict: str = ""
    """Text of the scorer by which tokens of a prompt are evicted, empty where all stay."""


@dataclass(frozen=True)
class GraphReport:
    """What the passes did to one graph."""

    phase: str
    """"prefill", "decode" (it takes a past, dense ones too), "no attention" or "left alone"."""
    sites: tuple[Site, ...] = ()
    left_alone: str | None = None
    """Why the whole graph was handed on unchanged, if it was."""
    matches: dict[str, int] = field(default_factory=dict)
    """Number of rewrites of each pass."""
    lower_ms: float = 0.0
    """Time to lower Dynamo's graph to ATen."""
    passes_ms: float = 0.0
    """Time of the passes on the lowered graph."""
    compile_ms: float | None = None
    """Time of the inner compiler on the rewritten graph; None if nothing was compiled."""
    graph_break: str | None = None
    """Why and where Dynamo ended the graph in the middle of the model's code, if it did: an
    attention that goes on in the next graph is in neither of them."""
    suspicious: bool = False
    """Whether there may be an attention, or a part of one, that was not found: there is a softmax,
    or an operator with one in it, or a compressed state."""

    @property
    def rewritten(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.refusal is None)

    def refusals(self) -> str:
        """The reasons with the first node of each, most frequent first, in one line."""
        refusals = [site.refusal for site in self.sites if site.refusal is not None]
        first = {refusal.reason: refusal for refusal in reversed(refusals)}
        counts = Counter(refusal.reason for refusal in refusals).most_common()
        told = [f"{count} x {first[reason]}" for reason, count in counts[:3]]
        if len(counts) > 3:
            told.append(f"{sum(count for _, count in counts[3:])} x other reasons")
        return "; ".join(told)


@dataclass
class Report:
    """The graphs of one or more compiles, in order."""

    graphs: list[GraphReport] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        return {
            "summary": self.summary(),
            "graphs": [
                {**dataclasses.asdict(graph), "rewritten": len(graph.rewritten)}
                for graph in self.graphs
            ],
        }

    def summary(self) -> str:
        """One line per graph: how many sites were rewritten, or why none."""
        return "\n".join(_summary(graph) for graph in self.graphs) or "no graph was compiled"

    def table(self) -> Table:
        """A rich table with one row per site."""
        table = Table(title="Attention sites")
        for column in ("phase", "layer", "heads", "Dk/Dv", "bytes/token", "spark", "result"):
            right = column in ("bytes/token", "spark")
            table.add_column(column, justify="right" if right else "left", overflow="fold")
        for graph in self.graphs:
            for site in graph.sites:
                done = site.refusal is None
                reason = f"[red]refused:[/] {escape(str(site.refusal))}"
                how = f"[green]rewritten[/]{site.evict and f', evicts: {site.evict}'}"
                table.add_row(
                    graph.phase,
                    escape(site.layer),
                    f"{site.query_heads}/{site.kv_heads}",
                    f"{site.key_dim}/{site.value_dim}",
                    str(site.dense_token_bytes),
                    str(site.stored_token_bytes) if done else "-",
                    how if done else reason,
                )
            if graph.left_alone is not None:
                reason = f"[red]left alone:[/] {escape(graph.left_alone)}"
                table.add_row(graph.phase, *[""] * 5, reason)
            table.add_section()
        return table


def _summary(graph: GraphReport) -> str:
    if graph.left_alone is not None:
        return f"{graph.phase}: left alone: {graph.left_alone}"
    text = f"{graph.phase}: {len(graph.rewritten)} of {len(graph.sites)} sites rewritten"
    if graph.rewritten:
        before = sum(site.dense_token_bytes for site in graph.rewritten)
        after = sum(site.stored_token_bytes for site in graph.rewritten)
        text += f", {before} bytes per token become {after} ({after / before:.0%})"
        scorers = dict.fromkeys(site.evict for site in graph.rewritten if site.evict)
        text += f"; prompts are evicted by {', '.join(scorers)}" if scorers else ""
    text += f"; refused: {graph.refusals()}" if graph.refusals() else ""
    if graph.graph_break and not graph.sites:
        text += f"; the graph ends at a graph break: {graph.graph_break}"
    if graph.passes_ms:
        text += f"; passes {graph.passes_ms:,.0f} ms after {graph.lower_ms:,.0f} ms of tracing"
    if graph.compile_ms:
        share = graph.passes_ms / graph.compile_ms
        text += f", {share:.1%} of the inner compiler's {graph.compile_ms:,.0f} ms"
    return text


_collecting: ContextVar[Report | None] = ContextVar("spark_report", default=None)


@contextmanager
def collect_report() -> Iterator[Report]:
    """Collect what every compile inside the ``with`` block did."""
    report = Report()
    token = _collecting.set(report)
    try:
        yield report
    finally:
        _collecting.reset(token)


def record(graph: GraphReport) -> None:
    """Add one graph to the report that is being collected, if any."""
    note_activity()
    report = _collecting.get()
    if report is not None:
        report.graphs.append(graph)


_activity = 0


def note_activity() -> None:
    """Called when the backend compiles a graph and when one that it has compiled runs."""
    global _activity
    _activity += 1


def activity() -> int:
    """A number that differs from an earlier one if there was any activity in between."""
    return _activity
