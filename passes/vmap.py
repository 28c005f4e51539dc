"""``torch.vmap`` in Dynamo's graph, replaced by what it computes.

Dynamo represents a vmap as calls that enter it, batch its inputs, and exit it. Pre-dispatch tracing
sees operators before vmap does, so such a region is traced on its own, with vmap applied, and
inserted as plain ATen.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import fx

from ..torch_private import make_fx, predispatch


def without_vmaps(module: fx.GraphModule) -> fx.GraphModule:
    """The module itself, or a copy in which every vmap is plain operators."""
    entered = module.graph.find_nodes(
        op="call_function", target=predispatch._vmap_increment_nesting, sort=False
    )
    if not entered:
        return module
    module = fx.GraphModule(module, copy.deepcopy(module.graph))
    for number, region in enumerate(list(_regions(module.graph))):
        _inline(module, region, f"_vmap_{number}")
    for node in module.graph.find_nodes(
        op="call_function", target=predispatch.lazy_load_decompositions
    ):
        module.graph.erase_node(node)
    module.recompile()
    return module


def _regions(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The nodes of each outermost vmap, from entry to exit."""
    region: list[fx.Node] = []
    depth = 0
    for node in graph.nodes:
        depth += node.target is predispatch._vmap_increment_nesting
        if depth:
            region.append(node)
        if node.target is predispatch._vmap_decrement_nesting:
            depth -= 1
            if not depth:
                yield region
                region = []


def _inline(module: fx.GraphModule, region: list[fx.Node], name: str) -> None:
    inside = set(region)
    inputs = list(
        dict.fromkeys(o for node in region for o in node.all_input_nodes if o not in inside)
    )
    outputs = [node for node in region if any(user not in inside for user in node.users)]
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in region:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    examples = [node.meta["example_value"] for node in inputs]
    traced = make_fx(fx.GraphModule(module, graph), _allow_non_fake_inputs=True)(*examples)
    results = insert(module, traced, inputs, region[0], name)
    for node, result in zip(outputs, results, strict=True):
        node.replace_all_uses_with(result)
    for node in reversed(region):
        module.graph.erase_node(node)


def insert(
    module: fx.GraphModule, traced: fx.GraphModule, inputs: list[fx.Node], at: fx.Node, name: str
) -> tuple[Any, ...]:
    """Add the operators of a traced graph to the graph of a module.

    Args:
        inputs: nodes of the module's graph, for the placeholders.
        at: the node before which they are inserted.
        name: of the module's attributes in which constants of the traced graph will be.

    Returns:
        The nodes of what the traced graph returns.
    """
    for node in traced.graph.find_nodes(op="get_attr"):
        attribute = f"{name}_{str(node.target).replace('.', '_')}"
        setattr(module, attribute, getattr(traced, str(node.target)))
        node.target = attribute
    placeholders = traced.graph.find_nodes(op="placeholder")
    with module.graph.inserting_before(at):
        results = module.graph.graph_copy(
            traced.graph, dict(zip(placeholders, inputs, strict=True))
        )
    return tuple(results)  # type: ignore[arg-type]
