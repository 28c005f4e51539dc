"""One competitor of ``bench_decode`` in a process of its own.

It reads commands from standard input, one JSON object a line, and answers each with a line:

- ``{"do": "warm", "tokens": N, "room": M}``: compile on a prompt of N tokens; a static cache gets
  room for M more.
- ``{"do": "prefill"}``: the same prompt into a new cache, timed; memory is watched from here.
- ``{"do": "steps", "count": K}``: decode K tokens greedily, each timed.
- ``{"do": "finish"}``: the size of the cache and the peak of the process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import spark_compile
from spark_compile.demo.worker import memory_bytes, reset_peak
from spark_compile.transformers_names import cache_argument

from . import decode_models
from .decode_models import STATIC, Competitor
from .measure import OtherLoad

WARM_UP_STEPS = 4


class Worker:
    """A loaded and compiled model and, from ``prefill`` to ``finish``, a cache."""

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"] or os.cpu_count() or 1)
        self._name: str = job["model"]
        self._competitor = Competitor(**job["competitor"])
        dtype = getattr(torch, job["dtype"])
        self._model = decode_models.load(self._name, job["layers"], dtype)
        decode_models.compile_in_place(self._model, self._competitor)
        self._cache: Any = None
        self._cache_argument = cache_argument(self._model.forward)

    def warm(self, tokens: int, room: int) -> dict[str, Any]:
        """Compile prefill and decode, and run them once at full length."""
        if self._competitor.family == STATIC:
            # Otherwise the lengths of its caches, constants to it, would become dynamic.
            torch._dynamo.reset()
        self._prompt, self._room = decode_models.prompt(self._name, tokens), tokens + room
        start_s = time.perf_counter()
        self._start()
        for _ in range(WARM_UP_STEPS):
            self._step(self._token)
        self._cache = None
        return {"warm_s": time.perf_counter() - start_s}

    def prefill(self) -> dict[str, Any]:
        """Time the prompt; the peak is counted from the resident memory before it."""
        self._graphs = _graphs()
        self._before_bytes = reset_peak()
        start_s = time.perf_counter()
        self._start()
        return {"prefill_s": time.perf_counter() - start_s}

    def steps(self, count: int) -> dict[str, Any]:
        """Decode ``count`` tokens; they are reported, so that competitors can be compared."""
        times_ms, tokens, others = [], [], OtherLoad()
        for _ in range(count):
            start_s = time.perf_counter()
            self._step(self._token)
            times_ms.append((time.perf_counter() - start_s) * 1000)
            tokens.append(int(self._token))
        return {"steps_ms": times_ms, "tokens": tokens, "others_share": others.share()}

    def finish(self) -> dict[str, Any]:
        """Bytes since ``prefill``; the cache is freed."""
        peak_bytes = memory_bytes("VmHWM")
        kv_bytes = spark_compile.kv_bytes(self._cache)
        self._cache = None
        return {
            "kv_bytes": kv_bytes,
            "peak_bytes": peak_bytes - self._before_bytes,
            "process_peak_bytes": peak_bytes,
            "graphs_while_timed": _graphs() - self._graphs,
        }

    def _start(self) -> None:
        self._cache = decode_models.new_cache(self._model, self._competitor, self._room)
        self._step(self._prompt)

    def _step(self, tokens: Tensor) -> None:
        """Append tokens [1, L] to the cache, choose the next one."""
        past = {self._cache_argument: self._cache}
        out = self._model(input_ids=tokens, use_cache=True, logits_to_keep=1, **past)
        self._token = out.logits[:, -1].argmax(-1, keepdim=True)


def _graphs() -> int:
    """Graphs that Dynamo has captured so far."""
    return int(counters["stats"]["unique_graphs"])


def main() -> None:
    """Serve commands until standard input ends."""
    # Answers have a channel of their own, because libraries may print.
    answers, sys.stdout = sys.stdout, sys.stderr
    worker = Worker(json.loads(sys.argv[1]))
    with torch.no_grad():
        for line in sys.stdin:
            command = json.loads(line)
            answer = getattr(worker, command.pop("do"))(**command)
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
