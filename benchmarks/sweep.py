"""``python -m benchmarks sweep``: plans and their quality, and that of methods, on many machines.

A job is one method on one model and context, or the making of one plan (``sweep_jobs.py``). Jobs
are tasks of Ray, on this machine or on a cluster. Their results are written here, into the files
of ``python -m benchmarks quality``, as soon as each ends; what these have is not measured again.
Needs the extra ``sweep``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import typer
from rich.console import Console

from spark_compile.presets import share_named

from . import measure, quality
from .quality_methods import Method, methods
from .quality_models import MODELS
from .quality_results import Results
from .sweep_jobs import Measure, Setup, Tune, Tuned
from .sweep_plans import Plans

NO_RAY = "sweep needs ray: pip install 'spark-compile[sweep]'"
INTERRUPTED = 130
"""Exit status, as shells have it for Ctrl-C."""
Job = Measure | Tune
Outcome = dict[str, Any] | Tuned | Exception
"""What ``run`` of a job returned or raised."""


class Executor(Protocol):
    """Runs jobs somewhere."""

    def start(self, job: Job) -> None:
        """Run a job when there is room."""

    def next(self) -> tuple[Job, Outcome] | None:
        """Wait for a job to end; None if there are no more."""

    def stop(self) -> None:
        """End what is still running."""


@dataclass
class Sweep:
    """What is measured, where it is written, and what failed."""

    contexts: tuple[int, ...]
    windows: int
    inner: str
    setup: Setup
    files: dict[tuple[str, int], Results]
    """By model and context."""
    plans: dict[str, Plans]
    """By model."""
    failed: dict[str, str] = field(default_factory=dict)
    """Errors by the titles of jobs."""

    def measure(self, model: str, methods: Iterable[Method]) -> list[Job]:
        """Jobs for what methods have not been measured on, a context after the other."""
        jobs: list[Job] = []
        chosen = list(methods)
        for context in self.contexts:
            for method in chosen:
                if numbers := self.files[model, context].due(method, self.windows):
                    jobs.append(
                        Measure(
                            model, context, method, numbers, self.windows, self.inner, self.setup
                        )
                    )
        return jobs

    def tune(self, model: str, budgets: Iterable[float], fresh: bool = False) -> list[Job]:
        """Jobs for plans that are not there, or for what the others have not been measured on."""
        jobs: list[Job] = []
        plans = self.plans[model]
        for budget in budgets:
            made = None if fresh else plans.method(budget, self.contexts, self.windows)
            jobs += self.measure(model, [made]) if made else [self._tune(model, budget)]
        return jobs

    def _tune(self, model: str, budget: float) -> Tune:
        settings = self.plans[model].settings
        return Tune(model, budget, self.contexts, self.windows, settings, self.setup)

    def take(self, job: Job, outcome: Outcome) -> list[Job]:
        """Write what a job found; the jobs that follow from it."""
        if isinstance(outcome, Tuned):
            return self.measure(job.model, [self.plans[job.model].add(outcome)])
        found: dict[str, Any] = (
            {"windows": {}, "error": f"{type(outcome).__name__}: {outcome}"}
            if isinstance(outcome, Exception)
            else outcome
        )
        if "error" in found:
            self.failed[job.title] = found["error"]
        if isinstance(job, Measure):
            self.files[job.model, job.context].add(job.method, found)
        return []


def run(
    sweep: Sweep, executor: Executor, jobs: Sequence[Job], note: Callable[[Job], object]
) -> bool:
    """Run jobs and those that follow from them; each result is written when it is there.

    Args:
        note: called after each job.

    Returns:
        Whether all of them ended; not, if Ctrl-C came first.
    """
    try:
        for job in jobs:
            executor.start(job)
        while (ended := executor.next()) is not None:
            for following in sweep.take(*ended):
                executor.start(following)
            note(ended[0])
    except KeyboardInterrupt:
        return False
    finally:
        executor.stop()
    return True


def budgets_of(text: str) -> list[float]:
    """The budgets that an option names, as shares.

    Raises:
        BadParameter: one of them is none.
    """
    found: dict[float, None] = {}
    for name in filter(None, text.split(",")):
        try:
            share = share_named(float(name))
        except ValueError:
            share = share_named(name)
        if share is None:
            raise typer.BadParameter(f"--budget is {name!r}: allowed is as for optimize(budget=)")
        found[share] = None
    return [*found]


def main(
    model: Annotated[str, typer.Option(help="names, separated by commas")] = ",".join(MODELS),
    context: Annotated[str, typer.Option(help="tokens of the prompts")] = "1024,4096",
    windows: Annotated[int, typer.Option(help="disjoint stretches of text")] = 8,
    only: Annotated[str, typer.Option(help="patterns of methods; empty: none")] = "*",
    budget: Annotated[str, typer.Option(help="of plans to make and to measure")] = "",
    tune_windows: Annotated[int, typer.Option(help="stretches of other text for a plan")] = 4,
    fresh: Annotated[bool, typer.Option(help="measure again what has been measured")] = False,
    inner: Annotated[str, typer.Option(help="compiler of our graphs")] = "eager",
    threads: Annotated[int, typer.Option(help="cores of a job")] = 1,
    address: Annotated[str, typer.Option(help="of a Ray cluster, as ray.init takes it")] = "",
    cpus: Annotated[int, typer.Option(help="cores of this machine; 0: all")] = 0,
    results: Annotated[Path, typer.Option(help="folder of the result files")] = measure.RESULTS,
) -> None:
    """Measure methods, and plans for budgets, on all cores or all machines of a Ray cluster."""
    names, contexts = quality.named(model), quality.contexts_of(context)
    budgets, console = budgets_of(budget), measure.wide_console()
    cores = cpus or os.cpu_count() or 1
    if address and cpus:
        raise typer.BadParameter("--cpus is of this machine: allowed is --address or --cpus")
    if not address and not 1 <= threads <= cores:
        raise typer.BadParameter(f"--threads is {threads}: allowed is 1 to {cores}, the cores")
    selected = {
        name: quality.chosen(only, methods(MODELS[name].head_dim)) if only else [] for name in names
    }
    torch.set_num_threads(threads)  # as in the workers: part of what a machine is
    machine = measure.machine_facts()
    sweep = Sweep(
        tuple(contexts), windows, inner, Setup.here(threads, machine),
        {(n, c): Results.of(n, c, inner, machine, results) for n in names for c in contexts},
        {n: Plans(n, tune_windows, machine, results) for n in names},
    )  # fmt: skip
    jobs, left_out = begin(sweep, selected, budgets, fresh, console)
    ended = True
    if jobs:
        console.print(f"{len(jobs)} jobs" + ", and those that plans bring" * bool(budgets))
        executor = on_ray(address, cores, threads)
        ended = run(
            sweep, executor, jobs, lambda job: console.print(_line(sweep, job), markup=False)
        )
    tell(sweep, left_out, console)
    if not ended:
        console.print("stopped: the same command goes on from here")
        raise typer.Exit(INTERRUPTED)
    if sweep.failed:
        raise typer.Exit(1)


def on_ray(address: str, cpus: int, threads: int) -> Executor:
    """An executor on Ray, with the arguments of ``OnRay``.

    Raises:
        Exit: Ray is not installed, or there is no such cluster; which of them is told.
    """
    if find_spec("ray") is None:
        typer.echo(NO_RAY, err=True)
        raise typer.Exit(2)
    from .sweep_ray import OnRay

    try:
        return OnRay(address, cpus, threads)
    except ConnectionError as error:
        typer.echo(f"no Ray at {address or 'this machine'}: {error}", err=True)
        raise typer.Exit(2) from error


def begin(
    sweep: Sweep, selected: dict[str, list[Method]], budgets: Sequence[float], fresh: bool,
    console: Console,
) -> tuple[list[Job], list[str]]:  # fmt: skip
    """Take over earlier results.

    Args:
        selected: methods by model.
        fresh: measure them, and make plans, all the same.

    Returns:
        The jobs that are due, and what is said of methods that are left out.
    """
    jobs: list[Job] = []
    sentences: dict[str, None] = {}
    for name, wanted in selected.items():
        known = methods(MODELS[name].head_dim)
        present, left_out = quality.installed(wanted)
        files = [sweep.files[name, context] for context in sweep.contexts]
        for replaced in filter(None, [f.go_on(known) for f in files] + [sweep.plans[name].go_on()]):
            console.print(replaced, markup=False)
        for file in files if fresh else ():
            file.forget(method.name for method in present)
            file.forget(map(sweep.plans[name].name, budgets))
        # Plans take longest, and more follows from them.
        jobs += sweep.tune(name, budgets, fresh) + sweep.measure(name, present)
        sentences |= dict.fromkeys(left_out)
    return jobs, [*sentences]


def _line(sweep: Sweep, job: Job) -> str:
    return f"{job.title}: {sweep.failed.get(job.title, 'done')}"


def tell(sweep: Sweep, left_out: Sequence[str], console: Console) -> None:
    """Print the tables of all files, draw their pictures, and say what failed."""
    for file in sweep.files.values():
        if file.methods:
            quality.tell(file, left_out, console)
    for title, error in sweep.failed.items():
        console.print(f"failed: {title}: {error}", style="red", markup=False)
