"""What attention looks like in ATen: small matchers with their alternatives in tables.

A matcher returns what it bound, None where there is nothing to match, or raises :class:`Refused`
where there is an attention that it cannot bind faithfully.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..report import Refusal
from .dataflow import same_size

_aten = torch.ops.aten

COPIES = {_aten.clone.default, _aten.contiguous.default}
"""Operators that change at most strides."""
RESHAPES = {
    _aten.reshape.default,
    _aten.expand.default,
    _aten.slice.Tensor,
    _aten.flatten.using_ints,
    _aten.unflatten.int,
}
"""Operators that do nothing where input and output have the same shape."""
CASTS = {_aten._to_copy.default, _aten.to.dtype, _aten.type_as.default}
PRODUCTS = {_aten.matmul.default, _aten.bmm.default}
LIKE_PRODUCTS = PRODUCTS | {_aten.einsum.default}
"""Products as far as telling an attention from another softmax goes; not all can be bound."""
ELEMENTWISE = {
    _aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor, _aten.mul.Scalar,
    _aten.div.Scalar, _aten.tanh.default, _aten.where.self, _aten.masked_fill.Scalar,
    _aten.masked_fill.Tensor, _aten.clamp.default, _aten.dropout.default,
}  # fmt: skip
"""What scores may go through before the softmax, and weights behind it."""
MOVES = COPIES | RESHAPES | {
    _aten.cat.default, _aten.permute.default, _aten.transpose.int, _aten.index_select.default,
    _aten.index.Tensor, _aten.select.int, _aten.unsqueeze.default, _aten.squeeze.dim,
    _aten.narrow.default, _aten.gather.default, _aten.flip.default, _aten.roll.default,
    _aten.repeat_interleave.self_int, _aten.split.Tensor, _aten.split_with_sizes.default,
    _aten.chunk.default, operator.getitem,
}  # fmt: skip
"""Operators that take values elsewhere without changing them."""
SOFTMAXES = {_aten.softmax.int, _aten._softmax.default, _aten._safe_softmax.default}
WRITES = {
    _aten.index_copy.default, _aten.index_put.default, _aten.slice_scatter.default,
    _aten.select_scatter.default, _aten.scatter.src, _aten.copy.default,
}  # fmt: skip
"""Functional forms of writing into a part of a buffer."""


class Refused(Exception):
    """An attention that is left as it was."""

    def __init__(self, reason: str, node: fx.Node) -> None:
        super().__init__(reason)
        self.refusal = Refusal(reason, node.name)


@dataclass(frozen=True)
class Attention:
    """The operands of one attention, as ``torch.ops.spark.attention`` takes them."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    attn_mask: fx.Node | None
    causal_offset: int | None
    scale: float
    softcap: float
    scores: fx.Node
    """First node whose value nobody else may need: the scores, or the output itself."""
    output: fx.Node


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an ATen call by its schema name, the default where it was not given."""
    for position, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if parameter.name == name:
            if position < len(node.args) and not parameter.kwarg_only:
                return node.args[position]
            return node.kwargs.get(name, parameter.default_value)
    raise KeyError(f"{node.target} has no argument {name!r}")


def tensor(node: fx.Node) -> torch.Tensor:
    """A node's fake tensor."""
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value


def rank(node: fx.Node) -> int:
    return tensor(node).dim()


def source(node: fx.Node) -> fx.Node:
    """The node behind copies and behind reshapes that keep the shape."""
    while node.op == "call_function":
        keeps = node.target in COPIES or (
            node.target in RESHAPES and same_size(tensor(node), tensor(node.args[0]))  # type: ignore[arg-type]
        )
        if not keeps:
            break
        node = node.args[0]  # type: ignore[assignment]
    return node


def behind_cast(node: fx.Node) -> fx.Node:
    """The node behind conversions of the dtype alone."""
    node = source(node)
    while node.target in CASTS and tensor(node).is_floating_point():
        node = source(node.args[0])  # type: ignore[arg-type]
    return node


def ungrouped(node: fx.Node) -> fx.Node:
    """The Hkv heads behind their expansion to Hq heads, head h becoming heads h*G to h*G + G-1.

    Alternatives: unsqueeze(2), expand, reshape; ``repeat_interleave(G, dim=1)``. Anything else,
    tiling included, is returned as it is: it is then simply Hq heads.
    """
    node = source(node)
    if node.target is _aten.repeat_interleave.self_int and argument(node, "dim") in (1, -3):
        return source(node.args[0])  # type: ignore[arg-type]
    if node.target not in RESHAPES or rank(node) != 4:
        return node
    expanded = source(node.args[0])  # type: ignore[arg-type]
    if expanded.target is not _aten.expand.default or rank(expanded) != 5:
        return node
    unsqueezed = source(expanded.args[0])  # type: ignore[arg-type]
    if unsqueezed.target is not _aten.unsqueeze.default or argument(unsqueezed, "dim") != 2:
        return node
    base: fx.Node = unsqueezed.args[0]  # type: ignore[assignment]
    heads, groups = tensor(expanded).shape[1:3]
    merged = tensor(node).shape[1] == heads * groups
    rest = tensor(node).shape[2:], tensor(base).shape[2:]
    same = all(statically_known_true(a == b) for a, b in zip(*rest, strict=True))
    return source(base) if merged and same else node


def match_sdpa(node: fx.Node) -> Attention | None:
    """``scaled_dot_product_attention``, heads grouped by enable_gqa or expanded before."""
    if node.target is not _aten.scaled_dot_product_attention.default:
        return None
    query, key, value = node.args[:3]
    if rank(node) != 4:
        raise Refused(f"the attention has {rank(node)} dimensions, not [B, H, L, D]", node)
    if argument(node, "dropout_p") != 0:
        raise Refused(f"dropout_p is {argument(node, 'dropout_p')}", node)
    scale = argument(node, "scale")
    if scale is None:
        scale = 1 / math.sqrt(tensor(query).shape[-1])  # type: ignore[arg-type]
    causal = 0 if argument(node, "is_causal") else None
    mask = argument(node, "attn_mask")
    return _bound(query, key, value, mask, causal, scale, 0.0, node, node)


def match_softmax(node: fx.Node) -> Attention | None:
    """matmul, scale, softcap, mask, softmax, cast, dropout, matmul, as eager attention has it."""
    if node.target not in SOFTMAXES or rank(node) != 4 or argument(node, "dim") != 3:
        return None
    scores = _Scores(node.args[0])  # type: ignore[arg-type]
    if not _depends_on_product(scores.node) or not _reaches_product(node):
        return None
    output = _weighted_sum(node)
    if output is None:
        raise Refused("the attention weights are changed before they meet the values", node)
    scores.peel()
    query, key = scores.node.args
    key = _transposed(source(key), scores.node)  # type: ignore[arg-type]
    return _bound(
        source(query), key, output.args[1], scores.mask, None, scores.scale, scores.softcap,  # type: ignore[arg-type]
        scores.node, output,
    )  # fmt: skip


MATCHERS: tuple[Callable[[fx.Node], Attention | None], ...] = (match_sdpa, match_softmax)


def _bound(
    query: Any, key: Any, value: Any, mask: Any, causal: int | None, scale: float,
    softcap: float, scores: fx.Node, output: fx.Node,
) -> Attention:  # fmt: skip
    key, value = ungrouped(key), ungrouped(value)
    query_heads, key_heads, value_heads = (tensor(n).shape[1] for n in (query, key, value))
    if key_heads != value_heads or query_heads % key_heads != 0:
        heads = f"{query_heads} query, {key_heads} key and {value_heads} value heads"
        raise Refused(f"the heads do not form groups: {heads}", output)
    return Attention(query, key, value, mask, causal, float(scale), softcap, scores, output)


def _weighted_sum(softmax: fx.Node) -> fx.Node | None:
    """The product of the weights, up to copies and a cast, with the values."""
    weights = softmax
    while True:
        products = [u for u in weights.users if u.target in PRODUCTS and u.args[0] is weights]
        if products:
            return products[0]
        casts = [u for u in weights.users if behind_cast(u) is behind_cast(weights)]
        if not casts:
            return None
        weights = casts[0]


def _reaches_product(softmax: fx.Node) -> bool:
    """Whether the weights, possibly changed, are multiplied with something."""
    seen, stack = {softmax}, [softmax]
    while stack:
        for user in stack.pop().users:
            if user.target in LIKE_PRODUCTS:
                return True
            if user.target in ELEMENTWISE | CASTS | MOVES and user not in seen:
                seen.add(user)
                stack.append(user)
    return False


def _transposed(key: fx.Node, product: fx.Node) -> fx.Node:
    """The keys [B, H, S, D] whose transpose [B, H, D, S] the product takes."""
    if key.target is _aten.transpose.int and set(key.args[1:]) == {2, 3}:
        return key.args[0]  # type: ignore[return-value]
    if key.target is _aten.permute.default and list(key.args[1]) == [0, 1, 3, 2]:  # type: ignore[arg-type]
        return key.args[0]  # type: ignore[return-value]
    raise Refused("the keys are not transposed where they meet the queries", product)


class _Scores:
    """Peels scores from the softmax back to the product of queries and keys."""

    def __init__(self, node: fx.Node) -> None:
        self.node = behind_cast(node)
        self.mask: fx.Node | None = None
        self.scale = 1.0
        self.softcap = 0.0

    def peel(self) -> None:
        """Bind mask, softcap and scale, so that ``node`` is the product of queries and keys."""
        self._peel_mask()
        self._peel_scale()
        if self.node.target is _aten.tanh.default:
            self.softcap, self.scale = self.scale, 1.0
            self.node = behind_cast(self.node.args[0])  # type: ignore[arg-type]
            self._peel_scale()
            # softcap * tanh(scale / softcap * qk): what was peeled is the inner factor
            self.scale *= self.softcap
        if self.node.target not in PRODUCTS:
            raise Refused(f"{self.node.target} between queries, keys and softmax", self.node)

    def _peel_mask(self) -> None:
        if self.node.target is not _aten.add.Tensor or argument(self.node, "alpha") != 1:
            return
        left, right = self.node.args[:2]
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            return
        scores, mask = (left, right) if _depends_on_product(behind_cast(left)) else (right, left)
        self.mask, self.node = mask, behind_cast(scores)

    def _peel_scale(self) -> None:
        while True:
            factor = _constant_factor(self.node)
            if factor is None:
                return
            self.scale *= factor
            self.node = behind_cast(self.node.args[0])  # type: ignore[arg-type]


def _depends_on_product(node: fx.Node) -> bool:
    """Whether a product of four dimensions is reached through what scores go through."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = behind_cast(stack.pop())
        if current.target in LIKE_PRODUCTS and rank(current) == 4:
            return True
        if current.target in ELEMENTWISE | MOVES and current not in seen:
            seen.add(current)
            stack += current.all_input_nodes
    return False


def moved_from(node: fx.Node, origins: Collection[fx.Node]) -> bool:
    """Whether a value holds values of one of ``origins``, moved but not computed with."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in origins:
            return True
        if current.target in MOVES and current not in seen:
            seen.add(current)
            stack += current.all_input_nodes
    return False


def _constant_factor(node: fx.Node) -> float | None:
    """c where the node is x * c, or 1 / c where it is x / c, with a Python number c."""
    if node.target not in {
        _aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Tensor, _aten.div.Scalar,
    }:  # fmt: skip
        return None
    number = node.args[1]
    if not isinstance(number, int | float) or isinstance(number, bool) or number == 0:
        return None
    divides = node.target in {_aten.div.Tensor, _aten.div.Scalar}
    return 1 / number if divides else float(number)
