"""Which sites can be stored compressed, and the reasons why others are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import SymInt, fx

from ..kernels.spec import Spec
from ..state import PrunedKeys, StoredValues
from .axes import equal, viewed
from .find_attention import CANONICAL as ATTENTION
from .patterns import (
    COPIES,
    SOFTMAXES,
    VIEWS,
    WRITES,
    Refused,
    argument,
    moved,
    moved_from,
    rank,
    source,
    tensor,
)
from .program import Program
from .scores import is_tensor
from .sites import CachedAttention, CachedSide, kept, wanted

_aten = torch.ops.aten
ATTENTIONS = {ATTENTION, _aten.scaled_dot_product_attention.default, *SOFTMAXES}
"""Where what a layer computes from its cache ends."""
NO_CACHE = "are not returned by the graph: no cache is kept"
LATENT = "are computed from what is cached, as in latent attention"
"""Reasons of refusals, after what they are about."""
ZEROS = {_aten.zeros.default, _aten.full.default, _aten.zeros_like.default, _aten.new_zeros.default}
LAYOUTS = "[B, H, S, D], [B, S, H, D] or [B, S, H * D]"
"""Of a cache that can be stored compressed."""
_ARRANGES = VIEWS | COPIES | {_aten.permute.default, _aten.transpose.int}
_INPUTS = {"placeholder", "get_attr"}


def check(
    program: Program, group: list[CachedAttention], returned: set[fx.Node], live: set[fx.Node]
) -> None:
    """Raise Refused unless the cache of these sites can be stored compressed."""
    site = group[0]
    for name, cached in (("keys", site.key), ("values", site.value)):
        if cached.kept is None:
            raise Refused(_why_not_returned(name, cached.base, returned), cached.operand)
    key, value = site.key, site.value
    if key.slides != value.slides:
        raise Refused("only one of keys and values slides", key.base)
    if key.base is value.base or (key.past is not None and key.past is value.past):
        raise Refused("keys and values are the same tensor", key.base)
    if (key.dim, key.merged) != (value.dim, value.merged) or key.position is not value.position:
        raise Refused("keys and values are written in different ways", key.base)
    wanted(program, site, site.key.slides)
    if site.is_static:
        if program.config.context_parallel is not None:
            raise Refused("a cache with a capacity is not spread over ranks", key.base)
        if key.merged:
            raise Refused(
                "the buffer of the keys has heads and channels in one dimension", key.base
            )
        _check_buffers(program, group)
    _check_past(program, site)
    _check_readers(program, group, live)


def _why_not_returned(name: str, node: fx.Node, returned: set[fx.Node]) -> str:
    """Tell a cache that is kept in a way not known here from no cache at all."""
    after = [value for value in moved(node, forwards=True) if value in returned]
    if any(of in returned for of in _arranged(node)) or any(node in _arranged(v) for v in after):
        return f"the cache keeps the {name} in another layout than {LAYOUTS}"
    if after:
        return f"the cache keeps the {name} changed by {after[0].target}"
    writes = [*moved(node), *(user for value in moved(node, forwards=True) for user in value.users)]
    written = next((write for write in writes if _fills_a_buffer(write, returned)), None)
    if written is not None:
        how = "in a way that is not known for a static cache"
        return f"the {name} are written into a buffer by {written.target}, {how}"
    if _computed_from(node, returned):
        return f"the {name} {LATENT}"
    if any(of.op == "placeholder" for of in _arranged(node)):
        return f"the {name} are an argument of the graph: how they are cached is not part of it"
    return f"the {name} {NO_CACHE}"


def _fills_a_buffer(node: fx.Node, returned: set[fx.Node]) -> bool:
    """Whether a node writes into a tensor that the graph gets or returns, no passing one."""
    if node.target not in WRITES:
        return False
    into: Any = node.args[0]
    before = moved(into)  # a part of it may have been written to already
    return node in returned or any(
        of.op in _INPUTS or _fills_a_buffer(of, returned) for of in before
    )


def _computed_from(node: fx.Node, returned: set[fx.Node]) -> bool:
    """Whether a value depends on what the graph returns, other than through an attention."""
    seen, stack = {node}, [node]
    while stack:
        for operand in stack.pop().all_input_nodes:
            if is_tensor(operand) and rank(operand) == 4 and kept(operand, 2, returned) is not None:
                return True
            if operand not in seen and operand.target not in ATTENTIONS:
                seen.add(operand)
                stack.append(operand)
    return False


def _arranged(node: fx.Node) -> Iterator[fx.Node]:
    """The tensors whose elements a node has, all of them and no others, in whatever layout."""
    yield from (base for base, _ in viewed(node))
    while node.target in _ARRANGES:
        node = node.args[0]  # type: ignore[assignment]
        yield node


def _check_buffers(program: Program, group: list[CachedAttention]) -> None:
    """A buffer is written at consecutive positions and read up to the last token, or masked."""
    for name, side in (("keys", group[0].key), ("values", group[0].value)):
        if side.rolls:
            _check_rolling(name, side)
            continue
        assert side.past is not None
        if side.slides:
            raise Refused(f"the buffer of the {name} is cut after it is written", side.base)
        if side.written_to not in (None, side.past):
            raise Refused(f"the {name} are written into another buffer", side.base)
        made_here = side.past.target in ZEROS
        if side.past.op != "placeholder" and not made_here:
            raise Refused(f"the buffer of the {name} is changed before it is written", side.base)
        if made_here == (side.written_to is not None):
            raise Refused(f"the buffer of the {name} does not outlive the graph", side.base)
        shape, new = tensor(side.base).shape, tensor(side.new).shape
        if not all(equal(shape[dim], new[dim]) for dim in range(4) if dim != side.dim):
            raise Refused(f"the buffer of the {name} is written in part", side.base)
    for site in group:
        for side in (site.key, site.value):
            if (
                not side.rolls
                and not reads_new_alone(side)
                and not _reads_all(side, site.attention)
            ):
                raise Refused("the buffer is read in part, or without a mask", side.operand)


def _check_rolling(name: str, side: CachedSide) -> None:
    """A full buffer gives its first token up for a new one."""
    before: Any = side.base.args[0]
    if before is None or before.target is not _aten.slice.Tensor:
        raise Refused(f"the buffer of the {name} is changed in an unknown way", side.base)
    capacity = tensor(side.written_to).shape[side.dim]  # type: ignore[arg-type]
    filled, stays = tensor(before).shape[side.dim], tensor(side.kept).shape[side.dim]  # type: ignore[arg-type]
    drops_one = argument(before, "start") == 1 and equal(filled, capacity - 1)
    if before.args[0] is not side.written_to or not drops_one or not equal(stays, capacity):
        raise Refused(f"the buffer of the {name} is continued in an unknown way", side.base)


def reads_new_alone(side: CachedSide) -> bool:
    """Whether an attention reads a buffer's first L tokens while L are written: a prefill."""
    if side.rolls:
        return False
    read = tensor(side.operand).shape[2]
    return side.operand is not side.base and equal(read, tensor(side.new).shape[side.dim])


def _reads_all(side: CachedSide, attention: fx.Node) -> bool:
    """Whether an attention reads what is written so far, by its mask or by a slice."""
    read = tensor(side.operand).shape[2]
    if equal(read, side.length):
        return attention.args[3] is not None or attention.args[4] is not None
    position: Any = side.position
    start = position.args[1] if position.target is _aten.full.default else None
    if start is None:
        return False
    first = start.meta["val"] if isinstance(start, fx.Node) else start
    return equal(read, first + tensor(side.new).shape[side.dim])


def _check_past(program: Program, site: CachedAttention) -> None:
    """Keys and values continue one compressed cache each, or none."""
    past_key, past_value = (
        program.states.get(side.past)  # type: ignore[arg-type]
        for side in (site.key, site.value)
    )
    if isinstance(past_key, PrunedKeys) and isinstance(past_value, StoredValues):
        if past_key.spec != past_value.spec or past_key.spec not in _wanted(program, site):
            raise Refused("the cache was compressed with other options", site.attention)
        for side, past in ((site.key, past_key), (site.value, past_value)):
            # A prompt longer than a static window leaves a growing state, which becomes static.
            layout = past.static or side.rolls, past.form.tokens_dim, past.form.merged
            if layout != (site.is_static, side.dim, side.merged):
                raise Refused("the cache was compressed in another layout", side.base)
            if tensor(side.new).dtype != past.dtype:
                raise Refused(f"the new tokens are not {past.dtype} as the cache is", side.base)
        over = program.config.context_parallel
        if past_key.form.ranks > 1 and (over is None or past_key.form[4:6] != over.place):
            raise Refused("the cache is spread over other ranks", site.attention)
        if past_key.form.ranks > 1 and site.key.slides:
            raise Refused("a cache that is spread over ranks slides", site.key.base)
        if isinstance(site.key.keep, SymInt):
            raise Refused("the number of tokens that stay is not constant", site.key.base)
        return
    if not _is_self_attention(site):
        raise Refused(
            "the keys are of other tokens than the queries: cross-attention", site.key.operand
        )
    for side in (site.key, site.value):
        parts = [side.new, side.past or side.new]
        if any(moved_from(part, program.states) for part in parts):
            raise Refused("a compressed cache is continued in an unknown way", side.base)
        if site.is_static or side.past is None:
            continue
        if source(side.past).op not in _INPUTS:
            raise Refused("the cache is changed before it is appended to", side.base)


def _wanted(program: Program, site: CachedAttention) -> list[Spec]:
    """The specs of a past that this site can continue."""
    slides = [True] if site.key.slides else [False, True]
    return [wanted(program, site, each) for each in slides]


def _is_self_attention(site: CachedAttention) -> bool:
    """Whether there is a query for every new key; queries of a group may come as rows."""
    length, rows = tensor(site.key.new).shape[site.key.dim], tensor(site.query).shape[2]
    whole = isinstance(length, int) and isinstance(rows, int) and length and rows % length == 0
    return bool(whole) or equal(length, rows)


def _check_readers(program: Program, group: list[CachedAttention], live: set[fx.Node]) -> None:
    """The appended keys and values must serve these attentions and the next step alone."""
    attentions = {site.attention for site in group}
    for sides in ([site.key for site in group], [site.value for site in group]):
        side = sides[0]
        assert side.kept is not None
        allowed = attentions | {program.output, side.kept}
        allowed |= {view for each in sides for view in _views(each)}
        _refuse_others(side.base, allowed, live, side.written_to)
        _refuse_others(side.kept, allowed, live, side.written_to)
        for each in sides:
            for view in _views(each):
                _refuse_others(view, allowed, live)
        if side.past is not None:
            # A dense past too: this step would compress the cache, and the next one make it dense.
            before = {side.base, side.base.args[0]} if side.rolls else {side.base}
            _refuse_others(side.past, before, live, side.written_to)  # type: ignore[arg-type]


def _views(side: CachedSide) -> list[fx.Node]:
    """The nodes between the base and the attention."""
    views, node = [], side.operand
    while node is not side.base:
        views.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return views


def _refuse_others(
    node: fx.Node, allowed: set[fx.Node], live: set[fx.Node], copied_to: fx.Node | None = None
) -> None:
    for user in node.users:
        if user not in live or user in allowed or user.target is _aten.sym_size.int:
            continue
        if user.target is _aten.copy_.default and copied_to is not None:
            continue
        name = "another attention" if user.target is ATTENTION else str(user.target)
        raise Refused(f"the cache is also read by {name}", user)
