"""The units of work of a sweep: what a worker, on whatever machine, does by itself."""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spark_compile import calibrate
from spark_compile.plan import Plan

from .measure import machine_facts
from .quality_methods import Method
from .quality_models import disjoint_windows, essays, load, split_ids, stretches
from .quality_results import VERSIONS
from .quality_run import DTYPE, SCORED_TOKENS, Windows, run_method

Measured = list[tuple[int, int]]
"""Stretches of tokens of a text, [start, stop)."""


class WorkerError(RuntimeError):
    """A worker cannot measure what others have measured a part of."""


@dataclass(frozen=True)
class Setup:
    """What every worker of a sweep has in common."""

    threads: int
    """Of torch."""
    commit: str
    """Of the code, which the sweep brings along."""
    versions: Mapping[str, str]
    """Of the packages that results depend on."""

    @classmethod
    def here(cls, threads: int, machine: Mapping[str, Any]) -> Setup:
        """That of a sweep which is started on a machine."""
        return cls(threads, machine["commit"], {name: machine[name] for name in VERSIONS})

    def begin(self) -> dict[str, Any]:
        """Make this process ready; what there is to say of its machine.

        Raises:
            WorkerError: it has other versions.
        """
        torch.set_num_threads(self.threads)
        machine = machine_facts() | {"commit": self.commit}
        for name, version in self.versions.items():
            if machine[name] != version:
                raise WorkerError(
                    f"{platform.node()} has {name} {machine[name]}, but the sweep was started with "
                    f"{version}"
                )
        return machine


@dataclass(frozen=True)
class Measure:
    """One method on the windows of one model and context that it has not been measured on."""

    model: str
    context: int
    method: Method
    numbers: tuple[int, ...]
    """Of the windows."""
    windows: int
    """Of the whole sweep: a worker keeps what the dense model says to them for its next job."""
    inner: str
    """The compiler of our graphs."""
    setup: Setup

    @property
    def title(self) -> str:
        return f"{self.model}, {self.context} tokens: {self.method.name}"

    def run(self) -> dict[str, Any]:
        """What ``Results.add`` takes.

        Raises:
            WorkerError: the versions are others, or a package is missing.
        """
        machine = self.setup.begin()
        if missing := self.method.missing():
            raise WorkerError(f"{missing} is not installed on {platform.node()}")
        entry: dict[str, Any] = {"windows": {}}
        model, windows = _model(self.model)[0], _windows(self.model, self.context, self.windows)
        run_method(model, self.method, windows, self.numbers, entry, self.inner, machine)
        return entry


@dataclass(frozen=True)
class Text:
    """What of the text a plan was made by."""

    tokens: int
    """Of the whole text."""
    before: int
    """Tokens that the tokenizer puts before a text."""
    used: Measured

    def measured(self, contexts: Sequence[int], windows: int) -> Measured:
        """What of the text the quality is measured on: prompts and what follows them."""
        lengths = [context + SCORED_TOKENS + 1 - self.before for context in contexts]
        return [
            (stretch.start, stretch.stop)
            for length in lengths
            for stretch in stretches(self.tokens, length)[:windows]
        ]

    def is_apart(self, contexts: Sequence[int], windows: int) -> bool:
        """Whether none of what the quality is measured on was used."""
        measured = self.measured(contexts, windows)
        return not any(_overlap(one, other) for one in self.used for other in measured)


@dataclass(frozen=True)
class Tuned:
    """A plan, and how it came about."""

    plan: Plan
    text: Text
    machine: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True)
class Tune:
    """The plan of a model for a budget, by text on which its quality is not measured."""

    model: str
    budget: float
    contexts: tuple[int, ...]
    """At which the quality is measured, in tokens."""
    windows: int
    """On which it is measured."""
    settings: Mapping[str, Any]
    """As ``sweep_plans.settings`` gives them."""
    setup: Setup

    @property
    def title(self) -> str:
        return f"{self.model}, plan for {self.budget:g}"

    def run(self) -> Tuned:
        """The plan.

        Raises:
            WorkerError: the versions are others.
            ValueError: the text is too short, or the budget too small.
        """
        machine, start_s = self.setup.begin(), time.perf_counter()
        model, tokenizer = _model(self.model)
        before, ids = split_ids(tokenizer, essays())
        length = self.settings["context"] + self.settings["scored"]
        text = unmeasured(
            len(ids), len(before), self.contexts, self.windows, length, self.settings["windows"]
        )
        tokens = torch.tensor([before + ids[start:stop] for start, stop in text.used])
        arguments = {name: self.settings[name] for name in ("context", "windows", "scored")}
        plan = calibrate(
            model, tokens, budget=self.budget, dtype=DTYPE, progress=False, **arguments
        )
        return Tuned(plan, text, machine, round(time.perf_counter() - start_s, 1))


def unmeasured(
    tokens: int, before: int, contexts: Sequence[int], windows: int, length: int, count: int
) -> Text:
    """Stretches of a text on which no quality is measured.

    Args:
        tokens: of the text; ``before`` of them come before each stretch.
        contexts: tokens of the prompts that the quality is measured on, and ``windows`` of each.
        length: tokens of a stretch with those before it; ``count`` of them are wanted.

    Raises:
        ValueError: there are fewer.
    """
    found: Measured = []
    # From the other end of the order in which the windows are drawn, so that a plan still serves
    # when more of those are measured later.
    for stretch in reversed(stretches(tokens, length - before)):
        text = Text(tokens, before, [(stretch.start, stretch.stop)])
        if len(found) < count and text.is_apart(contexts, windows):
            found += text.used
    if len(found) < count:
        raise ValueError(
            f"{count} stretches of {length} tokens that are not measured on are needed: the text "
            f"has {len(found)}"
        )
    return Text(tokens, before, found)


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


@functools.lru_cache(maxsize=1)
def _model(name: str) -> tuple[Any, Any]:
    return load(name)


@functools.lru_cache(maxsize=1)
def _windows(name: str, context: int, count: int) -> Windows:
    model, tokenizer = _model(name)
    length = context + SCORED_TOKENS + 1
    return Windows(model, disjoint_windows(tokenizer, essays(), length, count))
