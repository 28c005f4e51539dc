"""The worker process of the demo: measures the job that its one argument describes as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from .assets import DemoError
from .worker import Job, measure


def main(arguments: Sequence[str]) -> None:
    """Measure one job and report on the standard output."""
    if len(arguments) != 1:
        raise SystemExit("this is the worker of 'spark-optimize demo': run that instead")
    try:
        result = measure(Job(**json.loads(arguments[0])), _emit, _wait)
    except DemoError as error:
        raise SystemExit(str(error)) from None
    _emit({"result": dataclasses.asdict(result)})


def _wait() -> None:
    _emit({"ready": True})
    if not sys.stdin.readline():
        raise SystemExit("the demo has ended without this worker")


def _emit(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
