"""What attention looks like in ATen: small matchers with their alternatives in tables.

A matcher returns what it bound, None where there is nothing to match, or raises :class:`Refused`
where there is an attention that it cannot bind faithfully.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
CASTS = {_aten._to_copy.default, _aten.to.dtype}
PRODUCTS = {_aten.matmul.default, _aten.bmm.default}
SOFTMAXES = {_aten.softmax.int, _aten._softmax.default, _aten._safe_softmax.default}


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
    output, weights = _weighted_sum(node)
    scores = _Scores(node.args[0])  # type: ignore[arg-type]
    if output is None or weights is None or not scores.peel():
        return None
    product = scores.node
    query, key = product.args
    key = _transposed(source(key), product)  # type: ignore[arg-type]
    value = output.args[1]
    return _bound(
        source(query), key, value, scores.mask, None, scores.scale, scores.softcap,  # type: ignore[arg-type]
        product, output,
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


def _weighted_sum(softmax: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The product of the weights with the values, and the weights it takes."""
    weights = softmax
    while True:
        users = [
            user for user in weights.users if user.target in PRODUCTS | CASTS | COPIES | RESHAPES
        ]
        products = [user for user in users if user.target in PRODUCTS and user.args[0] is weights]
        if products:
            return products[0], weights
        casts = [user for user in users if user.target not in PRODUCTS and source_is(user, weights)]
        if not casts:
            return None, None
        weights = casts[0]


def source_is(node: fx.Node, weights: fx.Node) -> bool:
    """Whether ``node`` is ``weights`` up to copies and a cast."""
    return behind_cast(node) is behind_cast(weights)


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

    def peel(self) -> bool:
        """Bind mask, softcap and scale; False where there is no product at the bottom."""
        if not _depends_on_product(self.node):
            return False
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
        return True

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
    """Whether a product is reached through the element-wise operators that scores go through."""
    elementwise = {
        _aten.add.Tensor, _aten.mul.Tensor, _aten.div.Tensor, _aten.mul.Scalar, _aten.div.Scalar,
        _aten.tanh.default, _aten.where.self, _aten.masked_fill.Scalar, _aten.sub.Tensor,
    }  # fmt: skip
    stack = [node]
    while stack:
        current = behind_cast(stack.pop())
        if current.target in PRODUCTS and rank(current) == 4:
            return True
        if current.target in elementwise:
            stack += [a for a in current.args if isinstance(a, fx.Node)]
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
