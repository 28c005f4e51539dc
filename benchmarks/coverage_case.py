"""One architecture: eager, under spark and, where that fails, under plain ``torch.compile``."""

from __future__ import annotations

import copy
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer

import spark_compile
from spark_compile import PrunedKeys, SparkConfig, StoredValues
from spark_compile.report import Report, collect_report

from .coverage_models import class_name, tiny_model
from .simulated import Simulated, cache_layers

TOLERANCE = 1e-4
"""Largest relative error (root mean squares) of float32 logits, as in the tests' table."""
ATTENTIONS = ("sdpa", "eager")
RECOMPILE_LIMIT = 64
"""Instead of 8, at which Dynamo gives up on functions that models with graph breaks share among
their layers: what is counted here are patterns."""
NOT_FOUND = "no site was found for the layer"


@dataclass(frozen=True)
class Settings:
    """How every architecture is run."""

    inner: str = "eager"
    prompt: int = 16
    steps: int = 24
    window: int = 4
    key_ratio: float = 0.5
    batch: int = 1
    again: tuple[int, int, int] | None = (2, 11, 8)
    """Batch size, prompt and steps of another generation with the same compiled model."""

    def other(self) -> Settings | None:
        """The settings of that."""
        if self.again is None:
            return None
        batch, prompt, steps = self.again
        return replace(self, batch=batch, prompt=prompt, steps=steps)


@dataclass
class Run:
    """What one greedy generation gave."""

    tokens: Tensor
    """[B, steps]"""
    logits: Tensor
    """[B, steps, vocabulary]"""
    cache: Any


def generate(model: Any, settings: Settings, static: bool = False) -> Run:
    """Generate greedily from prompts that are the same for every architecture.

    Args:
        model: any causal language model of transformers.
        settings: sizes.
        static: with a cache of fixed capacity, which ``generate`` is not to compile by itself.
    """
    shape, seed = (settings.batch, settings.prompt), torch.Generator().manual_seed(5)
    ids = torch.randint(3, 90, shape, generator=seed)
    config = transformers.GenerationConfig(
        max_new_tokens=settings.steps, do_sample=False, use_cache=True, pad_token_id=0,
        decoder_start_token_id=1, guidance_scale=1.0, num_return_sequences=1,
        output_logits=True, return_dict_in_generate=True, disable_compile=True,
        cache_implementation="static" if static else None,
    )  # fmt: skip
    torch.manual_seed(0)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    logits = torch.stack(output.logits, dim=1).float()
    tokens = output.sequences.reshape(len(ids), -1)[:, -settings.steps :]
    return Run(tokens, logits, output.get("past_key_values"))


def compare(actual: Run, expected: Run) -> dict[str, Any]:
    """Relative error of the logits up to and with the first token that differs."""
    differs = (actual.tokens != expected.tokens).any(0).nonzero()
    same = int(differs[0]) if len(differs) else actual.tokens.shape[1]
    got, wanted = (run.logits[:, : same + 1] for run in (actual, expected))
    finite = wanted.isfinite()  # some models mask their vocabulary with -inf
    error = (got - wanted)[finite].norm() / wanted[finite].norm()
    good = bool(error <= TOLERANCE) and bool((got.isfinite() == finite).all())
    return {"status": "ok" if good else "differs", "error": float(error), "same_tokens": same}


def count_sites(cache: Any, prompt: int) -> dict[str, list[str]]:
    """The layers that have grown beyond ``prompt`` tokens, and those that slide.

    Counted in the eager model's cache: independent of what the passes find.
    """
    found: dict[str, list[str]] = {"growing": [], "sliding": []}
    for name, layer in cache_layers(cache).items():
        keys = layer.keys if isinstance(layer, DynamicLayer) else None
        if not isinstance(keys, Tensor) or keys.dim() != 4:
            continue
        if layer.is_sliding:
            found["sliding"].append(name)
        elif keys.shape[2] > prompt:
            found["growing"].append(name)
    return found


def static_sites(cache: Any, prompt: int) -> list[str]:
    """The layers with a fixed capacity that have more than ``prompt`` tokens."""
    return [
        name
        for name, layer in cache_layers(cache).items()
        if isinstance(layer, StaticLayer) and layer.is_initialized
        and layer.keys.dim() == 4 and int(layer.get_seq_length()) > prompt
    ]  # fmt: skip


def compressed_layers(cache: Any) -> list[str]:
    """The layers that store pruned keys."""
    return [
        name
        for name, layer in cache_layers(cache).items()
        if isinstance(getattr(layer, "keys", None), PrunedKeys)
        and isinstance(layer.values, StoredValues)
    ]


def refusals(report: Report) -> dict[str, int]:
    """Reasons, with the number of modules whose sites were refused or of graphs.

    Those are graphs that were left alone, and those without a site that end at a graph break: an
    attention may be on both sides of it.
    """
    found = {(site.refusal.reason, site.layer) for graph in report.graphs for site in graph.sites
             if site.refusal is not None}  # fmt: skip
    counts = Counter(reason for reason, _ in found)
    counts.update(graph.left_alone for graph in report.graphs if graph.left_alone is not None)
    counts.update(_broken(graph.graph_break) for graph in report.graphs
                  if graph.graph_break is not None and not graph.sites)  # fmt: skip
    return dict(sorted(counts.items()))


def _broken(graph_break: str) -> str:
    """What ``GraphReport.graph_break`` says, without the folders of the file."""
    what, _, place = graph_break.rpartition(" at ")
    return f"graph break: {what} at {Path(place).name}"


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of ``work`` or its exception, and the seconds it took."""
    torch._dynamo.reset()
    start_s = time.perf_counter()
    try:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            result = work()
    except Exception as error:
        last = "".join(traceback.format_exception(error)).strip().splitlines()[-14:]
        result = {"status": "crash", "crash": first_line(error), "traceback": last}
    return {**result, "seconds": round(time.perf_counter() - start_s, 2)}


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


class Case:
    """One architecture with one implementation of attention."""

    def __init__(self, model: Any, settings: Settings) -> None:
        self._model, self._settings = model, settings
        self._eager = generate(model, settings)
        other = settings.other()
        self._again = None if other is None else (other, generate(model, other))
        self.sites = count_sites(self._eager.cache, settings.prompt)
        self._static: Run | None = None
        try:
            self._static = generate(model, settings, static=True)
        except Exception as error:
            self.sites["static"], self.not_static = [], first_line(error)
        else:
            self.sites["static"] = static_sites(self._static.cache, settings.prompt)
            self.not_static = "" if self.sites["static"] else "no layer is static"
            if compare(self._static, self._eager)["status"] != "ok":
                self.sites["static"], self.not_static = [], "eager results are not the usual ones"

    def rows(self) -> dict[str, Any]:
        """Every comparison, and what was rewritten."""
        row: dict[str, Any] = {"sites": self.sites}
        row["pruned"] = pruned = attempt(lambda: self.spark(self._settings.key_ratio))
        # With nothing compressed the ratio makes no difference.
        same = pruned["status"] == "ok" and not pruned["compressed"]
        row["exact"] = pruned if same else attempt(lambda: self.spark(0.0))
        if row["exact"]["status"] != "ok" or pruned["status"] != "ok":
            row["plain"] = attempt(lambda: self.plain(self._eager))
        if self.not_static or self._static is None:
            return {**row, "not_static": self.not_static}
        row["static"], expected = attempt(self.static), self._static
        if row["static"]["status"] != "ok":
            row["plain_static"] = attempt(lambda: self.plain(expected, static=True))
        return row

    def plain(self, expected: Run, static: bool = False) -> dict[str, Any]:
        """Compare plain ``torch.compile`` with eager."""
        model = copy.deepcopy(self._model)
        model.compile(backend=self._settings.inner)
        return compare(generate(model, self._settings, static), expected)

    def static(self) -> dict[str, Any]:
        """Compare spark at ratio 0 with eager, both over a static cache."""
        assert self._static is not None, self.not_static
        options = {"key_ratio": 0.0, "window": self._settings.window}
        model = copy.deepcopy(self._model)
        model = spark_compile.optimize(model, inner=self._settings.inner, **options)
        with collect_report() as report, warnings.catch_warnings(action="ignore"):
            run = generate(model, self._settings, static=True)
        facts = {"compressed": compressed_layers(run.cache), "refusals": refusals(report)}
        return {**facts, **compare(run, self._static)}

    def spark(self, key_ratio: float) -> dict[str, Any]:
        """Compare spark at a ratio with what it must equal, and report what it rewrote."""
        settings = self._settings
        options = {"key_ratio": key_ratio, "window": settings.window, "inner": settings.inner}
        model = spark_compile.optimize(copy.deepcopy(self._model), **options)
        with collect_report() as report, warnings.catch_warnings(action="ignore"):
            run = generate(model, settings)
        layers = compressed_layers(run.cache)
        facts = {
            "compressed": layers, "graphs": len(report.graphs), "refusals": refusals(report),
            "sites": [len(graph.sites) for graph in report.graphs],
        }  # fmt: skip
        if not layers:
            found = compare(run, self._eager)
            # At ratio 0 nothing would be lost by it.
            rewritten = key_ratio and any(graph.rewritten for graph in report.graphs)
            if found["status"] != "ok" and rewritten:
                found["status"] = "given up"
            return {**facts, **found}
        if not key_ratio:
            again = self._other_sizes(model, layers)
            return {**facts, **compare(run, self._eager), **again}
        return {**facts, **self._simulated(SparkConfig(**options), layers, run)}

    def _other_sizes(self, model: Any, layers: list[str]) -> dict[str, Any]:
        """What is wrong at another batch size and length, if anything is."""
        if self._again is None:
            return {}
        settings, expected = self._again
        with warnings.catch_warnings(action="ignore"):
            run = generate(model, settings)
        again, found = compressed_layers(run.cache), compare(run, expected)
        if again != layers:
            return {"status": "left alone", "again": again}
        return found if found["status"] != "ok" else {}

    def _simulated(self, config: SparkConfig, layers: list[str], run: Run) -> dict[str, Any]:
        """Compare with the method simulated on the eager model."""
        with Simulated(config, layers) as simulated:
            expected = generate(self._model, self._settings)
        if simulated.lost():
            return {"status": "no oracle", "lost": simulated.lost()}
        return {**compare(run, expected), "effect": compare(expected, self._eager)["error"]}


def run_architecture(name: str, settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each implementation of attention with its row, or with why there is none."""
    yield "class", {"class": class_name(name)}
    for attention in ATTENTIONS:
        try:
            model = tiny_model(name, attention)
        except Exception as error:
            unsupported = "does not support an attention implementation" in str(error)
            why = {} if unsupported else {"not_built": first_line(error)}
            yield attention, {"supported": not unsupported, **why}
            continue
        yield attention, {"supported": True, **case_row(model, settings)}


def case_row(model: Any, settings: Settings) -> dict[str, Any]:
    """The row of a model, or why it does not generate eagerly."""
    try:
        case = Case(model, settings)
    except Exception as error:
        last = "".join(traceback.format_exception(error)).strip().splitlines()[-8:]
        return {"not_run": first_line(error), "traceback": last}
    return case.rows()
