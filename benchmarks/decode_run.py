"""Runs the workers of ``bench_decode`` in turns, and makes rows of their answers."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .decode_models import DYNAMIC, STATIC, Competitor
from .measure import slope, spread

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a run measures; part of its result."""

    repeats: int
    steps: int
    """Tokens decoded per repeat."""
    layers: int
    dtype: str
    threads: int
    side_by_side: int
    """Workers that compile at the same time; timing is one at a time."""


class WorkerError(RuntimeError):
    """A worker ended before it answered."""


class Process:
    """A competitor's process."""

    def __init__(self, model: str, competitor: Competitor, settings: Settings) -> None:
        self.competitor = competitor
        job = {"model": model, "competitor": dataclasses.asdict(competitor)}
        job |= {name: getattr(settings, name) for name in ("layers", "dtype", "threads")}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.decode_worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
        )

    def ask(self, do: str, **arguments: int) -> dict[str, Any]:
        """Send a command and wait for its answer.

        Raises:
            WorkerError: the worker ended instead.
        """
        self.send(do, **arguments)
        return self.answer()

    def send(self, do: str, **arguments: int) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # answer reports the reason

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        self._errors.seek(0)
        raise WorkerError(f"ended with {code}: {self._errors.read().strip()[-600:]}")

    def close(self) -> None:
        """End the process, finished or not."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()


def measure_context(
    processes: list[Process], model: str, tokens: int, settings: Settings
) -> list[dict[str, Any]]:
    """One row per process; one that fails gets a row with ``error`` and leaves ``processes``."""
    rows = {p.competitor.name: _label(model, tokens, p.competitor) for p in processes}
    room = max(settings.repeats * settings.steps, 8)

    def turn(do: str, **arguments: int) -> Iterator[tuple[str, dict[str, Any]]]:
        for process in list(processes):
            try:
                yield process.competitor.name, process.ask(do, **arguments)
            except WorkerError as error:
                rows[process.competitor.name]["error"] = str(error)
                processes.remove(process)
                process.close()

    _warm(processes, rows, settings.side_by_side, tokens=tokens, room=room)
    for name, answer in turn("prefill"):
        rows[name]["prefill_tokens_per_s"] = tokens / answer["prefill_s"]
    steps_ms: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(settings.repeats):
        for name, answer in turn("steps", count=settings.steps):
            steps_ms[name] += answer["steps_ms"]
            rows[name].setdefault("tokens", []).extend(answer["tokens"])
            worst = max(rows[name].get("others_share", 0.0), answer["others_share"])
            rows[name]["others_share"] = worst
    for name, answer in turn("finish"):
        rows[name] |= answer | spread(steps_ms[name])
        rows[name]["mean_ms"] = statistics.fmean(steps_ms[name])
        rows[name]["tokens_per_s"] = 1000 / rows[name]["median_ms"]
    return list(rows.values())


def _warm(
    processes: list[Process], rows: dict[str, dict[str, Any]], side_by_side: int, **arguments: int
) -> None:
    for first in range(0, len(processes), side_by_side):
        group = processes[first : first + side_by_side]
        for process in group:
            process.send("warm", **arguments)
        for process in group:
            try:
                rows[process.competitor.name] |= process.answer()
            except WorkerError as error:
                rows[process.competitor.name]["error"] = str(error)
    for process in list(processes):
        if "error" in rows[process.competitor.name]:
            processes.remove(process)
            process.close()


def _label(model: str, tokens: int, competitor: Competitor) -> dict[str, Any]:
    return {
        "model": model,
        "context": tokens,
        "competitor": competitor.name,
        "family": competitor.family,
    }


def with_speedups(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one context with their speed relative to the faster setting of either cache."""
    best = {
        family: min((r for r in rows if _timed(r, family)), key=_median_ms, default=None)
        for family in (DYNAMIC, STATIC)
    }
    compared = []
    for row in rows:
        new = {**row, "fastest_of_family": any(row is base for base in best.values())}
        for family, base in best.items():
            if base is not None and "median_ms" in row:
                new[f"speedup_over_{family}"] = base["median_ms"] / row["median_ms"]
        compared.append(new)
    return compared


def _timed(row: dict[str, Any], family: str) -> bool:
    return bool(row["family"] == family and "median_ms" in row)


def _median_ms(row: dict[str, Any]) -> float:
    return float(row["median_ms"])


def growth(rows: Sequence[dict[str, Any]], contexts: Sequence[int]) -> list[dict[str, Any]]:
    """How the median time per token grows with the context, per competitor of one model."""
    result = []
    for name in dict.fromkeys(row["competitor"] for row in rows):
        own = [r for r in rows if r["competitor"] == name and "median_ms" in r]
        points = sorted((r["context"], r["median_ms"]) for r in own if r["context"] in contexts)
        if len(points) < 2:
            continue
        tokens, times_ms = zip(*points, strict=True)
        result.append(
            {
                "competitor": name,
                "contexts": list(tokens),
                "us_per_1000_tokens": slope(tokens, times_ms) * 1e6,
                "longest_ms": times_ms[-1],
            }
        )
    return result
