"""Reduce ATen variants to a few forms, without changing a value.

- assertions on metadata are removed: fake shapes prove them, and as readers they would keep a
  rewritten value alive
- operators without effect are removed: ``alias``, ``detach``, ``lift_fresh_copy``, dropout that is
  off, and slices of a whole dimension, which ``x[:, :, -8:]`` has where a size is not constant
- a write over all of a tensor is what is written
- ``view`` becomes ``reshape``: a rewritten value may have other strides than the model's own
- ``concat`` and ``concatenate`` become ``cat``
- ``einsum`` of two tensors becomes ``matmul``
- ``cat``, ``softmax`` and ``transpose`` count their dimensions from the front
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from .dataflow import same_size
from .einsum import as_matmul
from .patterns import argument, is_open_ended, rank, tensor
from .program import Program

_aten = torch.ops.aten
_NOTHING = {_aten.alias.default, _aten.detach.default, _aten.lift_fresh_copy.default}
_DIMENSIONS = {
    _aten.cat.default: ("dim",),
    _aten.softmax.int: ("dim",),
    _aten._softmax.default: ("dim",),
    _aten._safe_softmax.default: ("dim",),
    _aten.transpose.int: ("dim0", "dim1"),
}


@dataclass(frozen=True)
class Normalize:
    """Returns the number of nodes that were removed or changed."""

    def __call__(self, program: Program) -> int:
        products = program.graph.find_nodes(op="call_function", target=_aten.einsum.default)
        changed = sum(_replace_einsum(program, node) for node in products)
        return changed + sum(_normalize(node) for node in list(program.graph.nodes))


def _replace_einsum(program: Program, node: fx.Node) -> bool:
    with program.graph.inserting_before(node):
        product = as_matmul(program, node)
    if product is None:
        return False
    product.meta = {**node.meta, "val": product.meta["val"]}
    node.replace_all_uses_with(product)
    node.graph.erase_node(node)
    return True


def _normalize(node: fx.Node) -> bool:
    if node.target is _aten._assert_tensor_metadata.default:
        node.graph.erase_node(node)
        return True
    if node.target in (_aten.view.default, _aten._unsafe_view.default):
        node.target = _aten.reshape.default
        return True
    if node.target in (_aten.concat.default, _aten.concatenate.default):
        node.target = _aten.cat.default
        _count_from_front(node, "dim")
        return True
    if node.target in _NOTHING or _is_dropout_off(node) or _is_whole(node):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        node.graph.erase_node(node)
        return True
    if _writes_everything(node):
        node.replace_all_uses_with(node.args[1])  # type: ignore[arg-type]
        node.graph.erase_node(node)
        return True
    names = _DIMENSIONS.get(node.target, ())  # type: ignore[call-overload]
    return sum(_count_from_front(node, name) for name in names) > 0


def _is_dropout_off(node: fx.Node) -> bool:
    if node.target is not _aten.dropout.default:
        return False
    return argument(node, "p") == 0 or not argument(node, "train")


def _is_whole(node: fx.Node) -> bool:
    """Whether a slice takes a whole dimension, whatever its size."""
    if node.target is not _aten.slice.Tensor:
        return False
    if argument(node, "start") not in (None, 0) or argument(node, "step") != 1:
        return False
    return is_open_ended(node) or same_size(tensor(node), tensor(node.args[0]))  # type: ignore[arg-type]


def _writes_everything(node: fx.Node) -> bool:
    """Whether a write leaves nothing of what it is made into: its value is what is written."""
    if node.target not in (_aten.copy.default, _aten.slice_scatter.default):
        return False
    into, written = (tensor(operand) for operand in node.args[:2])  # type: ignore[arg-type]
    return into.dtype == written.dtype and same_size(into, written)


def _count_from_front(node: fx.Node, name: str) -> bool:
    dim = argument(node, name)
    if not isinstance(dim, int) or dim >= 0:
        return False
    position = [a.name for a in node.target._schema.arguments].index(name)  # type: ignore[union-attr]
    positive = dim + rank(node)
    if position < len(node.args):
        node.update_arg(position, positive)
    else:
        node.update_kwarg(name, positive)
    return True
