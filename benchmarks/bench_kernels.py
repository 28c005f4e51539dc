"""``make bench-kernels``: attention on the compressed cache against dense attention, in one run.

Every case (shape, batch, context) times its contenders in turns, over layers with memory of their
own that together exceed the last-level cache, as the layers of a model do. The limit is the best
read bandwidth measured between them.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from . import pictures
from .attend_case import PACKED, SHAPES, Case, relative_errors
from .bandwidth import fastest_reader, read_bytes_per_s
from .measure import (
    Contender,
    OtherLoad,
    busy_warning,
    interleave,
    machine_facts,
    spread,
    wide_console,
)
from .results import Result, ratios
from .store_case import CAT, COPY, build_contenders, step_contenders

BASELINES = {"attend": PACKED, "step": CAT, "build": COPY}
MAKERS = {"attend": Case.contenders, "step": step_contenders, "build": build_contenders}
CONTEXTS = "4096,8192,16384,32768,65536,131072"
BUILD_TOKENS = (1024, 4096, 32768)
"""Prompts."""
KEYS = ["operation", "shape", "batch", "context", "contender"]
METRICS = ratios("more", ["speedup", "limit_share"])


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a run measures; part of its result."""

    contexts: list[int]
    batches: list[int]
    shapes: list[str]
    operations: list[str]
    repeats: int
    rotate_bytes: int
    dtype: str


def measure_case(
    operation: str, case: Case, settings: Settings, reader: Contender
) -> list[dict[str, Any]]:
    """Rows of the result for one operation on one case."""
    reader.times_ms.clear()
    contenders = MAKERS[operation](case, settings.rotate_bytes)
    errors = relative_errors(contenders) if operation == "attend" else {}
    others = OtherLoad()
    interleave([reader, *contenders], settings.repeats)
    others_share = others.share()
    limit = read_bytes_per_s(reader)
    base_ms = next(
        statistics.median(c.times_ms) for c in contenders if c.name == BASELINES[operation]
    )
    where = {"operation": operation, "shape": case.shape.name, "batch": case.batch}
    where |= {"context": case.tokens, "others_share": others_share}
    return [
        {**where, "contender": c.name, "layers": len(c.calls)}
        | row_of(c, base_ms, limit)
        | ({"relative_error": errors[c.name]} if errors else {})
        for c in contenders
    ]


def row_of(contender: Contender, base_ms: float, limit_bytes_per_s: float) -> dict[str, Any]:
    """What was measured of one contender, and how it compares within the run."""
    times = spread(contender.times_ms)
    moved, median_ms = contender.moved_bytes, float(times["median_ms"])
    return {
        **times,
        "speedup": base_ms / median_ms,
        "moved_bytes": moved,
        "bytes_per_s": moved / median_ms * 1000,
        "limit_bytes_per_s": limit_bytes_per_s,
        "limit_ms": moved / limit_bytes_per_s * 1000,
        "limit_share": moved / median_ms * 1000 / limit_bytes_per_s,
    }


def case_table(rows: list[dict[str, Any]]) -> Table:
    """The rows of one case."""
    first = rows[0]
    limit = f"read limit {first['limit_bytes_per_s'] / 1e9:.1f} GB/s"
    title = "{operation}: {shape}, B {batch}, {context} tokens".format(**first)
    caption = f"speed: relative to {BASELINES[first['operation']]}, within this run"
    caption += f"; others took {first['others_share']:.0%} of the cores"
    table = Table(title=f"{title}, {limit}", caption=caption, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("speed", "ms", "at limit", "MB", "GB/s", "of limit"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["contender"],
            f"{row['speedup']:.2f}",
            f"{row['median_ms']:.3f}",
            f"{row['limit_ms']:.3f}",
            f"{row['moved_bytes'] / 1e6:.2f}",
            f"{row['bytes_per_s'] / 1e9:.1f}",
            f"{row['limit_share']:.0%}",
        )
    return table


def cases(settings: Settings) -> list[tuple[str, Case]]:
    """What to measure, without the memory for it."""
    dtype = getattr(torch, settings.dtype)
    found = []
    for operation in settings.operations:
        for shape in settings.shapes:
            # Prompts are stored one by one: the work grows with the batch and nothing else changes.
            build = operation == "build"
            for batch in [1] if build else settings.batches:
                limit = max(settings.contexts)
                contexts = [t for t in BUILD_TOKENS if t <= limit] if build else settings.contexts
                found += [(operation, Case(SHAPES[shape], batch, t, dtype)) for t in contexts]
    return found


def main(
    contexts: Annotated[str, typer.Option(help="cached tokens")] = "",
    batches: str = "",
    shapes: Annotated[str, typer.Option(help=", ".join(SHAPES))] = ",".join(SHAPES),
    operations: Annotated[str, typer.Option(help=", ".join(BASELINES))] = ",".join(BASELINES),
    repeats: int = 9,
    rotate_mb: Annotated[int, typer.Option(help="least memory that a contender cycles over")] = (
        1024
    ),
    dtype: str = "bfloat16",
    threads: Annotated[int, typer.Option(help="0: all that torch takes")] = 0,
    quick: Annotated[bool, typer.Option(help="a smoke run, no figures to report")] = False,
    name: Annotated[str, typer.Option(help="of the result files")] = "kernels",
) -> None:
    """Time attend, step and build against dense PyTorch and the read bandwidth."""
    if threads:
        torch.set_num_threads(threads)
    if quick:
        contexts, batches = contexts or "1024,2048", batches or "1"
        repeats, rotate_mb, name = 1, 16, f"{name}-quick"
    settings = Settings(
        [int(t) for t in (contexts or CONTEXTS).split(",")],
        [int(b) for b in (batches or "1,4").split(",")],
        shapes.split(","),
        operations.split(","),
        repeats,
        rotate_mb << 20,
        dtype,
    )
    console, machine, rows = wide_console(), machine_facts(), []
    console.print(busy_warning(machine))
    torch.manual_seed(0)
    reader = fastest_reader(settings.rotate_bytes)
    with torch.no_grad():
        for operation, case in cases(settings):
            measured = measure_case(operation, case, settings, reader)
            console.print(case_table(measured))
            rows += measured
            gc.collect()
    how = dataclasses.asdict(settings) | {"read_way": reader.name}
    result = Result(name, KEYS, METRICS, rows, how, machine, ["cpu", "isa"]).write()
    console.print(f"{result}\n{pictures.kernels(rows, result.with_suffix('.png'))}", markup=False)
