"""Ways between a softmax and the products around it, by which an attention is told from others.

Values are followed through the operators that may be bound (``scores.PASSABLE``) and, where those
lead nowhere, through any operator that keeps the shape. Such an operator is not known, so that the
attention is refused by its name, not passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from .dataflow import same_size
from .patterns import CASTS, LIKE_PRODUCTS, SOFTMAXES, rank, tensor
from .scores import PASSABLE, is_tensor

_aten = torch.ops.aten
_KNOWN = PASSABLE | CASTS
_ENDS = SOFTMAXES | {
    _aten.linear.default, _aten.mm.default, _aten.addmm.default,
    _aten.scaled_dot_product_attention.default,
}  # fmt: skip
"""Operators that make other values, of whatever shape: what comes after them is another matter."""


@dataclass(frozen=True)
class Way:
    """A way to a product."""

    unknown: fx.Node | None
    """The first operator on it that is not known; None if all are."""


def way_to_product(softmax: fx.Node, forwards: bool) -> Way | None:
    """The way from a softmax back to a product of at least three dimensions, or ``forwards``.

    None if there is none. One of known operators is preferred.
    """
    start: fx.Node = softmax if forwards else softmax.args[0]  # type: ignore[assignment]
    return _search(start, forwards, only_known=True) or _search(start, forwards, only_known=False)


def _search(start: fx.Node, forwards: bool, only_known: bool) -> Way | None:
    seen, stack = {start}, [(start, Way(None))]
    while stack:
        node, way = stack.pop()
        for step, operand, after in _steps(node, forwards):
            if step.target in LIKE_PRODUCTS and rank(step) >= 3:
                return way
            known = step.target in _KNOWN
            if after in seen or not (known or (not only_known and _keeps_shape(step, operand))):
                continue
            seen.add(after)
            stack.append((after, way if known or way.unknown else Way(step)))
    return None


def _steps(node: fx.Node, forwards: bool) -> Iterator[tuple[fx.Node, fx.Node, fx.Node]]:
    """An operator, its operand on the way, and the node that the way goes on from."""
    if forwards:
        yield from ((user, node, user) for user in node.users)
    else:
        yield from ((node, operand, operand) for operand in node.all_input_nodes)


def _keeps_shape(step: fx.Node, operand: fx.Node) -> bool:
    if step.op != "call_function" or step.target in _ENDS:
        return False
    both_tensors = is_tensor(step) and is_tensor(operand)
    return both_tensors and same_size(tensor(step), tensor(operand))
