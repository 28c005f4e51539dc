"""Reachability between nodes, by networkx, and small edits of a graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import networkx as nx
import torch
from torch import fx

from ..torch_private import disable_fake_tensor_cache, make_fx, statically_known_true
from .program import Program


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the output or a side effect needs; passes keep dead alternatives in the graph."""
    live = {node for node in graph.nodes if node.op == "output" or has_effect(node)}
    stack = list(live)
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in live:
                live.add(operand)
                stack.append(operand)
    return live


def has_effect(node: fx.Node) -> bool:
    """Whether a node does more than compute its value.

    Random operators do not count, as they do for fx: scaled_dot_product_attention is tagged as
    one, and has to be removed once it has no reader.
    """
    return node.is_impure(impure_random=False)


def readers_inside(start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """Nodes outside the region from ``start`` to ``end`` that read a value inside it.

    The region is every node on a path from ``start`` to ``end``; the value of ``end`` itself may
    have any readers. An empty answer means that the region is convex and can be replaced.
    """
    if start is end:
        return []
    flow: nx.DiGraph[fx.Node] = nx.DiGraph()
    stack = [end]
    while stack:  # backwards from the end, no further than the start's own depth
        node = stack.pop()
        for operand in node.all_input_nodes:
            if operand not in flow and operand >= start:
                stack.append(operand)
            flow.add_edge(operand, node)
    region = nx.descendants(flow, start) | {start}
    return [user for node in region - {end} for user in node.users if user not in region]


def value_of(argument: Any) -> Any:
    """The fake value of a node, or the argument itself where it is a constant."""
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def call(
    program: Program, target: Callable[..., Any], args: tuple[Any, ...], **kwargs: Any
) -> fx.Node:
    """Add a call at the graph's insertion point and compute its fake value."""
    node = program.graph.call_function(target, args, kwargs)
    node.meta["val"] = fake_value(program, node)
    return node


def fake_value(program: Program, node: fx.Node) -> Any:
    """The result of a call's target on the fake values of its operands."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    # Every state has symbols of its own: hashing them takes long, and no entry ever matches.
    cache = disable_fake_tensor_cache(program.fake_mode) if program.states else nullcontext()
    with cache, program.fake_mode, torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def inline(
    program: Program, function: Callable[..., Any], args: tuple[fx.Node, ...], *options: Any
) -> tuple[fx.Node, ...]:
    """Trace ``function(*values of args, *options)`` and add its operators to the graph.

    Layers are alike: a trace is reused for every layer whose tensors have the same metadata.
    """
    values = [value_of(arg) for arg in args]
    looks = [(str(v.shape), str(v.stride()), v.dtype, v.device) for v in values]
    key = (function, *options, *looks)
    if key not in program.traced:
        traced = make_fx(lambda *tensors: function(*tensors, *options), pre_dispatch=True)(*values)
        traced.graph.eliminate_dead_code()
        program.traced[key] = traced.graph
    graph = program.traced[key]
    mapping = dict(zip(graph.find_nodes(op="placeholder"), args, strict=True))
    result = program.graph.graph_copy(graph, mapping)
    return result if isinstance(result, tuple) else (result,)


def same_size(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two shapes are equal for every value of their symbols."""
    return len(left.shape) == len(right.shape) and all(
        statically_known_true(a == b) for a, b in zip(left.shape, right.shape, strict=True)
    )
