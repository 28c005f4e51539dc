"""The steps between the product of queries and keys and the softmax.

Every known step is a line of ``STEPS``: it either adds to what is bound so far (a factor, a bias, a
cap) and continues with its operand, or refuses. The walk goes backwards from the softmax, so that a
factor found earlier applies to a bias found later.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..torch_private import FakeTensor
from .axes import Size, equal, same_shape
from .patterns import (
    LIKE_PRODUCTS,
    MOVES,
    PRODUCTS,
    VIEWS,
    Refused,
    argument,
    behind_cast,
    tensor,
)

_aten = torch.ops.aten
HIDDEN = -1e4
"""Scores filled with this or less get no weight in any dtype, so the fill may be added instead."""


@dataclass(frozen=True)
class Factor:
    """A tensor that multiplies (or divides) scores of a shape, the same for every key."""

    node: fx.Node
    divides: bool
    shape: tuple[Size, ...]


@dataclass(frozen=True)
class Bias:
    """A term added to scores of a shape: a tensor, or a constant where a condition holds."""

    node: fx.Node
    shape: tuple[Size, ...]
    scale: float = 1.0
    factors: tuple[Factor, ...] = ()
    fill: float | None = None
    """Not None: ``node`` is bool, and this is added where it is not ``visible``."""
    visible: bool = False


class Scores:
    """The operators between a product and its softmax.

    Raises:
        Refused: a step is not known, or cannot be represented exactly.
    """

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.scale = 1.0
        self.factors: tuple[Factor, ...] = ()
        self.biases: tuple[Bias, ...] = ()
        self.softcap = 0.0
        self.sinks: fx.Node | None = None
        self.floored = False
        while True:
            self.node = behind_cast(self.node)
            if self.node.target in PRODUCTS:
                break
            step = STEPS.get(self.node.target)
            if step is None or not step(self):
                raise self._refused()
        if self.node.target is _aten.baddbmm.default:
            self._product_with_bias()
        if self.softcap:
            # softcap * tanh(scale / softcap * qk): the factors found since tanh are the inner one
            self.scale *= self.softcap

    def _refused(self) -> Refused:
        return Refused(f"{self.node.target} between queries, keys and softmax", self.node)

    @property
    def shape(self) -> tuple[Size, ...]:
        return tuple(tensor(self.node).shape)

    def _bias(self, node: Any, scale: float = 1.0, **fill: Any) -> bool:
        if not is_tensor(node) or self.softcap:
            return False
        if fill and (self.factors or tensor(node).dtype != torch.bool):
            return False
        bias = Bias(node, self.shape, self.scale * scale, self.factors, **fill)
        self.biases += (bias,)
        return True

    def _factor(self, by: Any, divides: bool) -> bool:
        number = constant(by)
        if number is not None:
            if number == 0 or isinstance(number, bool):
                return False
            self.scale *= 1 / number if divides else number
            return True
        if not is_tensor(by) or self.softcap or depends_on_product(by):
            return False
        size = tensor(by).shape
        if len(size) and not equal(size[-1], 1):
            return False  # another factor for each key
        self.factors += (Factor(by, divides, self.shape),)
        return True

    def _product_with_bias(self) -> None:
        """baddbmm: beta * input + alpha * product."""
        beta, alpha = argument(self.node, "beta"), argument(self.node, "alpha")
        if beta != 0 and not self._bias(self.node.args[0], float(beta)):
            raise self._refused()
        self.scale *= alpha

    # The steps. Each returns whether it could bind ``node``, and sets it to the operand.

    def _add(self) -> bool:
        left, right = self.node.args[:2]
        if argument(self.node, "alpha") != 1:
            return False
        sign = -1.0 if self.node.target is _aten.sub.Tensor else 1.0
        if sign < 0 and self._is_shift(left, right):
            self.node = left  # type: ignore[assignment]
            return True
        if sign > 0 and not depends_on_product(left):
            left, right = right, left
        if not depends_on_product(left) or not self._bias(right, sign):
            return False
        self.node = left  # type: ignore[assignment]
        return True

    def _is_shift(self, scores: Any, shift: Any) -> bool:
        """Whether the maximum over the keys is subtracted, which does not change a softmax."""
        if not isinstance(shift, fx.Node) or self.sinks is not None or self.softcap:
            return False
        if shift.target is _aten.amax.default:
            dims: Any = argument(shift, "dim")
        elif shift.target is operator.getitem and shift.args[1] == 0:
            shift = shift.args[0]
            if shift.target is not _aten.max.dim:
                return False
            dims = [argument(shift, "dim")]
        else:
            return False
        last = len(self.shape) - 1
        over_keys = [dim % (last + 1) for dim in dims] == [last]
        return over_keys and bool(argument(shift, "keepdim")) and shift.args[0] is scores

    def _mul(self) -> bool:
        left, right = self.node.args[:2]
        divides = self.node.target in {_aten.div.Tensor, _aten.div.Scalar}
        if not divides and not depends_on_product(left):
            left, right = right, left
        if not depends_on_product(left) or not self._factor(right, divides):
            return False
        self.node = left  # type: ignore[assignment]
        return True

    def _tanh(self) -> bool:
        if self.softcap or self.factors or self.scale <= 0:
            return False
        self.softcap, self.scale = self.scale, 1.0
        self.node = self.node.args[0]  # type: ignore[assignment]
        return True

    def _masked_fill(self) -> bool:
        scores, mask, value = self.node.args[:3]
        return self._hide(scores, mask, value, visible=False)

    def _where(self) -> bool:
        condition, scores, value = self.node.args[:3]
        if depends_on_product(scores):
            return self._hide(scores, condition, value, visible=True)
        return self._hide(value, condition, scores, visible=False)

    def _hide(self, scores: Any, mask: Any, value: Any, visible: bool) -> bool:
        number = constant(value)
        if number is None or number * self.scale > HIDDEN or number > HIDDEN or self.scale <= 0:
            return False
        if not depends_on_product(scores) or not self._bias(mask, fill=number, visible=visible):
            return False
        self.node = scores
        return True

    def _floor(self) -> bool:
        """A lower bound that only masked scores can reach."""
        if argument_or_none(self.node, "max") is not None:
            return False
        bound = self.node.args[1] if len(self.node.args) > 1 else self.node.kwargs.get("min")
        number = constant(bound)
        if number is None or number > HIDDEN or number * self.scale > HIDDEN:
            return False
        if self.factors or self.softcap or self.scale <= 0:
            return False
        self.floored = True
        self.node = self.node.args[0]  # type: ignore[assignment]
        return True

    def _view(self) -> bool:
        """Batch and heads merged or split; the dimensions of queries and keys stay."""
        before = tensor(self.node.args[0]).shape  # type: ignore[arg-type]
        if not same_shape(before[-2:], self.shape[-2:]):
            return False
        self.node = self.node.args[0]  # type: ignore[assignment]
        return True

    def _sinks(self) -> bool:
        """A column per head concatenated to the scores: a logit without a value."""
        parts: Any = argument(self.node, "tensors")
        outermost = self.scale == 1 and not (self.factors or self.biases or self.softcap)
        last = argument(self.node, "dim") == len(self.shape) - 1
        if self.sinks is not None or not outermost or not last or len(parts) != 2:
            return False
        scores, sinks = parts
        if not equal(tensor(sinks).shape[-1], 1) or depends_on_product(sinks):
            return False
        self.sinks, self.node = sinks, scores
        return True


def is_tensor(node: object) -> bool:
    """Whether an argument is a node whose value is a tensor, not a size."""
    return isinstance(node, fx.Node) and isinstance(node.meta["val"], torch.Tensor)


def argument_or_none(node: fx.Node, name: str) -> Any:
    """An argument by its schema name, None where the operator has none of this name."""
    names = [parameter.name for parameter in node.target._schema.arguments]  # type: ignore[union-attr]
    return argument(node, name) if name in names else None


STEPS: dict[Any, Callable[[Scores], bool]] = {
    **dict.fromkeys((_aten.add.Tensor, _aten.sub.Tensor), Scores._add),
    **dict.fromkeys((_aten.mul.Tensor, _aten.mul.Scalar), Scores._mul),
    **dict.fromkeys((_aten.div.Tensor, _aten.div.Scalar), Scores._mul),
    _aten.tanh.default: Scores._tanh,
    **dict.fromkeys((_aten.masked_fill.Scalar, _aten.masked_fill.Tensor), Scores._masked_fill),
    **dict.fromkeys((_aten.where.self, _aten.where.ScalarOther), Scores._where),
    _aten.where.ScalarSelf: Scores._where,
    **dict.fromkeys((_aten.clamp.default, _aten.clamp_min.default), Scores._floor),
    **dict.fromkeys((_aten.maximum.default, _aten.max.other), Scores._floor),
    **dict.fromkeys(VIEWS, Scores._view),
    _aten.cat.default: Scores._sinks,
}
"""Operators between the product and the softmax that may be bound."""
PASSABLE = STEPS.keys() | MOVES | {_aten.dropout.default}
"""Operators through which scores before the softmax, or weights after it, are followed to decide
whether this is an attention at all; it may still be refused."""


def constant(node: object) -> float | None:
    """A number, or the one that a tensor is filled with, if the graph shows that it is constant."""
    if isinstance(node, int | float):
        return node
    while isinstance(node, fx.Node) and node.target in VIEWS | {_aten.expand.default}:
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return None
    node = behind_cast(node)
    if node.op == "get_attr":
        return _traced_constant(node)
    fills = {_aten.full.default: 1, _aten.full_like.default: 1, _aten.scalar_tensor.default: 0}
    if node.target not in fills:
        return None
    number = node.args[fills[node.target]]
    return float(number) if isinstance(number, int | float) else None


def _traced_constant(node: fx.Node) -> float | None:
    """The number in a constant that tracing stored, as for ``torch.tensor(8.0)``."""
    if not str(node.target).startswith("_tensor_constant"):
        return None
    value = getattr(node.graph.owning_module, str(node.target))
    if isinstance(value, FakeTensor):
        value = value.constant
    return float(value) if value is not None and value.numel() == 1 else None


def depends_on_product(node: object) -> bool:
    """Whether a product of at least three dimensions is reached through ``PASSABLE`` operators."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if not isinstance(current, fx.Node):
            continue
        current = behind_cast(current)
        if current.target in LIKE_PRODUCTS and tensor(current).dim() >= 3:
            return True
        if current.target in PASSABLE and current not in seen:
            seen.add(current)
            stack += current.all_input_nodes
    return False
