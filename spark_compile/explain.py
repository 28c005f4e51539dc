"""What the backend would do to a model, without its weights and by default without compiling."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import SymInt, Tensor, fx, nn

from .backend import compile_graph, inner_compiler
from .config import SparkConfig
from .report import Report, SparkWarning, collect_report
from .torch_private import fresh_inductor_cache
from .transformers_names import cache_argument, returned_cache


def explain(
    model: nn.Module, inputs: Mapping[str, Any], *, compile: bool = False, **options: Any
) -> Report:
    """Run the passes on a model and report every attention site.

    The model is traced with ``inputs`` and, if it returns a ``cache`` (``past_key_values`` before
    transformers 5.24), once more with the last token and that cache, so that prefill and decode
    are both reported.

    Args:
        model: a decoder; its weights may be on the meta device.
        inputs: keyword arguments of its forward; tensors may be on the meta device.
        compile: also compile with ``inner`` and run, so that the report has the share of the
            compile time that the passes take. Weights on the meta device are then zeros.
        options: fields of :class:`SparkConfig`; ``inner`` is ignored unless ``compile`` is set.

    Raises:
        OptionError: an option is wrong, which is a SparkError and a ValueError.
        SparkError: under ``strict=True``, as compiling would.
    """
    config = SparkConfig.from_options(options)

    def backend(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        inner = inner_compiler(config, None) if compile else _allocate_outputs
        return compile_graph(module, example_inputs, config, inner)

    compiled = torch.compile(model, backend=backend)
    call = {name: _off_meta(value) for name, value in inputs.items()}
    if "use_cache" in inspect.signature(model.forward).parameters:
        call.setdefault("use_cache", True)
    quiet = warnings.catch_warnings(action="ignore", category=SparkWarning)  # the report says it
    # Without it a graph that Inductor has compiled before would be loaded from the cache.
    cache = fresh_inductor_cache() if compile else nullcontext()
    with _weights_off_meta(model), torch.no_grad(), quiet, cache, collect_report() as report:
        output = compiled(**call)
        past = returned_cache(output)
        if past is not None and "input_ids" in call:
            last = call["input_ids"][:, -1:]
            compiled(input_ids=last, use_cache=True, **{cache_argument(model.forward): past})
    if not compile:
        report.graphs = [dataclasses.replace(graph, compile_ms=None) for graph in report.graphs]
    return report


def _allocate_outputs(module: fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
    """An inner compiler whose graphs return zeros of the right shapes and compute nothing."""
    values = [
        node.meta.get("val", node.meta.get("example_value")) if isinstance(node, fx.Node) else node
        for node in module.graph.output_node().args[0]  # type: ignore[union-attr]
    ]
    return lambda *_args: [_zeros_like(value) for value in values]


def _zeros_like(value: Any) -> Any:
    if isinstance(value, Tensor):
        sizes = [_hint(size) for size in value.shape]
        return torch.zeros(sizes, dtype=value.dtype, device=value.device)
    return _hint(value)


def _hint(value: Any) -> Any:
    """The size that a symbol has in this call, without a guard."""
    return value.node.hint if isinstance(value, SymInt) else value


def _off_meta(value: Any) -> Any:
    """A meta tensor as one CPU element seen through zero strides: Dynamo needs real tensors."""
    if not isinstance(value, Tensor) or not value.is_meta:
        return value
    return torch.zeros((), dtype=value.dtype).expand(value.shape)


@contextmanager
def _weights_off_meta(model: nn.Module) -> Iterator[None]:
    """Stand-ins for a model's meta parameters and buffers inside the ``with`` block."""
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    stores: list[dict[str, Any]]
    for module in model.modules():
        stores = [module._parameters, module._buffers]
        for tensors in stores:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    replaced.append((tensors, name, tensor))
                    stand_in = _off_meta(tensor.detach())
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(stand_in, False) if is_parameter else stand_in
    try:
        yield
    finally:
        for tensors, name, tensor in replaced:
            tensors[name] = tensor
