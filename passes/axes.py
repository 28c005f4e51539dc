"""Which axes of a cache the dimensions of a view of it are.

Models bring the cached keys to the queries through all kinds of views: heads repeated or expanded,
batch and heads merged, transposed. Instead of a pattern for each way, the views are followed
forwards from the cache: every dimension of a view is a product of axes of the cache, and of axes
that repeat it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import SymInt, fx

from ..torch_private import statically_known_true
from .patterns import CASTS, COPIES, RESHAPES, VIEWS, argument, rank, tensor

_aten = torch.ops.aten
Size = int | SymInt


@dataclass(frozen=True)
class Axis:
    """An axis of the base, or one that repeats it where ``origin`` is None."""

    origin: int | None
    size: Size


Dims = tuple[tuple[Axis, ...], ...]
"""For each dimension the axes that it consists of, outermost first; none where its size is 1."""


def equal(left: Size, right: Size) -> bool:
    """Whether two sizes are the same for every value of their symbols."""
    return statically_known_true(left == right)


def same_shape(left: Sequence[Size], right: Sequence[Size]) -> bool:
    """Whether two shapes are the same for every value of their symbols."""
    return len(left) == len(right) and all(map(equal, left, right))


def _regroup(dims: Dims, shape: Sequence[Size]) -> Dims | None:
    """The dimensions after a reshape; None where it cuts an axis in two."""
    axes = [axis for dim in dims for axis in dim]
    result: list[tuple[Axis, ...]] = []
    for size in shape:
        taken: list[Axis] = []
        while not equal(math.prod(axis.size for axis in taken), size):
            if not axes:
                return None
            taken.append(axes.pop(0))
        result.append(tuple(taken))
    return None if axes else tuple(result)


def _expand(node: fx.Node, dims: Dims) -> Dims:
    shape = tensor(node).shape
    dims = ((),) * (len(shape) - len(dims)) + dims
    return tuple(
        (Axis(None, size),) if not dim and not equal(size, 1) else dim
        for dim, size in zip(dims, shape, strict=True)
    )


def _repeat(node: fx.Node, dims: Dims) -> Dims:
    """Tiling: the repetitions come before the axes of a dimension."""
    repeats: Any = argument(node, "repeats")
    dims = ((),) * (len(repeats) - len(dims)) + dims
    return tuple(
        dim if equal(times, 1) else (Axis(None, times), *dim)
        for dim, times in zip(dims, repeats, strict=True)
    )


def _repeat_interleave(node: fx.Node, dims: Dims) -> Dims | None:
    dim, repeats = argument(node, "dim"), argument(node, "repeats")
    if not isinstance(dim, int) or not isinstance(repeats, int | SymInt):
        return None
    changed = list(dims)
    changed[dim] += () if equal(repeats, 1) else (Axis(None, repeats),)
    return tuple(changed)


def _transpose(node: fx.Node, dims: Dims) -> Dims:
    changed, (first, second) = list(dims), (argument(node, "dim0"), argument(node, "dim1"))
    changed[first], changed[second] = changed[second], changed[first]
    return tuple(changed)


def _permute(node: fx.Node, dims: Dims) -> Dims:
    order: Any = argument(node, "dims")
    return tuple(dims[dim] for dim in order)


def _reshape(node: fx.Node, dims: Dims) -> Dims | None:
    return _regroup(dims, tensor(node).shape)


def _same(node: fx.Node, dims: Dims) -> Dims | None:
    return dims if same_shape(tensor(node).shape, tensor(node.args[0]).shape) else None  # type: ignore[arg-type]


STEPS: dict[Any, Callable[[fx.Node, Dims], Dims | None]] = {
    **dict.fromkeys(COPIES | CASTS | {_aten.slice.Tensor}, _same),
    **dict.fromkeys(RESHAPES - {_aten.slice.Tensor}, _reshape),
    **dict.fromkeys((_aten.unsqueeze.default, _aten.squeeze.dim, _aten.squeeze.dims), _reshape),
    _aten.expand.default: _expand,
    _aten.repeat.default: _repeat,
    _aten.repeat_interleave.self_int: _repeat_interleave,
    _aten.transpose.int: _transpose,
    _aten.permute.default: _permute,
}
"""How each view changes the dimensions of its operand."""


def viewed(node: fx.Node) -> Iterator[tuple[fx.Node, Dims]]:
    """Every tensor that ``node`` is a view of, nearest first, with the dimensions of ``node``."""
    chain: list[fx.Node] = []
    while True:
        dims: Dims | None = tuple(
            () if equal(size, 1) else (Axis(index, size),)
            for index, size in enumerate(tensor(node).shape)
        )
        for step in reversed(chain):
            dims = None if dims is None else STEPS[step.target](step, dims)
        if dims is not None:
            yield node, dims
        if node.op != "call_function" or node.target not in STEPS:
            return
        chain.append(node)
        node = node.args[0]  # type: ignore[assignment]


class Cached(NamedTuple):
    """The cache that an operand is a view of, and how it repeats heads."""

    base: fx.Node
    """[B, Hkv, S, D], [B, S, Hkv, D], or [B, S, D] of a single head."""
    order: tuple[int, int | None, int, int]
    """Its dimensions that are B, Hkv, S and D; None where there is none of heads."""
    tiled: bool
    """Whether query head h reads key head h % Hkv instead of h // G."""

    @property
    def sizes(self) -> list[Size]:
        """B, Hkv, S and D."""
        shape = tensor(self.base).shape
        return [1 if dim is None else shape[dim] for dim in self.order]


ORDERS = (0, 1, 2, 3), (0, 2, 1, 3), (0, None, 1, 2)
"""Where B, Hkv, S and D are in a cache; the first is preferred where several would do."""


def cached(
    operand: fx.Node, batch: Sequence[Size], last: tuple[int, int], kept: Collection[fx.Node]
) -> Cached | None:
    """The cache that an operand of a product is a view of.

    Args:
        operand: [*batch, n, m], its batch dimensions possibly of size 1.
        batch: batch dimensions of the product, which are B, Hkv and the group, or B, group, Hkv.
        last: which of B, Hkv, S, D the operand's last two dimensions are, by number.
        kept: nodes to prefer: those that may be a cache.

    Returns:
        The earliest tensor of the required form, None if there is none.
    """
    found = [
        Cached(base, order, tiled)
        for base, dims in viewed(operand)
        for order in reversed(ORDERS)
        if (tiled := _tiling(base, order, dims, batch, last)) is not None
    ]
    preferred = [
        one
        for one in found
        if one.base in kept
        or one.base.op == "placeholder"
        or merged(one.base, one.order[2]) in kept
    ]
    candidates = preferred or [one for one in found if one.order == ORDERS[0]] or found
    return candidates[-1] if candidates else None


def merged(node: fx.Node, tokens_dim: int) -> fx.Node | None:
    """[B, S, H * D], of which a node is [B, S, H, D], or [B, 1, S, D]; None if there is none."""
    if node.target not in VIEWS:
        return None
    before: fx.Node = node.args[0]  # type: ignore[assignment]
    heads = tensor(node).shape[3 - tokens_dim] if rank(node) == 4 and rank(before) == 3 else None
    if heads is None or (tokens_dim == 2 and not equal(heads, 1)):
        return None
    batch, length, width = tensor(before).shape
    sizes = [tensor(node).shape[dim] for dim in (0, tokens_dim, 3)]
    return before if same_shape(sizes, [batch, length, width // heads]) else None


def _tiling(
    base: fx.Node,
    order: Sequence[int | None],
    dims: Dims,
    batch: Sequence[Size],
    last: tuple[int, int],
) -> bool | None:
    """Whether a view of a cache tiles its heads; None where it is not a view of the form."""
    sizes, heads_dim = tensor(base).shape, order[1]
    if rank(base) != (3 if heads_dim is None else 4) or len(dims) != len(batch) + 2:
        return None
    if heads_dim is None and (len(batch) == 1 or not equal(sizes[0], batch[0])):
        return None  # [B * Hkv, S, D]: masks are for B entries, and Hkv is not known
    for dim, number in zip(dims[-2:], last, strict=True):
        axis: Any = order[number]
        if [a.origin for a in dim] != ([] if equal(sizes[axis], 1) else [axis]):
            return None
    axes = [
        (index, axis.origin)
        for index, (dim, size) in enumerate(zip(dims[:-2], batch, strict=True))
        for axis in (dim or (() if equal(size, 1) else (Axis(None, size),)))
    ]
    origins = [origin for _, origin in axes]
    own = [index for index in (0, heads_dim) if index is not None and not equal(sizes[index], 1)]
    repeats: list[int | None] = [None] * (len(axes) - len(own))
    if origins == [*own, *repeats]:
        return False
    if own[-1:] == [heads_dim] and origins == [*own[:-1], *repeats, heads_dim]:
        # Not in the first of several dimensions: there it is the batch that is repeated.
        heads = axes[-1][0]
        places = [index for index, origin in axes if origin is None]
        if all(index == heads or index == heads - 1 > 0 for index in places):
            return True
    return None
