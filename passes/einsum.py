"""``einsum`` of two tensors as one ``matmul`` between views, which is how torch computes it."""

from __future__ import annotations

import torch
from torch import fx

from .dataflow import call
from .patterns import rank
from .program import Program

_aten = torch.ops.aten


def as_matmul(program: Program, node: fx.Node) -> fx.Node | None:
    """Add nodes that compute an einsum; None where it is not a product of two tensors.

    Labels that only one tensor has become rows or columns; all but the last of them, batch
    dimensions of size 1 for the other tensor.
    """
    equation: str = node.args[0]  # type: ignore[assignment]
    tensors: list[fx.Node] = node.args[1]  # type: ignore[assignment]
    left, right, result = _labels(equation, [rank(t) for t in tensors])
    if not result or not left or not right:
        return None
    both = [c for c in left if c in right and c in result]
    summed = [c for c in left if c in right and c not in result]
    rows, columns = ([c for c in result if c in own and c not in both] for own in (left, right))
    covered = len(left) + len(right) == 2 * len(both) + 2 * len(summed) + len(rows) + len(columns)
    if len(summed) != 1 or not rows or not columns or not covered:
        return None
    batch = both + rows[:-1] + columns[:-1]
    operands = (
        _arranged(program, tensors[0], left, [*batch, rows[-1], *summed]),
        _arranged(program, tensors[1], right, [*batch, *summed, columns[-1]]),
    )
    product = call(program, _aten.matmul.default, operands)
    return _permuted(program, product, [*batch, rows[-1], columns[-1]], result)


def _labels(equation: str, ranks: list[int]) -> tuple[str, str, str]:
    """The labels of the two tensors and of the result; empty for an unsupported equation."""
    sides = equation.replace(" ", "").split("->")
    inputs = sides[0].split(",")
    if len(sides) != 2 or len(inputs) != 2 or "." in equation:
        return "", "", ""
    distinct = all(len(set(labels)) == len(labels) for labels in (*inputs, sides[1]))
    if not distinct or [len(labels) for labels in inputs] != ranks:
        return "", "", ""
    return inputs[0], inputs[1], sides[1]


def _arranged(program: Program, node: fx.Node, labels: str, order: list[str]) -> fx.Node:
    """The tensor with its dimensions in the given order; those it lacks get size 1."""
    node = _permuted(program, node, list(labels), "".join(c for c in order if c in labels))
    for position, label in enumerate(order):
        if label not in labels:
            node = call(program, _aten.unsqueeze.default, (node, position))
    return node


def _permuted(program: Program, node: fx.Node, labels: list[str], order: str) -> fx.Node:
    if labels == list(order):
        return node
    return call(program, _aten.permute.default, (node, [labels.index(c) for c in order]))
