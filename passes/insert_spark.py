"""Canonical attention and appends become operators on the pruned cache, or a refusal.

- No compressed past: the attention stays the model's own exact one; right after it the cache is
  built, so that a layer's dense keys die before the next layer's are born.
- A compressed past: one operator attends over the cache and the new tokens, and appends those.
- A buffer of the model is a past too: what it holds becomes a state of the same capacity.
- Of a cache that is spread over ranks: one operator over a rank's own tokens, one collective, and
  what puts together what the ranks have found.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch import SymInt, fx

from .. import spread_ops  # noqa: F401  (defines operators)
from ..form import StateForm
from ..kernels.spec import SIDES, Spec
from ..kernels.spread import merged
from ..report import Refusal
from .dataflow import call, inline, live_nodes
from .eligibility import check, reads_new_alone
from .find_attention import CANONICAL as ATTENTION
from .find_attention import heads_first, restore
from .find_kv_append import CANONICAL as APPEND
from .patterns import Refused, tensor
from .program import Growth, Program, Replacement
from .sites import (
    CachedAttention,
    CachedSide,
    cached_attention,
    described,
    spec_of,
    written_buffers,
)
from .states import adopt, stored_tensors

_aten = torch.ops.aten
Stored = tuple[fx.Node, fx.Node, fx.Node, fx.Node]
"""Pages and head of the keys and of the values."""


@dataclass(frozen=True)
class InsertSpark:
    """Returns the number of sites that were rewritten; adds every site to the program."""

    def __call__(self, program: Program) -> int:
        returned = {node for node in program.returned() if isinstance(node, fx.Node)}
        live, written = live_nodes(program.graph), written_buffers(program.graph)
        refusals: dict[fx.Node, Refusal | None] = {}
        groups: dict[tuple[fx.Node, fx.Node], list[CachedAttention]] = {}
        sites = [
            cached_attention(attention, returned, written)
            for attention in program.graph.find_nodes(op="call_function", target=ATTENTION)
        ]
        for site in sites:
            groups.setdefault((site.key.base, site.value.base), []).append(site)
        reports = [described(program, site) for site in sites]
        for group in groups.values():
            refusal = _rewrite(program, group, returned, live)
            refusals.update((site.attention, refusal) for site in group)
        program.sites += [
            replace(report, refusal=refusals[site.attention])
            for site, report in zip(sites, reports, strict=True)
        ]
        return sum(refusal is None for refusal in refusals.values())


def _rewrite(
    program: Program, group: list[CachedAttention], returned: set[fx.Node], live: set[fx.Node]
) -> Refusal | None:
    """Rewrite the sites that share one cache, layers that borrow another one's included."""
    try:
        check(program, group, returned, live)
    except Refused as refused:
        return refused.refusal
    site = group[0]
    if site.is_static:
        _rewrite_static(program, group)
    elif site.key.past in program.states:
        _continue(program, group)
    else:
        _store(program, group)
    return None


def _store(program: Program, group: list[CachedAttention]) -> None:
    """Build a growing cache after the exact attention of a prefill."""
    site, spec = group[0], spec_of(program, group[0])
    originals = [restore(sharer.attention) for sharer in group]
    bases = [
        restore(side.base) if side.base.target is APPEND else side.base for _, side in site.sides
    ]
    # The last tokens alone, where the cache slides.
    kept = [
        side.kept if side.slides else base
        for (_, side), base in zip(site.sides, bases, strict=True)
    ]
    after = max(*originals, *(sharer.query for sharer in group), *kept)  # type: ignore[type-var]
    over = None if site.key.slides else program.config.context_parallel
    place = None if over is None else over.place
    stored = _built(program, group, kept, spec, None, after, site, place)  # type: ignore[arg-type]
    length = tensor(kept[0]).shape[site.key.dim]  # type: ignore[arg-type]
    ranks = place or (1, 0)
    form = StateForm(spec, False, site.key.dim, program.config.strict, *ranks, site.key.merged)
    _replace(program, form, kept, stored, length)  # type: ignore[arg-type]


def _continue(program: Program, group: list[CachedAttention]) -> None:
    """Attend over a growing cache and append to it."""
    site = group[0]
    _attend(program, group, _stored(program, site), None)
    growth = Growth(tensor(site.key.new).shape[site.key.dim], site.key.keep, len(group) > 1)
    for side, cached in site.sides:
        assert cached.past is not None
        assert cached.kept is not None
        program.growth[cached.past] = growth
        form = program.states[cached.past].form
        program.replaced[cached.kept] = Replacement(side, form, past=cached.past)


def _rewrite_static(program: Program, group: list[CachedAttention]) -> None:
    """A cache with a capacity: one that the model made before, or makes in this graph."""
    site, spec = group[0], spec_of(program, group[0])
    assert site.key.past is not None
    assert site.value.past is not None
    made_here = site.key.past.op != "placeholder"
    # Where Dynamo has made the size a symbol, a guard: a graph for each capacity.
    capacity = int(tensor(site.key.past).shape[site.key.dim])
    if not made_here:
        form = StateForm(spec, True, site.key.dim, program.config.strict)
        for side, cached in site.sides:
            adopt(program, cached.past, side, form, cached.position)  # type: ignore[arg-type]
    if all(reads_new_alone(side) for sharer in group for _, side in sharer.sides):
        stored = _prefill(program, group, spec, capacity)
        if not made_here:
            after = stored[-1]
            for into, built in zip(_stored(program, site), stored, strict=True):
                with program.graph.inserting_after(after):
                    after = call(program, _aten.copy_.default, (into, built))
    else:
        if made_here:
            nothing = [_empty(program, side) for _, side in site.sides]
            after = max(nothing)
            stored = _built(program, [], nothing, spec, capacity, after, site)
        else:
            stored = _stored(program, site)
        _attend(program, group, stored, site.key.position)
    if made_here:
        kept = [side.base for _, side in site.sides]
        form = StateForm(spec, True, site.key.dim, program.config.strict)
        _replace(program, form, kept, stored, capacity)
    for _, cached in site.sides:
        for user in list(cached.kept.users):  # type: ignore[union-attr]
            if user.target is _aten.copy_.default:
                program.graph.erase_node(user)


def _prefill(program: Program, group: list[CachedAttention], spec: Spec, capacity: int) -> Stored:
    """The exact attention over the new tokens, which are the first ones, and the cache of them."""
    site = group[0]
    originals = [restore(sharer.attention) for sharer in group]
    for sharer in group:
        for _, side in sharer.sides:
            front = side.operand if side.dim == 2 else side.operand.args[0]
            front.replace_all_uses_with(side.new)  # type: ignore[union-attr]
    position = site.key.position
    assert position is not None
    tokens = [side.new for _, side in site.sides]
    after = max(*originals, *(sharer.query for sharer in group), *tokens, position)
    with program.graph.inserting_before(after.next):
        first = call(program, _aten.select.int, (position, 0, 0))
        is_first = call(program, _aten.eq.Scalar, (first, 0))
        message = "a prefill that reads its own tokens alone must write them to position 0"
        checked = call(program, _aten._assert_async.msg, (is_first, message))
    return _built(program, group, tokens, spec, capacity, checked, site)


def _empty(program: Program, side: CachedSide) -> fx.Node:
    """No tokens, in the model's layout."""
    with program.graph.inserting_after(side.new):
        return call(program, _aten.slice.Tensor, (side.new, side.dim, 0, 0))


def _built(
    program: Program, group: list[CachedAttention], tokens: list[fx.Node], spec: Spec,
    capacity: int | None, after: fx.Node, site: CachedAttention,
    place: tuple[int, int] | None = None,
) -> Stored:  # fmt: skip
    """Build a cache of dense tokens, in the layout of a site, after a node.

    Args:
        place: number of ranks that it is spread over, and which one this is.
    """
    with program.graph.inserting_before(after.next):
        key, value = (
            heads_first(program, node, side.dim, side.heads)
            for node, (_, side) in zip(tokens, site.sides, strict=True)
        )
        queries = [sharer.query for sharer in group]
        args: tuple[object, ...] = (key, value, queries, spec.text, capacity)
        if group and spec.evict is not None:
            positions = _kept_positions(program, group, key, spec)
            rows = [_taken(program, node, positions) for node in (key, value)]
            args = (*rows, *args[2:], positions)
        if place is None:
            built = call(program, torch.ops.spark.build.default, args)
        else:
            built = call(program, torch.ops.spark.build_own.default, (*args[:4], list(place)))
        stored = [call(program, operator.getitem, (built, index)) for index in range(4)]
    return tuple(stored)  # type: ignore[return-value]


def _kept_positions(
    program: Program, group: list[CachedAttention], key: fx.Node, spec: Spec
) -> fx.Node:
    """Which of the keys [B, H, S, D] of a prompt stay, by the mask of the first attention."""
    mask, causal_offset, scale, softcap, _sinks = group[0].attention.args[3:]
    queries = [sharer.query for sharer in group]
    text = spec.attending(scale, softcap).text  # type: ignore[arg-type]
    args = (key, queries, mask, causal_offset, text)
    return call(program, torch.ops.spark.evict.default, args)


def _taken(program: Program, node: fx.Node, positions: fx.Node) -> fx.Node:
    """The tokens [B, H, S', D] at positions [B, H, S'] of tokens [B, H, S, D]."""
    index = call(program, _aten.unsqueeze.default, (positions, 3))
    index = call(program, _aten.expand.default, (index, [-1, -1, -1, tensor(node).shape[3]]))
    return call(program, _aten.gather.default, (node, 2, index))


def _attend(
    program: Program, group: list[CachedAttention], stored: Stored, position: fx.Node | None
) -> None:
    """One operator in place of append and attention; the last sharer appends."""
    site = group[0]
    for sharer in group:
        mask, causal_offset, scale, softcap, sinks = sharer.attention.args[3:]
        keep = site.key.keep if sharer is group[-1] else None
        rolls = site.key.keep if site.key.rolls else 0
        text = spec_of(program, site).attending(scale, softcap, rolls).text  # type: ignore[arg-type]
        with program.graph.inserting_before(sharer.attention):
            new = [heads_first(program, s.new, s.dim, s.heads) for _, s in site.sides]
            given = (sharer.query, *new, *stored, mask, sinks, causal_offset)
            past = program.states.get(site.key.past)  # type: ignore[arg-type]
            if past is None or past.form.ranks == 1:
                args = (*given, keep, position, text)
                output = call(program, torch.ops.spark.step.default, args)
            else:
                tokens = stored_tensors(program, site.key.past)["length"]  # type: ignore[arg-type]
                place = [past.form.ranks, past.form.rank]
                args = (*given, keep is not None, tokens, place, text)
                part = call(program, torch.ops.spark.step_own.default, args)
                output = _merged(program, part, tensor(sharer.attention).dtype)
        sharer.attention.replace_all_uses_with(output)


def _merged(program: Program, part: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The attention over all tokens, of what each rank has found over its own."""
    group = program.config.context_parallel
    assert group is not None
    collective = torch.ops._c10d_functional
    args = (part, group.ranks, group.name)
    parts = call(program, collective.all_gather_into_tensor.default, args)
    parts = call(program, collective.wait_tensor.default, (parts,))
    (output,) = inline(program, merged, (parts,), group.ranks, dtype)
    return output


def _stored(program: Program, site: CachedAttention) -> Stored:
    """The placeholders of the past's stored tensors."""
    key, value = (stored_tensors(program, side.past) for _, side in site.sides)  # type: ignore[arg-type]
    return key["pages"], key["head"], value["pages"], value["head"]


def _replace(
    program: Program, form: StateForm, kept: list[fx.Node], stored: Stored, length: int | SymInt
) -> None:
    """Return new states in the place of dense keys and values."""
    for side, node, nodes in zip(SIDES, kept, (stored[:2], stored[2:]), strict=True):
        program.replaced[node] = Replacement(side, form, nodes=nodes, length=length)
