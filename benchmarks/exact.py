"""What the rewriting of tiny models gives, in numbers that are equal in every run."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch
from torch import fx

import spark_compile
from spark_compile import backend
from spark_compile.report import collect_report

from .coverage_case import Settings, compressed_layers, generate
from .coverage_models import tiny_model
from .coverage_process import quiet
from .results import Metric, Result, Row

CACHES = ("growing", "static")
ARCHITECTURES = {
    "bloom": "eager", "cohere2": "sdpa", "deepseek_v2": "sdpa", "falcon": "sdpa",
    "gemma2": "eager", "gemma3_text": "sdpa", "gpt2": "sdpa", "gpt_neox": "eager",
    "gpt_oss": "eager", "gptj": "eager", "lfm2": "sdpa", "llama": "sdpa", "mistral": "eager",
    "mpt": "eager", "opt": "sdpa", "phi3": "sdpa", "qwen3": "sdpa", "stablelm": "eager",
    "whisper": "sdpa",
}  # fmt: skip
"""Those that differ most in how they write attention, masks and caches, and its implementation."""
SETTINGS = Settings(steps=8, again=None)
METRICS = {
    name: Metric("exact")
    for name in (
        "rewritten", "refused", "compressed", "graphs", "breaks", "operators", "own_operators",
        "arguments", "token_bytes", "stored_bytes",
    )
}  # fmt: skip
"""
rewritten, refused: sites of all graphs. compressed: layers whose keys and values are states in the
end. graphs, breaks: of Dynamo. operators: calls in the last graph, which decodes; own_operators:
the backend's among them; arguments: its inputs. token_bytes: what a token takes in the pages of all
sites of that graph. stored_bytes: what the cache takes after the last token.
"""


class Recorder:
    """An inner compiler that counts what is in the latest graph, and runs all as they are."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.arguments = 0

    def __call__(self, module: fx.GraphModule, inputs: Any) -> Any:
        nodes = list(module.graph.nodes)
        self.calls = Counter(str(node.target) for node in nodes if node.op == "call_function")
        self.arguments = sum(node.op == "placeholder" for node in nodes)
        return module.forward

    def instead_of_eager(self) -> Any:
        """A patch that makes this what ``inner="eager"`` stands for."""
        return mock.patch.object(backend, "lookup_backend", return_value=self)


def measure(name: str, attention: str, cache: str, **options: Any) -> Row:
    """The row of an architecture with one kind of cache; options are the backend's."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, recorder = tiny_model(name, attention, least_layers=1), Recorder()
    options = {"inner": "eager", "key_ratio": 0.5, "window": 4} | options
    model = spark_compile.optimize(model, **options)
    ignored = warnings.catch_warnings(action="ignore")
    with collect_report() as report, ignored, recorder.instead_of_eager():
        run = generate(model, SETTINGS, static=cache == "static")
    sites = [site for graph in report.graphs for site in graph.sites]
    return {
        "architecture": name, "attention": attention, "cache": cache,
        "rewritten": sum(site.refusal is None for site in sites),
        "refused": sum(site.refusal is not None for site in sites),
        "compressed": len(compressed_layers(run.cache)),
        "graphs": len(report.graphs),
        "breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
        "operators": recorder.calls.total(),
        "own_operators": sum(n for op, n in recorder.calls.items() if op.startswith("spark.")),
        "arguments": recorder.arguments,
        "token_bytes": sum(s.stored_token_bytes for s in report.graphs[-1].rewritten),
        "stored_bytes": spark_compile.kv_bytes(run.cache),
    }  # fmt: skip


def run(jobs: int = 2) -> Iterator[Row]:
    """Rows of all architectures, in processes of their own kind."""
    todo = [(n, a, cache) for n, a in ARCHITECTURES.items() for cache in CACHES]
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=quiet) as pool:
        yield from pool.map(measure, *zip(*todo, strict=True))


def result(rows: list[Row]) -> Result:
    """The rows as a file; other versions of torch or transformers write other graphs."""
    keys = ["architecture", "attention", "cache"]
    return Result("exact", keys, METRICS, rows, comparable=["torch", "transformers"])
