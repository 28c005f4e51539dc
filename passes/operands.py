"""The operands of a matched attention in the form of the canonical operator."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import fx

from .attention import Attention
from .axes import Size, equal, same_shape
from .dataflow import call
from .patterns import rank, tensor
from .program import Program
from .scores import Bias

_aten = torch.ops.aten
LEAST = torch.finfo(torch.float32).min


def query_of(program: Program, attention: Attention) -> fx.Node:
    """The queries [B, Hq, L, D], with every factor of the scores that is a tensor."""
    query, key = attention.query, tensor(attention.key)
    heads = attention.heads
    if rank(query) != 4 or tensor(query).shape[1] != heads:
        length, dim = _size(program, query, -2), _size(program, query, -1)
        query = call(program, _aten.reshape.default, (query, [-1, heads, length, dim]))
    for factor in attention.factors:
        by = _four_dimensional(program, attention, factor.node, factor.shape)
        operator = _aten.div.Tensor if factor.divides else _aten.mul.Tensor
        query = call(program, operator, (query, by))
    return _cast(program, _grouped(program, attention, query, 1), key.dtype)


def mask_of(program: Program, attention: Attention) -> fx.Node | None:
    """The mask and biases, broadcasting to [B, Hq, L, S]; None if there are none."""
    mask = _mask(program, attention)
    if mask is None or rank(mask) < 3 or tensor(mask).shape[-3] == 1:
        return mask
    return _grouped(program, attention, mask, rank(mask) - 3)


def sinks_of(program: Program, attention: Attention) -> fx.Node | None:
    """The sink logits [Hq], or None."""
    if attention.sinks is None:
        return None
    return _grouped(program, attention, attention.sinks, 0)


def _mask(program: Program, attention: Attention) -> fx.Node | None:
    """The sum of mask and biases, with the heads in the model's order."""
    if not attention.biases:
        return attention.attn_mask
    added = [_bias(program, attention, bias) for bias in attention.biases]
    mask = reduce(lambda left, right: call(program, _aten.add.Tensor, (left, right)), added)
    if attention.floored or sum(bias.fill is not None for bias in attention.biases) > 1:
        mask = call(program, _aten.clamp_min.default, (mask, LEAST))
    return mask


def as_output(program: Program, canonical: fx.Node, attention: Attention) -> fx.Node:
    """The canonical output [B, Hq, L, Dv] with the dtype and dimensions of the model's output."""
    node = _cast(program, canonical, tensor(attention.output).dtype)
    node = _grouped(program, attention, node, 1, back=True)
    shape = tensor(attention.output).shape
    if not same_shape(tensor(node).shape, shape):
        # No sizes of the original node: they would keep it alive.
        length = _size(program, canonical.args[0], 2)  # type: ignore[arg-type]
        node = call(program, _aten.reshape.default, (node, [-1, *shape[1:-2], length, shape[-1]]))
    return node


def _grouped(
    program: Program, attention: Attention, node: fx.Node, dim: int, back: bool = False
) -> fx.Node:
    """Put query heads that share a key head next to each other, or ``back``, if they are tiled."""
    if not attention.tiled:
        return node
    kv_heads = attention.kv_heads
    group = attention.heads // kv_heads
    sizes = [kv_heads, group] if back else [group, kv_heads]
    node = call(program, _aten.unflatten.int, (node, dim, sizes))
    node = call(program, _aten.transpose.int, (node, dim, dim + 1))
    return call(program, _aten.flatten.using_ints, (node, dim, dim + 1))


def _bias(program: Program, attention: Attention, bias: Bias) -> fx.Node:
    node = bias.node
    if bias.fill is not None:
        node = _hidden(program, bias)
    elif bias.scale != 1:
        node = call(program, _aten.mul.Tensor, (node, bias.scale))
    node = _four_dimensional(program, attention, node, bias.shape)
    for factor in bias.factors:
        by = _four_dimensional(program, attention, factor.node, factor.shape)
        operator = _aten.div.Tensor if factor.divides else _aten.mul.Tensor
        node = call(program, operator, (node, by))
    return node


def _hidden(program: Program, bias: Bias) -> fx.Node:
    """Zeros, and the fill where the condition holds (where it does not, if it is a visibility)."""
    mask = bias.node
    if bias.visible:
        mask = call(program, _aten.logical_not.default, (mask,))
    zeros = call(program, _aten.zeros_like.default, (mask,), dtype=torch.float32)
    # A score plus LEAST rounds to LEAST, so adding the fill is the same as filling.
    fill = LEAST if bias.fill != -math.inf else -math.inf
    return call(program, _aten.masked_fill.Scalar, (zeros, mask, fill))


def _four_dimensional(
    program: Program, attention: Attention, node: fx.Node, shape: tuple[Size, ...]
) -> fx.Node:
    """A tensor that broadcasts to ``shape`` [*batch, L, S], broadcasting to [B, Hq, L, S]."""
    if len(shape) == 4 or rank(node) <= 2:
        return node
    sizes = (1,) * (len(shape) - rank(node)) + tuple(tensor(node).shape)
    last = [_size(program, node, dim) for dim in (-2, -1)]
    if all(equal(size, 1) for size in sizes[:-2]):
        return call(program, _aten.reshape.default, (node, last))
    if len(shape) == 3:
        return call(program, _aten.reshape.default, (node, [-1, attention.heads, *last]))
    heads = 1
    if not all(equal(size, 1) for size in sizes[1:-2]):
        heads = attention.heads
        entries = -1 if rank(node) == len(shape) else 1
        whole = [entries, *shape[1:-2], -1, -1]
        node = call(program, _aten.expand.default, (node, whole))
    return call(program, _aten.reshape.default, (node, [-1, heads, *last]))


def _size(program: Program, node: fx.Node, dim: int) -> int | fx.Node:
    """A size as an argument of an operator."""
    size = tensor(node).shape[dim]
    if isinstance(size, int):
        return size
    return call(program, _aten.sym_size.int, (node, dim % rank(node)))


def _cast(program: Program, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    if tensor(node).dtype == dtype:
        return node
    return call(program, _aten.to.dtype, (node, dtype))
