"""What a decode step of a small model pays around its compiled graph.

    python -m benchmarks overhead --context 1024
    PYTHONPATH=<another checkout> python benchmarks/step_overhead.py

Of a decoder in SmolLM2-135M's shape with random weights: the time of Dynamo's guards, of the
backend's wrapper (handles, arguments, outputs) and of everything else outside the graph, and how
many tensors, guards and arguments there are to go through. Times are those of the one thread that
does the work, so that other processes disturb them little. It imports nothing of ``benchmarks`` and
of the backend only what every version has, so that versions can be compared in one sitting.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import transformers
import typer
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

import spark_compile
from spark_compile.runtime import SparkGraph


class Watch:
    """Sums up the time of calls, in ms of this thread."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self.ms = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start_s = time.thread_time()
        try:
            return self._call(*args, **kwargs)
        finally:
            self.ms += (time.thread_time() - start_s) * 1000


class Graphs:
    """Watches the graphs that the backend makes while this is entered."""

    def __init__(self) -> None:
        self.inside: list[Watch] = []
        self.programs: list[Any] = []
        self.whole = Watch(SparkGraph.__call__)

    def __enter__(self) -> Graphs:
        self._originals = SparkGraph.__init__, SparkGraph.running, SparkGraph.__call__
        make, run, _ = self._originals

        def init(graph: SparkGraph, program: Any, fakes: Any) -> None:
            self.programs.append(program)
            make(graph, program, fakes)

        def running(graph: SparkGraph, compiled: Any) -> SparkGraph:
            self.inside.append(Watch(compiled))
            return run(graph, self.inside[-1])

        SparkGraph.__init__ = init  # type: ignore[method-assign]
        SparkGraph.running = running  # type: ignore[method-assign]
        SparkGraph.__call__ = lambda *args: self.whole(*args)  # type: ignore[method-assign]
        return self

    def __exit__(self, *exception: object) -> None:
        make, run, call = self._originals
        SparkGraph.__init__, SparkGraph.running = make, run  # type: ignore[method-assign]
        SparkGraph.__call__ = call  # type: ignore[method-assign]

    def inside_ms(self) -> float:
        return sum(watch.ms for watch in self.inside)


def smollm2(layers: int, dtype: torch.dtype) -> Any:
    """The shape of SmolLM2-135M, but for a small vocabulary."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, vocab_size=1024, max_position_embeddings=8192,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def managers(manager: Any) -> Iterator[Any]:
    """A guard manager and all below it."""
    yield manager
    below = list(manager.get_child_managers())
    if hasattr(manager, "get_key_value_managers"):
        for pair in manager.get_key_value_managers().values():
            below += [child for child in pair if child is not None]
    for child in below:
        yield from managers(child)


def guards(step: Callable[..., Any], arguments: dict[str, Any]) -> tuple[float, int]:
    """Time in ms, and number, of the guards that a call with these arguments passes.

    Only once per step: Dynamo passes over what it has just found unchanged, so that a second check
    of the same arguments takes a fraction of what a step pays.
    """
    for entry in _debug_get_cache_entry_list(step):
        root = entry.guard_manager.root
        watch = Watch(root.check)
        if watch(arguments):
            count = sum(len(manager.get_leaf_guards()) for manager in managers(root))
            return watch.ms, count + len(root.get_epilogue_lambda_guards())
    raise RuntimeError("no graph was compiled for these arguments")


def most_arguments(program: Any) -> tuple[int, str]:
    """Arguments of the backend's largest operator in a graph, and its name."""
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    own = [target for target in targets if str(target).startswith("spark.")]
    return max((len(target._schema.arguments), str(target)) for target in own)


@dataclass(frozen=True)
class Options:
    """What is measured."""

    context: int = 1024
    steps: int = 40
    layers: int = 30
    inner: str = "eager"
    dtype: str = "bfloat16"
    key_ratio: float = 0.8
    stored: str = "model"


def measure(options: Options) -> dict[str, Any]:
    """The figures of one model at one context."""
    with Graphs() as watched:
        chosen = dataclasses.asdict(options)
        return {**chosen, "torch": torch.__version__, **_measure(options, watched)}


def _measure(options: Options, watched: Graphs) -> dict[str, Any]:
    model = smollm2(options.layers, getattr(torch, options.dtype))

    def step(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        # By position, where it is in every version of transformers; its name has changed.
        out = model(ids, None, None, cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    config = {"key_ratio": options.key_ratio, "inner": options.inner}
    config |= {"key_dtype": options.stored, "value_dtype": options.stored}
    compiled = torch.compile(step, backend="spark", options=config)
    cache = transformers.DynamicCache(config=model.config)
    ids = compiled(model, torch.randint(1024, (1, options.context)), cache)
    for _ in range(3):
        ids = compiled(model, ids, cache)
    whole_ms, wrapper_ms, outside_ms, guard_ms, count = [], [], [], [], 0
    for _ in range(options.steps):
        gc.collect()
        watched.whole.ms, before_ms = 0.0, watched.inside_ms()
        watch = Watch(compiled)
        ids = watch(model, ids, cache)
        inside_ms = watched.inside_ms() - before_ms
        whole_ms.append(watch.ms)
        wrapper_ms.append(watched.whole.ms - inside_ms)
        outside_ms.append(watch.ms - watched.whole.ms)
        found_ms, count = guards(step, {"model": model, "ids": ids, "cache": cache})
        guard_ms.append(found_ms)
    layer = cache.layers[0]
    arguments, name = most_arguments(watched.programs[-1])
    return {
        "backend": str(spark_compile.__file__),
        "graphs": len(watched.programs),
        "guards": count,
        "guards_ms": statistics.median(guard_ms),
        "wrapper_ms": statistics.median(wrapper_ms),
        "wrapper_mean_ms": statistics.fmean(wrapper_ms),
        "outside_ms": statistics.median(outside_ms),
        "step_ms": statistics.median(whole_ms),
        "tensors_per_layer": len(layer.keys.stored()) + len(layer.values.stored()),
        "graph_inputs": len(watched.programs[-1].graph.find_nodes(op="placeholder")),
        "most_arguments": arguments,
        "largest_operator": name,
    }


def main(
    context: int = Options.context,
    steps: Annotated[int, typer.Option(help="measured; at least one packs")] = Options.steps,
    layers: int = Options.layers,
    inner: str = Options.inner,
    dtype: str = Options.dtype,
    key_ratio: float = Options.key_ratio,
    stored: Annotated[str, typer.Option(help="model or int8: keys and values")] = Options.stored,
) -> None:
    """Print, as JSON, what a step pays around its graph."""
    torch.set_num_threads(1)
    options = Options(context, steps, layers, inner, dtype, key_ratio, stored)
    with torch.no_grad():
        print(json.dumps(measure(options), indent=1))


if __name__ == "__main__":  # a file of another version is run by itself
    typer.run(main)
