"""What ``counted`` runs under Callgrind: python -m benchmarks.counted_worker LIBRARY WHAT..."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

import spark_compile
from spark_compile import backend
from spark_compile.kernels import cpu

from .attend_case import SHAPES, STORED, Case
from .coverage_case import Settings, generate
from .coverage_models import tiny_model

TOKENS = 512
"""Cached tokens, or tokens of a prompt."""
ARCHITECTURES = ("llama", "gemma3_text")


class Counter:
    """Counts instructions between its begin and its end."""

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)

    @contextmanager
    def counting(self, name: str) -> Iterator[None]:
        """Count what happens in the ``with`` block, and write it down under a name."""
        gc.collect()
        gc.disable()
        self._library.count_begin()
        try:
            yield
        finally:
            self._library.count_end(name.encode())
            gc.enable()


def kernels(counter: Counter) -> None:
    """A step over a cache, and storing a prompt, in every format that is timed.

    Raises:
        RuntimeError: there are no native kernels, so that others would be counted.
    """
    if not cpu.load():
        raise RuntimeError("the CPU kernels could not be loaded")
    torch.manual_seed(0)  # some ways depend on the numbers
    case = Case(SHAPES["llama"], 1, TOKENS, torch.bfloat16)
    prompt = case.rows(0, TOKENS)
    for stored in STORED:
        layer = case.layer(stored)
        calls: dict[str, Callable[[], Any]] = {
            "attend": functools.partial(case.step, layer, keep=None),
            "build": functools.partial(case.build, stored, *prompt),
        }
        for what, call in calls.items():
            call()
            with counter.counting(f"{what}|{stored.name}"):
                call()


def passes(counter: Counter) -> None:
    """The passes on the graphs of tiny models, prefill and decode."""
    run = backend.run_passes
    for name in ARCHITECTURES:
        numbers = iter(("prefill", "decode", "later"))

        def counted(program: Any) -> Any:
            with counter.counting(f"passes|{name}, {next(numbers)}"):  # noqa: B023
                return run(program)

        model = spark_compile.optimize(tiny_model(name, "sdpa"), inner="eager", window=4)
        with mock.patch.object(backend, "run_passes", counted):
            generate(model, Settings(steps=3))


def main() -> None:
    """Count what is named on the command line."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counter = Counter(sys.argv[1])
    for what in sys.argv[2:]:
        {"kernels": kernels, "passes": passes}[what](counter)


if __name__ == "__main__":
    main()
