"""``make bench-decode``: whole models decoding, dense caches against ours.

Every competitor has a process of its own, set up in the same way. All compile first; then they
prefill and decode in turns, so that other load on the machine affects all of them. Peak memory is
the highest resident memory (VmHWM) from prefill to the last step less the resident memory (VmRSS)
just before the prefill, with weights and compiled code already there.
"""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from . import pictures
from .decode_models import COMPETITORS, DYNAMIC, LLAMA, SMOLLM2, STATIC, model_title, set_up
from .decode_run import Process, Settings, growth, measure_context, with_speedups
from .measure import busy_warning, machine_facts, wide_console
from .results import Metric, Result, ratios

CONTEXTS = {
    # 8192 positions less those of the tokens that are decoded.
    SMOLLM2: (512, 1024, 2048, 4096, 7800),
    LLAMA: (1024, 2048, 4096, 8192, 32768),
}
GROWTH_CONTEXTS = (512, 2048, 4096, 7800)
KEYS = ["model", "context", "competitor"]
METRICS = {"kv_bytes": Metric("exact"), "peak_bytes": Metric("ratio")} | ratios(
    "more", ["speedup_over_DynamicCache", "speedup_over_StaticCache"]
)


def context_table(rows: list[dict[str, Any]]) -> Table:
    """The rows of one model and context."""
    table = Table(
        title=f"{rows[0]['model']}, context of {rows[0]['context']} tokens",
        caption=f"x: speed relative to the faster {DYNAMIC} and the faster {STATIC} (*)\n"
        "others: share of the cores that other processes took in the worst turn",
        title_justify="left",
    )
    table.add_column("", no_wrap=True)
    names = (
        "tokens/s",
        "x Dyn.",
        "x Stat.",
        "ms",
        "mean ms",
        "KV MB",
        "peak MB",
        "prefill/s",
        "others",
    )
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        star = " *" if row.get("fastest_of_family") else ""
        cells = [row["error"].splitlines()[-1][:60]] if "error" in row else _cells(row)
        table.add_row(row["competitor"] + star, *cells)
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['tokens_per_s']:.1f}",
        *(f"{row.get(f'speedup_over_{family}', float('nan')):.2f}" for family in (DYNAMIC, STATIC)),
        f"{row['median_ms']:.1f}",
        f"{row['mean_ms']:.1f}",
        f"{row['kv_bytes'] / 1e6:.1f}",
        f"{row['peak_bytes'] / 1e6:.0f}",
        f"{row['prefill_tokens_per_s']:.0f}",
        f"{row['others_share']:.0%}",
    ]


def growth_table(rows: list[dict[str, Any]]) -> Table:
    """What ``growth`` found."""
    contexts = ", ".join(map(str, rows[0]["contexts"]))
    table = Table(title=f"SmolLM2-135M, growth over {contexts} tokens", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("us per 1,000 tokens", justify="right")
    table.add_column(f"ms/token at {rows[0]['contexts'][-1]}", justify="right")
    for row in rows:
        table.add_row(
            row["competitor"], f"{row['us_per_1000_tokens']:.0f}", f"{row['longest_ms']:.1f}"
        )
    return table


def measure_model(
    model: str, contexts: list[int], wanted: list[str], settings: Settings, console: Console
) -> Iterator[list[dict[str, Any]]]:
    """Rows of a model, one context after the other; ``wanted`` are parts of competitors' names."""
    title = model_title(model, settings.layers)
    chosen = [c for c in COMPETITORS if any(part in c.name for part in wanted)]
    set_up(model)
    processes = [Process(model, competitor, settings) for competitor in chosen]
    everyone = list(processes)
    try:
        for tokens in contexts:
            with console.status(f"{title}, {tokens} tokens"):
                rows = with_speedups(measure_context(processes, title, tokens, settings))
            console.print(context_table(rows))
            yield rows
    finally:
        for process in everyone:
            process.close()
        gc.collect()


def main(
    models: str = f"{SMOLLM2},{LLAMA}",
    contexts: Annotated[str, typer.Option(help="tokens; empty: those of each model")] = "",
    competitors: Annotated[str, typer.Option(help="parts of their names; empty: all")] = "",
    repeats: Annotated[int, typer.Option(help="turns of each competitor")] = 5,
    steps: Annotated[int, typer.Option(help="tokens decoded per turn")] = 16,
    layers: Annotated[int, typer.Option(help="of the Llama-shaped model")] = 2,
    dtype: str = "bfloat16",
    threads: Annotated[int, typer.Option(help="0: one per core")] = 2,
    side_by_side: Annotated[int, typer.Option(help="workers compiling at the same time")] = 2,
    quick: Annotated[bool, typer.Option(help="a smoke run, no figures to report")] = False,
    name: Annotated[str, typer.Option(help="of the result files")] = "decode",
) -> None:
    """Time whole models and their memory against torch.compile with its usual caches."""
    if quick:
        contexts, repeats, steps, layers, name = contexts or "512,1024", 1, 4, 1, f"{name}-quick"
    settings = Settings(repeats, steps, layers, dtype, threads, side_by_side)
    torch.set_num_threads(threads or os.cpu_count() or 1)  # recorded; workers do the same
    console, machine = wide_console(), machine_facts()
    console.print(busy_warning(machine))
    asked = [int(t) for t in contexts.split(",")] if contexts else []
    result = Result(name, KEYS, METRICS, [], dataclasses.asdict(settings), machine, ["cpu", "isa"])
    for model in models.split(","):
        lengths = asked or list(CONTEXTS[model])
        for measured in measure_model(model, lengths, competitors.split(","), settings, console):
            result.rows += measured
            # After each context, so that a long run that is interrupted keeps its results.
            path = result.write()
    smollm2 = [row for row in result.rows if row["model"] == model_title(SMOLLM2, layers)]
    if slopes := growth(smollm2, asked or GROWTH_CONTEXTS):
        console.print(growth_table(slopes))
    picture = pictures.decode(result.rows, path.with_suffix(".png"))
    console.print(f"{path}\n{picture}", markup=False)
