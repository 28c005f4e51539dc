"""Ray as the executor of a sweep: a task for each job. Nothing else imports ray."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

# Before ray is imported: it reports to its makers, unless it is told not to.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray

import spark_compile

from .sweep import Job, Outcome

PACKAGES = (Path(__file__).parent, Path(spark_compile.__file__).parent)
NOT_SENT = ["__pycache__/", "/results/", "/history.jsonl"]


class OnRay:
    """Runs jobs on a cluster, or on a Ray of its own that ends with it."""

    def __init__(self, address: str, cpus: int, threads: int) -> None:
        """Start or find Ray.

        Args:
            address: of a cluster, as ``ray.init`` takes it; empty: this machine alone.
            cpus: cores of this machine that may be used.
            threads: cores that a job takes.

        Raises:
            ConnectionError: there is no cluster that this process can work with.
        """
        # The code goes along, so that each machine measures this one. What the code needs does not.
        sent = {"py_modules": [str(package) for package in PACKAGES], "excludes": NOT_SENT}
        own: dict[str, Any] = {"num_cpus": cpus, "include_dashboard": False}
        try:
            # ray's "local_mode" is gone: a Ray on this machine is what "local" starts.
            ray.init(
                address or "local", runtime_env=sent, logging_level=logging.ERROR,
                **({} if address else own),
            )  # fmt: skip
        except (RuntimeError, ValueError, ImportError, ray.exceptions.RayError) as error:
            raise ConnectionError(str(error)) from error
        # A job that fails is told, and the next sweep tries it again.
        self._run = ray.remote(num_cpus=threads, max_retries=0)(_run)
        self._jobs: dict[Any, Job] = {}

    def start(self, job: Job) -> None:
        """Run a job when there are cores for it."""
        self._jobs[self._run.remote(job)] = job

    def next(self) -> tuple[Job, Outcome] | None:
        """Wait for a job to end; None if there are no more."""
        if not self._jobs:
            return None
        (reference,), _ = ray.wait([*self._jobs], num_returns=1)
        job = self._jobs.pop(reference)
        try:
            return job, ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            return job, error.cause
        except ray.exceptions.RayError as error:  # the worker died
            return job, error

    def stop(self) -> None:
        """End what is still running, and the connection."""
        for reference in self._jobs:
            ray.cancel(reference, force=True)
        self._jobs.clear()
        ray.shutdown()


def _run(job: Job) -> Any:
    return job.run()
