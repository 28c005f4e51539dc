"""Processes that run one model together over gloo, and what they do in tests.

A process takes seconds to start, so that one set of them does everything, in order.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers as t
from compiled import EXACT, is_compressed
from decoders import VOCABULARY, Decoder, SdpaMasked, decode
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from zoo import CACHE, tiny

import spark_compile
from spark_compile.report import OptionError, collect_report

ARGUMENTS = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
IDS = torch.arange(1, 21).reshape(1, 20)
TOKENS = torch.arange(13).reshape(1, 13) % VOCABULARY
STEPS = 8
PLAN = {"query": ColwiseParallel, "key": ColwiseParallel, "value": ColwiseParallel,
        "out": RowwiseParallel}  # fmt: skip

Found = dict[str, Any]
Scenarios = dict[str, tuple[Callable[..., Found], *tuple[Any, ...]]]
"""Functions of this file and their arguments, by any names."""


def run(scenarios: Scenarios, ranks: int, folder: Path) -> list[dict[str, Found]]:
    """Start processes; what the functions returned, by rank and name."""
    torch.multiprocessing.spawn(_run, (scenarios, ranks, folder), ranks)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(ranks)]


def _run(rank: int, scenarios: Scenarios, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    # transformers asks the environment, as torchrun sets it.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    dist.init_process_group(
        "gloo", f"file://{folder}/store", timedelta(seconds=60), world_size=ranks, rank=rank
    )
    found = {name: call(*arguments) for name, (call, *arguments) in scenarios.items()}
    torch.save(found, folder / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def planned(path: str, options: dict[str, Any] | None = None, plan: Any = "auto") -> Found:
    """A model of transformers, sharded by its own plan, or with rules in place of some of that."""
    model = _sharded(path, plan)
    spark_compile.optimize(model, strict=True, **EXACT | (options or {}))
    return _generated(model, ARGUMENTS)


def planned_eagerly(path: str) -> Found:
    """A model of transformers, sharded by its own plan and not compiled."""
    try:
        _sharded(path, "auto").generate(IDS, **ARGUMENTS)
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": ""}


def _sharded(path: str, plan: Any) -> Any:
    config = t.distributed.DistributedConfig(tp_plan=plan)
    return t.AutoModelForCausalLM.from_pretrained(path, distributed_config=config).eval()


def spread(name: str, arguments: dict[str, Any], options: dict[str, Any] | None = None) -> Found:
    """A tiny model of transformers with one layer, its tokens spread over all ranks."""
    options = {"strict": True, **EXACT, "context_parallel": dist.group.WORLD, **(options or {})}
    torch._dynamo.reset()
    return _generated(spark_compile.optimize(tiny(name, "sdpa", 1), **options), arguments)


def spread_by_hand() -> Found:
    """A decoder by hand, its tokens spread over all ranks, which a mesh is of."""
    torch.manual_seed(0)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    model = spark_compile.optimize(
        Decoder(SdpaMasked, layers=1).eval().requires_grad_(False), strict=True,
        context_parallel=mesh, **EXACT,
    )  # fmt: skip
    logits, past = decode(copy.deepcopy(model), TOKENS, None, STEPS)
    return {"logits": logits, "compressed": is_compressed(past)}


def spread_told_otherwise() -> Found:
    """Each rank is told another ratio."""
    options = {**EXACT, "key_ratio": dist.get_rank() / 4, "context_parallel": dist.group.WORLD}
    try:
        spark_compile.optimize(tiny("llama", "sdpa", 1), **options).generate(IDS, **ARGUMENTS)
    except OptionError as error:
        return {"error": str(error)}
    return {"error": ""}


def _generated(model: Any, arguments: dict[str, Any]) -> Found:
    with collect_report() as report:
        output = model.generate(**{"inputs": IDS, "return_dict_in_generate": True, **arguments})
    cache = output[CACHE]
    keys = cache.layers[0].keys
    compressed = is_compressed([(layer.keys, layer.values) for layer in cache.layers])
    return {
        **_of(report),
        "tokens": output.sequences,
        "compressed": compressed,
        "bytes": spark_compile.kv_bytes(cache),
        "shape": tuple(keys.shape),
        "ranks": keys.form.ranks if compressed else None,
        "stored": keys.form.own(keys.tokens) if compressed else None,
    }


def parallelized(selects: bool = False, spread_over: int = 1) -> Found:
    """A decoder by hand, parallelized by hand.

    Args:
        selects: whether each rank has all keys and values and takes those of its own queries.
        spread_over: number of ranks that tokens are spread over; over the others heads are.
    """
    shape = (spread_over, dist.get_world_size() // spread_over)
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("cp", "tp"))
    model = _parallelized(SelectsHeads if selects else SdpaMasked, mesh["tp"])
    options = {**EXACT, "strict": True, "context_parallel": mesh["cp"]}
    compiled = torch.compile(model, backend="spark", options=options)
    with collect_report() as report:
        logits, past = decode(compiled, TOKENS, None, STEPS)
    return {
        **_of(report),
        "logits": logits,
        "compressed": is_compressed(past),
        "shape": tuple(past[0][0].shape),
    }


def told_otherwise() -> Found:
    """Each rank is told another ratio."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = _parallelized(SelectsHeads, mesh)
    options = {**EXACT, "key_ratio": dist.get_rank() / 4}
    try:
        decode(torch.compile(model, backend="spark", options=options), TOKENS, None, 1)
    except OptionError as error:
        return {"error": str(error)}
    return {"error": ""}


class SelectsHeads(SdpaMasked):
    """The key head of this rank's queries, of all key heads, is cached."""

    def project(self, x_BLE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().project(x_BLE)
        head = dist.get_rank() * key.shape[1] // dist.get_world_size()
        return query, key[:, head : head + 1], value[:, head : head + 1]


def _parallelized(kind: type[SdpaMasked], mesh: DeviceMesh) -> nn.Module:
    torch.manual_seed(0)
    model = Decoder(kind, layers=1).eval().requires_grad_(False)
    for attention in [module for module in model.modules() if isinstance(module, SdpaMasked)]:
        names = ("query", "out") if kind is SelectsHeads else tuple(PLAN)
        parallelize_module(attention, mesh, {name: PLAN[name]() for name in names})
        attention.heads //= mesh.size()
        if kind is not SelectsHeads:
            attention.kv_heads //= mesh.size()
    return model


def _of(report: Any) -> Found:
    return {
        "phases": [graph.phase for graph in report.graphs],
        "breaks": [graph.graph_break for graph in report.graphs if graph.graph_break],
        "sites": [
            (site.query_heads, site.kv_heads, site.refusal and str(site.refusal))
            for graph in report.graphs
            for site in graph.sites
        ],
    }
