"""Families of ATen operators, and small predicates and accessors for nodes."""

from __future__ import annotations

import operator
import sys
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx

from ..report import Refusal
from .dataflow import same_size

_aten = torch.ops.aten

COPIES = {_aten.clone.default, _aten.contiguous.default}
"""Operators that change nothing but strides."""
RESHAPES = {
    _aten.reshape.default,
    _aten.expand.default,
    _aten.slice.Tensor,
    _aten.flatten.using_ints,
    _aten.unflatten.int,
}
"""Operators that are the identity where input and output have the same shape."""
VIEWS = (RESHAPES - {_aten.slice.Tensor, _aten.expand.default}) | {
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
}
"""Operators that keep the elements and their order."""
CASTS = {_aten._to_copy.default, _aten.to.dtype, _aten.type_as.default}
PRODUCTS = {_aten.matmul.default, _aten.bmm.default, _aten.baddbmm.default}
LIKE_PRODUCTS = PRODUCTS | {_aten.einsum.default}
"""Products by which an attention is told from another softmax; not all of them can be bound."""
MOVES = COPIES | RESHAPES | {
    _aten.cat.default, _aten.stack.default, _aten.permute.default, _aten.transpose.int,
    _aten.index_select.default,
    _aten.index.Tensor, _aten.select.int, _aten.unsqueeze.default, _aten.squeeze.dim,
    _aten.narrow.default, _aten.gather.default, _aten.flip.default, _aten.roll.default,
    _aten.repeat_interleave.self_int, _aten.repeat.default, _aten.split.Tensor,
    _aten.split_with_sizes.default, _aten.chunk.default, operator.getitem,
}  # fmt: skip
"""Operators that move values without changing them."""
SOFTMAXES = {_aten.softmax.int, _aten._softmax.default, _aten._safe_softmax.default}
WRITES = {
    _aten.index_copy.default, _aten.index_put.default, _aten.slice_scatter.default,
    _aten.select_scatter.default, _aten.scatter.src, _aten.masked_scatter.default,
    _aten.copy.default, _aten.copy_.default,
}  # fmt: skip
"""Functional forms of writing into a part of a buffer, and the copy into the buffer itself."""


class Refused(Exception):
    """An attention that is left as it was."""

    def __init__(self, reason: str, node: fx.Node) -> None:
        super().__init__(reason)
        self.refusal = Refusal(reason, node.name)


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an ATen call by its schema name, the default where it was not given."""
    for position, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if parameter.name == name:
            if position < len(node.args) and not parameter.kwarg_only:
                return node.args[position]
            return node.kwargs.get(name, parameter.default_value)
    raise KeyError(f"{node.target} has no argument {name!r}")


def is_open_ended(node: fx.Node) -> bool:
    """Whether a slice goes to the end of its operand, whatever its size."""
    end = argument(node, "end")
    return end is None or (isinstance(end, int) and end >= sys.maxsize)


def tensor(node: fx.Node) -> torch.Tensor:
    """A node's fake tensor."""
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value


def rank(node: fx.Node) -> int:
    return tensor(node).dim()


def source(node: fx.Node) -> fx.Node:
    """The node that copies, and reshapes that keep the shape, were applied to."""
    while node.op == "call_function":
        keeps = node.target in COPIES or (
            node.target in RESHAPES and same_size(tensor(node), tensor(node.args[0]))  # type: ignore[arg-type]
        )
        if not keeps:
            break
        node = node.args[0]  # type: ignore[assignment]
    return node


def behind_cast(node: fx.Node) -> fx.Node:
    """The node that conversions of the dtype, and what ``source`` skips, were applied to."""
    node = source(node)
    while node.target in CASTS and tensor(node).is_floating_point():
        node = source(node.args[0])  # type: ignore[arg-type]
    return node


def moved_from(node: fx.Node, origins: Collection[fx.Node]) -> bool:
    """Whether a value consists of values of one of ``origins``, moved but not changed."""
    return any(source in origins for source in moved(node))


def moved(node: fx.Node, forwards: bool = False) -> Iterator[fx.Node]:
    """The node, and those whose values it holds; ``forwards`` those that hold values of it."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        yield current
        if forwards:
            stack += [user for user in current.users if user.target in MOVES]
        elif current.target in MOVES:
            stack += current.all_input_nodes
