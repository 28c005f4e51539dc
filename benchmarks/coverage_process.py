"""Architectures in processes of their own, with a time limit each."""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers

from .coverage_case import Settings, run_architecture

PREFIX = __package__ or "benchmarks"


def run_all(
    names: list[str], settings: Settings, limit_s: float, jobs: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run architectures, ``jobs`` at a time; yields each with its row when it is done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{PREFIX}.coverage_case"])  # imports take seconds: once
    alive: set[Any] = set()
    with ThreadPoolExecutor(jobs) as pool:
        running = {
            pool.submit(run_one, context, name, settings, limit_s, alive): name for name in names
        }
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        finally:  # interrupted: the threads end when their processes do
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(alive):
                process.kill()


def run_one(
    context: Any, name: str, settings: Settings, limit_s: float, alive: set[Any]
) -> dict[str, Any]:
    """The row of one architecture; rows missing at the time limit say so."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, settings, theirs), daemon=True)
    start_s = time.monotonic()
    process.start()
    alive.add(process)
    theirs.close()
    row: dict[str, Any] = {}
    try:
        while ours.poll(max(0.0, start_s + limit_s - time.monotonic())):
            key, value = ours.recv()
            row |= value if key == "class" else {key: value}
        row["error"] = f"stopped after {limit_s:g} s"
        process.kill()
    except EOFError:
        process.join()
        if process.exitcode:
            row["error"] = f"the process ended with {process.exitcode}"
    alive.discard(process)
    row["seconds"] = round(time.monotonic() - start_s, 1)
    return row


def quiet() -> None:
    """One thread, and no word of libraries: for a process of many."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()


def _work(name: str, settings: Settings, connection: Connection) -> None:
    """In the process of one architecture: send each row as soon as it is there."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    quiet()
    for item in run_architecture(name, settings):
        connection.send(item)
    connection.close()
