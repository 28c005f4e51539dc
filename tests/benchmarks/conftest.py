"""``benchmarks`` is no part of the installed package: it is imported from the repository root."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

import pytest
import typer
from sweeps import INT8, KIVI, Here, answered

from benchmarks import sweep


@pytest.fixture
def swept(monkeypatch, tmp_path):
    """Runs a sweep whose jobs are answered by a function: titles of the jobs, exit status."""
    monkeypatch.setattr(sweep, "methods", lambda _: (INT8, KIVI))

    def run(answer=answered, **options):
        started = []

        def executor(*_):
            started.append(Here(answer))
            return started[0]

        monkeypatch.setattr(sweep, "on_ray", executor)
        given = {"model": "smollm2", "context": "1024", "windows": 2, "only": "*", "budget": "",
                 "tune_windows": 4, "fresh": False, "inner": "eager", "threads": 1, "address": "",
                 "cpus": 0, "results": tmp_path, **options}  # fmt: skip
        status = 0
        try:
            sweep.main(**given)
        except typer.Exit as error:
            status = error.exit_code
        assert all(each.stopped for each in started)
        return (started[0].titles if started else []), status

    return run
