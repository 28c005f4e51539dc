"""The ways to write attention: matchers that bind operands, or refuse.

A matcher returns the bound operands, None where there is nothing to match, or raises
:class:`Refused` for an attention that it cannot represent exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, fx

from .axes import Size, cached, equal, same_shape, viewed
from .patterns import (
    CASTS,
    PRODUCTS,
    SOFTMAXES,
    VIEWS,
    Refused,
    argument,
    behind_cast,
    rank,
    source,
    tensor,
)
from .scores import Bias, Factor, Scores, is_tensor
from .ways import way_to_product

_aten = torch.ops.aten


@dataclass(frozen=True)
class Attention:
    """One attention with the operands of the model's own graph."""

    query: fx.Node
    """[*batch, L, D], batch flattening to B and Hq."""
    key: fx.Node
    """[B, Hkv, S, D], or what ``tokens_dims`` says: [B, S, Hkv, D], or [B, S, D] of one head."""
    value: fx.Node
    """[B, Hkv, S, Dv], likewise."""
    heads: int
    """Hq."""
    kv_heads: int
    """Hkv."""
    tiled: bool
    """Whether query head h reads key head h % Hkv; the canonical operator has h // G."""
    scale: float
    scores: fx.Node
    """First node that may have no other readers: the scores, or the output itself."""
    output: fx.Node
    """[*batch, L, Dv]."""
    attn_mask: fx.Node | None = None
    causal_offset: int | None = None
    biases: tuple[Bias, ...] = ()
    factors: tuple[Factor, ...] = ()
    softcap: float = 0.0
    floored: bool = False
    """Whether scores have a lower bound, which gives a fully masked query uniform weights."""
    sinks: fx.Node | None = None
    """[Hq]."""
    tokens_dims: tuple[int, int] = (2, 2)
    """Which dimension of the keys and of the values is the sequence."""


def match_sdpa(node: fx.Node, kept: Collection[fx.Node]) -> Attention | None:
    """``scaled_dot_product_attention``, heads grouped by enable_gqa or expanded beforehand."""
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
    return _bound(
        source(query), key, value, (2, 3), kept,  # type: ignore[arg-type]
        scale=float(scale), scores=node, mixed=node, output=node,
        attn_mask=argument(node, "attn_mask"),
        causal_offset=0 if argument(node, "is_causal") else None,
    )  # fmt: skip


def match_softmax(node: fx.Node, kept: Collection[fx.Node]) -> Attention | None:
    """A product, steps of ``scores.STEPS``, a softmax, and a product with the values."""
    if node.target not in SOFTMAXES or rank(node) < 3 or argument(node, "dim") != rank(node) - 1:
        return None
    before, after = (way_to_product(node, forwards) for forwards in (False, True))
    if before is None or after is None:
        return None
    if before.unknown is not None:
        raise Refused(f"{before.unknown.target} between queries, keys and softmax", before.unknown)
    if after.unknown is not None:
        raise _changed(after.unknown)
    scores = Scores(node.args[0])  # type: ignore[arg-type]
    mixed = _weighted_sum(node, scores)
    query, key = _factors(scores.node)
    column = None if scores.sinks is None else (scores.sinks, -3)
    output, sinks = _gated(node, mixed) if column is None else (mixed, column)
    return _bound(
        behind_cast(query), key, _factors(mixed)[1], (3, 2), kept, mixed=mixed, sinks=sinks,
        scale=scores.scale, scores=scores.node, output=output, biases=scores.biases,
        factors=scores.factors, softcap=scores.softcap, floored=scores.floored,
    )  # fmt: skip


MATCHERS: tuple[Callable[[fx.Node, Collection[fx.Node]], Attention | None], ...] = (
    match_sdpa,
    match_softmax,
)


def _factors(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two tensors that are multiplied."""
    left, right = product.args[-2:] if len(product.args) == 2 else product.args[1:3]
    return left, right  # type: ignore[return-value]


def _bound(
    query: fx.Node, key: Any, value: Any, key_axes: tuple[int, int],
    kept: Collection[fx.Node], *, scores: fx.Node, mixed: fx.Node, output: fx.Node,
    sinks: tuple[fx.Node, int] | None = None, **rest: Any,
) -> Attention:  # fmt: skip
    """Find the caches that the operands multiplied with queries and weights are views of.

    ``mixed`` is the product of weights and values, ``output`` that or a gated form of it. ``sinks``
    is a tensor that broadcasts to the scores, and the dimension of its heads.
    """
    batch = tuple(tensor(scores).shape[:-2])
    keys = cached(key, _batch(scores, key), key_axes, kept)
    values = cached(value, _batch(mixed, value), (2, 3), kept)
    if keys is None or values is None:
        name = "keys" if keys is None else "values"
        raise Refused(f"the {name} do not come as [B, H, S, D], [B, S, H, D] or a view", output)
    key_sizes, value_sizes = keys.sizes, values.sizes
    if not same_shape(key_sizes[:2], value_sizes[:2]) or keys.tiled != values.tiled:
        raise Refused("keys and values come with other heads or batch entries", output)
    heads = _heads(batch, key_sizes[0])
    whole = same_shape([math.prod(tensor(query).shape[:-2])], [math.prod(batch)])
    if heads is None or not whole or tensor(query).shape[-1] != key_sizes[3]:
        raise Refused("the queries do not come as [B, H, L, D] or a view of it", output)
    logits = None if sinks is None else _per_head(*sinks, heads, output)
    return Attention(
        query, keys.base, values.base, heads, int(key_sizes[1]), tiled=keys.tiled, scores=scores,
        output=output, sinks=logits, tokens_dims=(keys.order[2], values.order[2]), **rest,
    )  # fmt: skip


def _batch(product: fx.Node, operand: fx.Node) -> tuple[Size, ...]:
    """Batch dimensions of an operand; a product of four may repeat heads itself (enable_gqa).

    Raises:
        Refused: the heads are not repeated evenly.
    """
    batch = tuple(tensor(product).shape[:-2])
    if len(batch) != 2 or rank(operand) != 4:
        return batch
    heads, kv_heads = batch[1], tensor(operand).shape[1]
    if heads % kv_heads != 0:
        raise Refused(f"the heads do not form groups: {heads} for {kv_heads}", product)
    return batch[0], kv_heads


def _heads(batch: tuple[Size, ...], entries: Size) -> int | None:
    """Hq, where batch dimensions are B and heads, or one that merges them."""
    if len(batch) > 1 and equal(batch[0], entries):
        heads: Any = math.prod(batch[1:])
    else:
        heads = math.prod(batch)
        if isinstance(heads, int) and isinstance(entries, int):
            heads //= entries
        elif isinstance(heads, SymInt):
            heads = heads.node.expr.as_coeff_Mul()[0]
            heads = int(heads) if heads.is_Integer else None
    known = isinstance(heads, int) and equal(heads * entries, math.prod(batch))
    return heads if known else None


def _per_head(sinks: fx.Node, axis: int, heads: int, output: fx.Node) -> fx.Node:
    """The logits [Hq] that ``sinks`` is a view of; ``axis`` (negative) is the one of heads."""
    for base, dims in viewed(sinks):
        own = [index for index, dim in enumerate(dims) if any(a.origin is not None for a in dim)]
        per_head = [] if heads == 1 else [len(dims) + axis]
        if rank(base) == 1 and tensor(base).shape[0] == heads and own == per_head:
            return base
    raise Refused("a sink beside the scores is not a logit per head", output)


def _gated(softmax: fx.Node, mixed: fx.Node) -> tuple[fx.Node, tuple[fx.Node, int] | None]:
    """The gated output and its sinks if ``mixed * sigmoid(logsumexp(scores) - sinks)`` follows.

    That is attention with sinks: a softmax with one more logit s in its denominator is the plain
    one times e^lse / (e^lse + e^s). Without such a gate: ``mixed`` and None.
    """
    scores, node = behind_cast(softmax.args[0]), mixed  # type: ignore[arg-type]
    while True:
        for user in node.users:
            for gate in user.args if user.target is _aten.mul.Tensor else ():
                sinks = _sink_gate(gate, scores, rank(node)) if is_tensor(gate) else None  # type: ignore[arg-type]
                if sinks is not None:
                    return user, sinks
        following = next((user for user in node.users if _keeps_rows(user)), None)
        if following is None:
            return mixed, None
        node = following


def _sink_gate(gate: fx.Node, scores: fx.Node, dims: int) -> tuple[fx.Node, int] | None:
    """The sinks of a gate [*batch, L, 1] that is the same for every channel of the output."""
    *_, (base, kept) = viewed(gate)
    if base.target is not _aten.sigmoid.default:
        return None
    aligned = all([axis.origin for axis in dim] in ([], [index]) for index, dim in enumerate(kept))
    difference = behind_cast(base.args[0])  # type: ignore[arg-type]
    if len(kept) != dims or kept[-1] or not aligned or difference.target is not _aten.sub.Tensor:
        return None
    total, sinks = difference.args[:2]
    if not is_tensor(sinks) or not is_tensor(total) or argument(difference, "alpha") != 1:
        return None
    total = behind_cast(total)  # type: ignore[arg-type]
    if total.target is not _aten.logsumexp.default:
        return None
    over: Any = argument(total, "dim")
    over_keys = [dim % rank(scores) for dim in over] == [rank(scores) - 1]
    if not over_keys or behind_cast(total.args[0]) is not scores:  # type: ignore[arg-type]
        return None
    return sinks, -3 if argument(total, "keepdim") else -2  # type: ignore[return-value]


def _changed(by: fx.Node) -> Refused:
    return Refused(f"the attention weights are changed by {by.target} before the values", by)


def _weighted_sum(softmax: fx.Node, scores: Scores) -> fx.Node:
    """The product of the weights with the values; the columns of sinks are dropped before it.

    Raises:
        Refused: something else is done to the weights.
    """
    weights, dropped = softmax, scores.sinks is None
    while True:
        products = [u for u in weights.users if u.target in PRODUCTS and _factors(u)[0] is weights]
        if products and dropped and products[0].target is not _aten.baddbmm.default:
            return products[0]
        for user in weights.users:
            if not dropped and _drops_last(user):
                weights, dropped = user, True
                break
            if _keeps_rows(user):
                weights = user
                break
        else:
            raise _changed(next(iter(weights.users)))


def _keeps_rows(user: fx.Node) -> bool:
    """Whether a node is its operand up to copies, a cast, and batch dimensions merged or split."""
    operand: Any = user.args[0] if user.args else None
    if not isinstance(operand, fx.Node) or not is_tensor(user):
        return False
    if user.target in CASTS or source(user) is source(operand):
        return tensor(user).is_floating_point()
    shapes = tensor(user).shape, tensor(operand).shape
    return user.target in VIEWS and same_shape(shapes[0][-2:], shapes[1][-2:])


def _drops_last(user: fx.Node) -> bool:
    """Whether a node is its operand without the last column."""
    if user.target is not _aten.slice.Tensor or argument(user, "dim") not in (rank(user) - 1, -1):
        return False
    width = tensor(user.args[0]).shape[-1]  # type: ignore[arg-type]
    first = argument(user, "start") in (None, 0) and argument(user, "step") == 1
    return first and equal(tensor(user).shape[-1] + 1, width)
