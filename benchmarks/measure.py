"""Timing competitors in turns, a little statistics, and what a result file says of its machine."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

RESULTS = Path(__file__).parent / "results"
LEAST_REPEATS = 3
MOMENT = ("load_average", "commit", "date")
"""Facts of a run, which another run on the same machine does not share."""


@dataclass
class Contender:
    """One competitor: the same work on every layer of a model, each layer with its own memory."""

    name: str
    calls: Sequence[Callable[[], object]]
    """One per layer, called in turn, so that a layer's data has left the CPU's cache."""
    moved_bytes: int
    """What one call has to read (and, where it stores something, write)."""
    period: int = 1
    """Calls that differ from one another, after which the same ones follow."""
    times_ms: list[float] = field(default_factory=list)
    _next: int = 0

    def time_ms(self, calls: int) -> float:
        """Time per call of the next ``calls`` layers, in ms."""
        chosen = [self.calls[(self._next + i) % len(self.calls)] for i in range(calls)]
        self._next = (self._next + calls) % len(self.calls)
        start_s = time.perf_counter()
        for call in chosen:
            call()
        return (time.perf_counter() - start_s) * 1000 / calls


def interleave(
    contenders: Sequence[Contender], repeats: int, pass_ms: float = 20, budget_s: float = 20
) -> None:
    """Fill ``times_ms`` of all contenders, one after the other, ``repeats`` times over.

    A short call is repeated over following layers for ``pass_ms``, for whole periods. A contender
    that has used up ``budget_s`` sits out the rounds after its third.
    """
    calls = {}
    for contender in contenders:
        contender.time_ms(1)  # builds, allocates, reads memory for the first time
        once_ms = contender.time_ms(1)
        count = max(1, min(round(pass_ms / max(once_ms, 1e-3)), 1000))
        calls[contender.name] = -(-count // contender.period) * contender.period
    for turn in range(repeats):
        for contender in contenders:
            count = calls[contender.name]
            used_s = sum(contender.times_ms) * count / 1000
            if turn < LEAST_REPEATS or used_s < budget_s:
                contender.times_ms.append(contender.time_ms(count))


class OtherLoad:
    """Which share of the cores other processes took since this was made (Linux; else 0).

    Threads that wait for each other suffer from a shared core far more than by its share, so that
    figures of a run in which this is above a few percent are worth nothing.
    """

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float:
        wall_s, busy_s, own_s = (b - a for a, b in zip(self._start, self._now(), strict=True))
        return max(0.0, (busy_s - own_s) / (wall_s * (os.cpu_count() or 1)))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds of the clock, of all busy cores, and of this process on them."""
        own_s, stat = time.process_time(), Path("/proc/stat")
        if not stat.exists():
            return time.perf_counter(), own_s, own_s
        ticks = [int(n) for n in stat.read_text().splitlines()[0].split()[1:9]]
        busy_s = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # not idle, not io
        return time.perf_counter(), busy_s, own_s


def spread(times_ms: Sequence[float]) -> dict[str, float | int]:
    """Median, least and greatest of some times, for a result file."""
    return {
        "median_ms": statistics.median(times_ms),
        "min_ms": min(times_ms),
        "max_ms": max(times_ms),
        "repeats": len(times_ms),
    }


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of y over x; at least two different x are needed."""
    return statistics.linear_regression(x, y).slope


def machine_facts() -> dict[str, Any]:
    """The machine and the software that a result is about to be measured on."""
    return {
        "cpu": _first_field(Path("/proc/cpuinfo"), "model name") or platform.processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "last_level_cache": _last_level_cache(),
        "memory": _first_field(Path("/proc/meminfo"), "MemTotal"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def lasting(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts that are a machine's, and not those of a moment on it."""
    return {name: fact for name, fact in facts.items() if name not in MOMENT}


def available_bytes() -> int:
    """Memory that could be allocated now; a guess of 8 GB where the system does not say."""
    free = _first_field(Path("/proc/meminfo"), "MemAvailable")
    return int(free.split()[0]) * 1024 if free else 8_000_000_000


def busy_warning(facts: dict[str, Any]) -> str:
    """What to say before a run on a machine that is doing something else, or nothing."""
    load = facts["load_average"]
    return f"load average {load:.1f}: others use these cores" if load and load > 0.5 else ""


def wide_console() -> Console:
    """A console whose tables are whole where output goes to a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else 120)


def _first_field(path: Path, name: str) -> str:
    """The value of the first line ``name : value``, empty without such a file or line."""
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _last_level_cache() -> str:
    sizes = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return sizes[-1].read_text().strip() if sizes else ""


def _commit() -> str:
    """The commit, with ``+`` after it where the working tree differs."""
    try:
        run = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--abbrev=12"]
        done = subprocess.run([*run, "--dirty=+"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
