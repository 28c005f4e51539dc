"""Masks by which query i sees the keys j <= i + c, and nothing else: the number c says the same.

A step would read such a mask for every query head, and the graph would make it anew each time.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import SymInt, fx

from ..torch_private import statically_known_true
from .attention import Attention
from .axes import Size, equal, same_shape, viewed
from .dataflow import call, value_of
from .patterns import argument, rank, tensor
from .program import Program
from .scores import HIDDEN, Bias, constant, is_tensor

_aten = torch.ops.aten
Rows = tuple[Size, Size]
"""L and S."""
_INDICES = (torch.int32, torch.int64)
_NOT = (_aten.logical_not.default, _aten.bitwise_not.default)
_LESS = {
    _aten.le.Tensor: (False, True), _aten.lt.Tensor: (False, False),
    _aten.ge.Tensor: (True, True), _aten.gt.Tensor: (True, False),
}  # fmt: skip
"""Comparisons as a < b: whether a and b change places, and whether they may be equal."""
_WHERE = (
    _aten.where.self, _aten.where.ScalarSelf, _aten.where.ScalarOther, _aten.where.Scalar,
)  # fmt: skip
_FILLS = (_aten.masked_fill.Scalar, _aten.masked_fill.Tensor)
_ONES = (_aten.ones.default, _aten.ones_like.default, _aten.new_ones.default)
_ZEROS = (_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default)


@dataclass(frozen=True)
class Sum:
    """A whole number: the sum of numbers and nodes of the graph, each with its sign."""

    terms: tuple[tuple[int, int | fx.Node], ...] = ()

    def __add__(self, other: Sum) -> Sum:
        return Sum(self.terms + other.terms)

    def __neg__(self) -> Sum:
        return Sum(tuple((-sign, term) for sign, term in self.terms))

    @property
    def value(self) -> int | SymInt:
        total: int | SymInt = sum(sign * value_of(term) for sign, term in self.terms)
        return total

    def node(self, program: Program) -> int | fx.Node:
        """The sum as an argument of an operator, added at the graph's insertion point."""
        total: int | fx.Node = sum(sign * t for sign, t in self.terms if isinstance(t, int))
        for sign, term in self.terms:
            if isinstance(term, fx.Node):
                by = operator.add if sign > 0 else operator.sub
                total = call(program, by, (total, term)) if total != 0 or sign < 0 else term
        return total


def without_causal_mask(attention: Attention) -> tuple[Attention, Sum | None]:
    """The attention without its mask, if that is causal, and c; else the attention, and None."""
    if attention.causal_offset is not None or attention.floored:
        return attention, None
    mask, tokens = attention.attn_mask, tensor(attention.key).shape[attention.tokens_dims[0]]
    rows = tensor(attention.query).shape[-2], tokens
    if mask is not None and tensor(mask).dtype == torch.bool:
        offset = _offset(mask, rows)
        if offset is not None:
            return replace(attention, attn_mask=None), offset
    for bias in attention.biases:
        offset = _offset_of_bias(bias, rows, len(attention.biases) == 1)
        if offset is not None:
            others = tuple(other for other in attention.biases if other is not bias)
            return replace(attention, biases=others), offset
    return attention, None


def _offset(mask: Any, rows: Rows, visible: bool = True) -> Sum | None:
    """c, if a bool mask [*, L, S] is ``visible`` just where j <= i + c; None otherwise."""
    for base in _with_its_rows(mask, rows):
        if base.target in _NOT:
            return _offset(base.args[0], rows, not visible)
        if base.target in _LESS:
            return _of_comparison(base, visible)
        if base.target is _aten.tril.default and visible and _filled(base.args[0]) == 1:
            return Sum(((1, argument(base, "diagonal")),))
        if base.target is _aten.triu.default and not visible and _filled(base.args[0]) == 1:
            return _of_upper(base)
    return None


def _offset_of_bias(bias: Bias, rows: Rows, alone: bool) -> Sum | None:
    """The same for a bias of 0 where a key is seen, and of a constant that hides it elsewhere."""
    if bias.factors:
        return None
    if bias.fill is not None:
        offset, fill = _offset(bias.node, rows, bias.visible), bias.fill
    else:
        offset, fill = _of_added(bias.node, rows)
        fill *= bias.scale
    if offset is None or not fill <= HIDDEN:
        return None
    # Where a query sees nothing, a finite number hides nothing: all keys are alike.
    sees_some = alone and statically_known_true(offset.value >= 0)
    return offset if fill == -torch.inf or sees_some else None


def _of_added(node: fx.Node, rows: Rows) -> tuple[Sum | None, float]:
    """c of a mask that is added to scores, and what it adds where a key is hidden."""
    for base in _with_its_rows(node, rows):
        if base.target is _aten.triu.default:
            fill = _filled(base.args[0])
            return (None, 0.0) if fill is None else (_of_upper(base), fill)
        if base.target in _FILLS:
            shown, condition, hidden = base.args[:3]
            visible = False
        elif base.target in _WHERE:
            condition, shown, hidden = base.args[:3]
            visible = _filled(shown) == 0
            if not visible:
                shown, hidden = hidden, shown
        else:
            continue
        fill = _filled(hidden)
        if _filled(shown) == 0 and fill is not None:
            return _offset(condition, rows, visible), fill
    return None, 0.0


def _of_upper(node: fx.Node) -> Sum:
    """c of ``triu``, which keeps what is hidden."""
    return Sum(((1, argument(node, "diagonal")), (-1, 1)))


def _of_comparison(node: fx.Node, visible: bool) -> Sum | None:
    swap, or_equal = _LESS[node.target]  # type: ignore[index]
    if not visible:
        swap, or_equal = not swap, not or_equal
    small, large = reversed(node.args[:2]) if swap else node.args[:2]
    key, query = _index(small, node, -1), _index(large, node, -2)
    if key is None or query is None:
        return None
    return query + -key + (Sum() if or_equal else Sum(((-1, 1),)))


def _with_its_rows(node: fx.Node, rows: Rows) -> Iterator[fx.Node]:
    """Tensors that a mask [*, L, S] is a view of, and whose last two dimensions are its own."""
    if not same_shape(tensor(node).shape[-2:], rows):
        return
    for base, dims in viewed(node):
        last = [rank(base) - 2, rank(base) - 1]
        if len(dims) < 2 or last[0] < 0:
            continue
        pairs = zip(dims[-2:], last, strict=True)
        own = all([axis.origin for axis in dim] in ([], [index]) for dim, index in pairs)
        if own and not any(axis.origin in last for dim in dims[:-2] for axis in dim):
            yield base


def _index(node: Any, reader: fx.Node, dim: int) -> Sum | None:
    """n, if a tensor that ``reader`` broadcasts is j + n, where j counts along ``dim``."""
    if not is_tensor(node) or rank(node) < -dim:
        return None
    if not equal(tensor(node).shape[dim], tensor(reader).shape[dim]):
        return None
    return _counted(node, rank(node) + dim)


def _counted(node: Any, place: int | None) -> Sum | None:
    """The same along dimension ``place``; None stands for one of size 1, which is gone."""
    for base, dims in viewed(node):
        if tensor(base).dtype not in _INDICES:
            return None
        counting = [] if place is None else [axis.origin for axis in dims[place]]
        if [a.origin for dim in dims for a in dim if a.origin is not None] != counting:
            continue
        if base.target is _aten.arange.default:
            return Sum()
        if base.target is _aten.arange.start or (
            base.target is _aten.arange.start_step and argument(base, "step") == 1
        ):
            return Sum(((1, base.args[0]),))  # type: ignore[arg-type]
        if base.target in (_aten.add.Tensor, _aten.sub.Tensor) and argument(base, "alpha") == 1:
            rest, by = base.args[:2]
            first = _counted(rest, counting[0] if counting else None)
            if first is None or not isinstance(value_of(by), int | SymInt):
                return None
            return first + Sum(((1 if base.target is _aten.add.Tensor else -1, by),))  # type: ignore[arg-type]
    return None


def _filled(value: Any) -> float | None:
    """As ``constant``, which leaves ones and zeros to be factors."""
    if is_tensor(value):
        *_, (base, _dims) = viewed(value)
        if base.target in _ONES or base.target in _ZEROS:
            return 1.0 if base.target in _ONES else 0.0
    return constant(value)
