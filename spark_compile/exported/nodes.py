"""Questions to the nodes of a graph that is to be drawn."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from ..passes.find_attention import layer_name
from ..torch_private import OpOverload

VIEWS = frozenset({
    "_conj", "_reshape_alias", "_to_copy", "_unsafe_view", "alias", "chunk", "clone", "contiguous",
    "detach", "dropout", "expand", "expand_as", "flatten", "getitem", "lift_fresh_copy", "narrow",
    "permute", "repeat_interleave", "reshape", "select", "slice", "split", "split_with_sizes",
    "squeeze", "t", "to", "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as",
})  # fmt: skip
"""Operators that only pass on what they read, in a model that does not train."""
PRODUCTS = frozenset({
    "_scaled_mm", "addmm", "baddbmm", "bmm", "einsum", "linear", "matmul", "mm",
})  # fmt: skip
_SHORT = {"scaled_dot_product_attention": "sdpa", "_softmax": "softmax", "_safe_softmax": "softmax"}


def nodes_of(graph: fx.Graph, layer: str) -> set[fx.Node]:
    """The nodes of a module, or of the one around it if it has no projections.

    With them those that passes have inserted there, which are of no module.
    """
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    inside: set[fx.Node] = set()
    for path in (layer, layer.rpartition(".")[0]):
        inside = (
            {node for node in nodes if f"{module_of(node)}.".startswith(f"{path}.")}
            if path
            else set()
        )
        if any(operator(node) in ("linear", "addmm", "mm") for node in inside):
            break
    for node in nodes:
        if not module_of(node) and any(operand in inside for operand in node.all_input_nodes):
            inside.add(node)
    for node in reversed(nodes):
        if is_spark(node) and node.users and all(user in inside for user in node.users):
            inside.add(node)
    return inside


def module_of(node: fx.Node) -> str:
    """The module path that a node was traced in, empty if there is none."""
    name = layer_name(node)
    return "" if name == node.name else name


def operator(node: fx.Node) -> str:
    """The operator's name without its namespace and overload."""
    target = node.target
    if isinstance(target, OpOverload):
        return str(target.overloadpacket.__name__)
    return getattr(target, "__name__", str(target))


def short_name(node: fx.Node) -> str:
    name = operator(node)
    name = f"spark.{name}" if is_spark(node) else _SHORT.get(name, name)
    return name if name.endswith("__") else name.rstrip("_")


def is_spark(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.namespace == "spark"


def wanted_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose values are for more than a check or a size."""
    wanted: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        is_end = node.op == "output" or is_spark(node) or operator(node) == "copy_"
        if is_end or (is_tensor(node) and any(user in wanted for user in node.users)):
            wanted.add(node)
    return wanted


def origin_of(node: fx.Node) -> fx.Node:
    """The value that a node is a view of, or the input that a position is computed from."""
    while node.op == "call_function" and (operands := passed_on(node)):
        others = (each for each in operands[1:] if origin_of(each).op == "placeholder")
        node = next(others, operands[0])
    return node


def passed_on(node: fx.Node) -> list[fx.Node]:
    """The tensors that reach a node's readers through it; none if it is shown itself."""
    if is_position(node) or operator(node) in VIEWS:
        return [operand for operand in node.all_input_nodes if is_tensor(operand)]
    return []


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor | tuple | list)


def is_position(node: fx.Node) -> bool:
    """Whether a node is arithmetic of positions, which is part of arrows as views are."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)


def readers_of(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads a value, through views."""
    for user in node.users:
        if user.op == "call_function" and passed_on(user):
            yield from readers_of(user)
        else:
            yield user


def argument_name(reader: fx.Node, operand: fx.Node) -> str:
    """What the operator that reads a value calls it."""
    if isinstance(reader.target, OpOverload):
        for argument, value in zip(reader.target._schema.arguments, reader.args, strict=False):
            if value is operand:
                return str(argument.name)
    return short_name(operand)


def writes_into(reader: fx.Node, operand: fx.Node) -> bool:
    """Whether an operator changes one of its operands."""
    if not isinstance(reader.target, OpOverload):
        return False
    arguments = zip(reader.target._schema.arguments, reader.args, strict=False)
    return any(
        value is operand and argument.alias_info is not None and argument.alias_info.is_write
        for argument, value in arguments
    )
