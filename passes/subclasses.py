"""Inputs that are tensor subclasses, such as quantized weights, as the plain tensors in them.

A graph gets what a subclass flattens to. Pre-dispatch tracing asks no subclass what an operator
does with it; so each operator on one is traced on its own, where the subclass is asked, and
inserted as plain ATen. Compressed states, which are subclasses too, are not meant here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from ..state import SparkTensor
from ..torch_private import (
    enter_autocast,
    exit_autocast,
    is_traceable_wrapper_subclass,
    make_fx,
    tree_leaves,
    tree_map,
)
from .vmap import insert


def is_wrapper(value: object) -> bool:
    """Whether a value is a subclass that can be flattened, and no compressed state."""
    return is_traceable_wrapper_subclass(value) and not isinstance(value, SparkTensor)


def wrappers(values: Sequence[Any]) -> tuple[int, ...]:
    """Where such subclasses are among the inputs of a graph."""
    return tuple(index for index, value in enumerate(values) if is_wrapper(value))


def flattened(values: Sequence[Any], positions: Iterable[int]) -> list[Any]:
    """The values, with the plain tensors inside in place of each subclass at ``positions``."""
    flat: list[Any] = []
    start = 0
    for position in positions:
        flat.extend(values[start:position])
        flat.extend(_plain(values[position]))
        start = position + 1
    return [*flat, *values[start:]]


def _plain(value: Any) -> Iterator[Tensor]:
    """The plain tensors in a subclass, or the tensor itself; subclasses may be nested."""
    if not is_wrapper(value):
        yield value
        return
    for name in value.__tensor_flatten__()[0]:
        yield from _plain(getattr(value, name))


@dataclass(frozen=True)
class _Flat:
    """A value of the graph with subclasses in it, and the nodes of the plain tensors in those."""

    like: Any
    parts: tuple[Any, ...]

    def rebuilt(self, parts: Iterator[Any]) -> Any:
        return tree_map(lambda leaf: _rebuilt(leaf, parts), self.like)


def without_subclasses(module: fx.GraphModule, positions: Sequence[int]) -> fx.GraphModule:
    """The module itself, or a copy that takes its inputs at ``positions`` flattened.

    Args:
        module: Dynamo's graph.
        positions: of the inputs that are subclasses.

    Raises:
        NotImplementedError: the graph returns a subclass.
    """
    if not positions:
        return module
    module = fx.GraphModule(module, copy.deepcopy(module.graph))
    placeholders = module.graph.find_nodes(op="placeholder")
    flat: dict[fx.Node, _Flat] = {}
    for position in positions:
        whole = placeholders[position]
        value = whole.meta["example_value"]
        with module.graph.inserting_before(whole):
            parts = tuple(
                _placeholder(module.graph, f"{whole.name}_part{number}", part)
                for number, part in enumerate(_plain(value))
            )
        flat[whole] = _Flat(value, parts)
    done = [*flat]
    autocasts: dict[fx.Node, Any] = {}
    try:
        for node in list(module.graph.nodes):
            if node.target is enter_autocast:
                autocasts[node] = enter_autocast(*node.args)
            elif node.target is exit_autocast:
                exit_autocast(autocasts.pop(node.args[0]))
            elif not flat.keys().isdisjoint(node.all_input_nodes):
                if node.op == "output":
                    raise NotImplementedError("the graph returns a tensor subclass")
                _trace(module, node, flat)
                done.append(node)
    finally:
        for entered in reversed(autocasts.values()):
            exit_autocast(entered)
    for node in reversed(done):
        module.graph.erase_node(node)
    module.recompile()
    return module


def _placeholder(graph: fx.Graph, name: str, part: Tensor) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["example_value"] = part
    return node


def _trace(module: fx.GraphModule, node: fx.Node, flat: dict[fx.Node, _Flat]) -> None:
    """Hand the uses of an operator on subclasses to what it computes with the tensors in them."""
    operands = node.all_input_nodes
    inputs = [part for o in operands for part in (flat[o].parts if o in flat else (o,))]

    def compute(*plain: Any) -> list[Any]:
        left = iter(plain)
        values = {o: flat[o].rebuilt(left) if o in flat else next(left) for o in operands}
        result = _call(node, values)
        return [part for leaf in tree_leaves(result) for part in _plain(leaf)]

    examples = [part.meta["example_value"] for part in inputs]
    traced = make_fx(compute, _allow_non_fake_inputs=True)(*examples)
    results = insert(module, traced, inputs, node, f"_subclass_{node.name}")
    value = node.meta["example_value"]
    parts = (part for leaf in tree_leaves(value) for part in _plain(leaf))
    for result, part in zip(results, parts, strict=True):
        if isinstance(result, fx.Node):
            result.meta["example_value"] = part
    if isinstance(value, Tensor) and not is_wrapper(value):
        node.replace_all_uses_with(results[0])
    else:
        flat[node] = _Flat(value, results)


def _call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    raise NotImplementedError(f"{node.op} of {node.target} on a tensor subclass")


def _rebuilt(like: Any, parts: Iterator[Any]) -> Any:
    if not is_wrapper(like):
        return next(parts)
    names, context = like.__tensor_flatten__()
    inner = {name: _rebuilt(getattr(like, name), parts) for name in names}
    return type(like).__tensor_unflatten__(inner, context, like.size(), like.stride())
