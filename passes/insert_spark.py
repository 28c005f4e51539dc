"""Canonical attention and appends become operators on the pruned cache, or a refusal.

- No compressed past: the attention stays the model's own exact one; right behind it the keys are
  pruned, so that a layer's dense keys die before the next layer's are born.
- A compressed past: one operator appends to the dense tail and attends over packed keys and tail.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import SymInt, Tensor, fx

from .. import ops
from ..cache import PrunedKeys, StoredValues
from ..config import SparkConfig
from ..kernels.layout import kept_channels, key_token_bytes, value_token_bytes
from ..kernels.reference.values import value_bias
from ..report import Refusal, Site
from ..sliding import SlidingKeys
from .axes import equal, viewed
from .dataflow import call, inline, live_nodes
from .find_attention import CANONICAL as ATTENTION
from .find_attention import layer_name, restore
from .find_kv_append import CANONICAL as APPEND
from .patterns import (
    SOFTMAXES,
    WRITES,
    Refused,
    argument,
    is_open_ended,
    moved,
    moved_from,
    rank,
    source,
    tensor,
)
from .program import Program, Replacement
from .scores import is_tensor
from .states import stored_tensors

ATTENTIONS = {ATTENTION, torch.ops.aten.scaled_dot_product_attention.default, *SOFTMAXES}
"""Where what a layer computes from its cache ends."""
LATENT = "are computed from what is cached, as in latent attention"
"""The reason of a refusal, behind what it is about."""
_INPUTS = {"placeholder", "get_attr"}
_OPERATORS = {
    False: torch.ops.spark.append_attend.default,
    True: torch.ops.spark.sliding_append_attend.default,
}
"""Append and attend, by whether tokens have left the cache."""


class _Site(NamedTuple):
    """A canonical attention and what feeds it."""

    attention: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    past_key: fx.Node | None
    past_value: fx.Node | None
    kept_key: fx.Node | None
    """What the cache keeps: the key itself, its last tokens, or None if that is not known."""
    kept_value: fx.Node | None

    @property
    def slides(self) -> bool:
        return self.kept_key is not self.key

    @property
    def dropped(self) -> int | SymInt:
        """Number of first tokens that the cache does not keep."""
        return tensor(self.key).shape[2] - tensor(self.kept_key).shape[2]  # type: ignore[arg-type]


@dataclass(frozen=True)
class InsertSpark:
    """Returns the number of sites that were rewritten; adds every site to the program."""

    def __call__(self, program: Program) -> int:
        returned = {node for node in program.returned() if isinstance(node, fx.Node)}
        live = live_nodes(program.graph)
        refusals: dict[fx.Node, Refusal | None] = {}
        groups: dict[tuple[fx.Node, fx.Node], list[_Site]] = {}
        sites = [
            _site(attention, returned)
            for attention in program.graph.find_nodes(op="call_function", target=ATTENTION)
        ]
        for site in sites:
            groups.setdefault((site.key, site.value), []).append(site)
        described = [_described(site, program.config) for site in sites]
        for group in groups.values():
            refusal = _rewrite(program, group, returned, live)
            refusals.update((site.attention, refusal) for site in group)
        program.sites += [
            replace(report, refusal=refusals[site.attention])
            for site, report in zip(sites, described, strict=True)
        ]
        return sum(refusal is None for refusal in refusals.values())


def _rewrite(
    program: Program, group: list[_Site], returned: set[fx.Node], live: set[fx.Node]
) -> Refusal | None:
    """Rewrite the sites that share one cache, layers that borrow another one's included."""
    try:
        _check(program, group, returned, live)
    except Refused as refused:
        return refused.refusal
    continues = group[0].past_key in program.states
    (_append_and_attend if continues else _store)(program, group)
    return None


def _site(attention: fx.Node, returned: set[fx.Node]) -> _Site:
    query, key, value = attention.args[:3]
    past_key, past_value = (
        node.args[0] if node.target is APPEND else None  # type: ignore[union-attr]
        for node in (key, value)
    )
    kept_key, kept_value = (_kept(node, returned) for node in (key, value))  # type: ignore[arg-type]
    return _Site(attention, query, key, value, past_key, past_value, kept_key, kept_value)  # type: ignore[arg-type]


def _kept(node: fx.Node, returned: set[fx.Node]) -> fx.Node | None:
    """What the graph returns of keys or values: all of them, or the last ones by a slice."""
    if node in returned:
        return node
    return next((user for user in node.users if user in returned and _cuts_front(user)), None)


def _cuts_front(node: fx.Node) -> bool:
    """Whether a node is what its operand ends with along the sequence."""
    if node.target is not torch.ops.aten.slice.Tensor or argument(node, "dim") not in (2, -2):
        return False
    size = tensor(node.args[0]).shape[2]  # type: ignore[arg-type]
    to_the_end = is_open_ended(node) or argument(node, "end") is size
    return to_the_end and argument(node, "step") == 1


def _check(
    program: Program, group: list[_Site], returned: set[fx.Node], live: set[fx.Node]
) -> None:
    """Raise Refused unless the cache of these sites can be stored compressed."""
    site = group[0]
    for name, node, kept in (
        ("keys", site.key, site.kept_key),
        ("values", site.value, site.kept_value),
    ):
        if kept is None:
            raise Refused(_why_not_returned(name, node, returned), node)
    if site.slides != (site.kept_value is not site.value):
        raise Refused("only one of keys and values slides", site.key)
    if site.key is site.value or (site.past_key and site.past_key is site.past_value):
        raise Refused("keys and values are the same tensor", site.key)
    if tensor(site.key).dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Refused(f"keys of {tensor(site.key).dtype} cannot be pruned", site.key)
    _check_past(program, site)
    _check_readers(program, group, live)


def _why_not_returned(name: str, node: fx.Node, returned: set[fx.Node]) -> str:
    """Tell a cache that is kept in a way not known here from no cache at all."""
    behind = [value for value in moved(node, forwards=True) if value in returned]
    if any(base in returned for base, _ in viewed(node)) or any(_is_view(v, node) for v in behind):
        return f"the cache keeps the {name} in another layout than [B, H, S, D]"
    if behind:
        return f"the cache keeps the {name} changed by {behind[0].target}"
    writes = [*moved(node), *(user for value in moved(node, forwards=True) for user in value.users)]
    written = next((write for write in writes if _fills_a_buffer(write, returned)), None)
    if written is not None:
        how = "as in a static cache, not appended by cat"
        return f"the {name} are written into a buffer by {written.target}, {how}"
    if _computed_from(node, returned):
        return f"the {name} {LATENT}"
    return f"the {name} are not returned by the graph: no cache is kept"


def _fills_a_buffer(node: fx.Node, returned: set[fx.Node]) -> bool:
    """Whether a node writes into a tensor that the graph gets or returns, no passing one."""
    if node.target not in WRITES:
        return False
    into: Any = node.args[0]
    return node in returned or any(of.op in _INPUTS for of in moved(into))


def _computed_from(node: fx.Node, returned: set[fx.Node]) -> bool:
    """Whether a value depends on what the graph returns, other than through an attention."""
    seen, stack = {node}, [node]
    while stack:
        for operand in stack.pop().all_input_nodes:
            if is_tensor(operand) and rank(operand) == 4 and _kept(operand, returned) is not None:
                return True
            if operand not in seen and operand.target not in ATTENTIONS:
                seen.add(operand)
                stack.append(operand)
    return False


def _is_view(node: fx.Node, of: fx.Node) -> bool:
    """Whether a tensor holds all elements of another one and no more."""
    return any(base is of for base, _ in viewed(node))


def _check_past(program: Program, site: _Site) -> None:
    """Keys and values continue one compressed cache each, or none."""
    past_key, past_value = (
        program.states.get(past)  # type: ignore[arg-type]
        for past in (site.past_key, site.past_value)
    )
    if isinstance(past_key, PrunedKeys) and isinstance(past_value, StoredValues):
        config = _config(program, site, past_key)
        if not past_key.config.stores_like(config):
            raise Refused("the cache was compressed with other options", site.attention)
        for node, past in ((site.key, past_key), (site.value, past_value)):
            if tensor(node.args[1]).dtype != past.dtype:  # type: ignore[arg-type]
                raise Refused(f"the new tokens are not {past.dtype} as the cache is", node)
        return
    if site.past_key is None and not _is_self_attention(site):
        raise Refused("the keys are of other tokens than the queries: cross-attention", site.key)
    for node in (site.key, site.value):
        parts = (node.args[0] or node, node.args[1]) if node.target is APPEND else (node,)
        if any(moved_from(part, program.states) for part in parts):  # type: ignore[arg-type]
            raise Refused("a compressed cache is continued in an unknown way", node)
        before: Any = node.args[0] if node.target is APPEND else None
        if before is not None and source(before).op not in _INPUTS:
            raise Refused("the cache is changed before it is appended to", node)


def _is_self_attention(site: _Site) -> bool:
    """Whether there is a query for every key; queries of a group may come as rows."""
    length, rows = tensor(site.key).shape[2], tensor(site.query).shape[2]
    whole = isinstance(length, int) and isinstance(rows, int) and length and rows % length == 0
    return bool(whole) or equal(length, rows)


def _config(program: Program, site: _Site, past: PrunedKeys | None = None) -> SparkConfig:
    """The options of a site's state."""
    slides = site.slides or isinstance(past, SlidingKeys)
    return program.config.sliding() if slides else program.config


def _check_readers(program: Program, group: list[_Site], live: set[fx.Node]) -> None:
    """The appended keys and values must serve these attentions and the next step alone."""
    site, attentions = group[0], {site.attention for site in group}
    for append, kept, past in (
        (site.key, site.kept_key, site.past_key),
        (site.value, site.kept_value, site.past_value),
    ):
        assert kept is not None
        _refuse_others(append, attentions | {program.output, kept}, live)
        _refuse_others(kept, attentions | {program.output}, live)
        if past is not None:
            # A dense past too: this step would compress the cache, and the next one make it dense.
            _refuse_others(past, {append}, live)


def _refuse_others(node: fx.Node, allowed: set[fx.Node], live: set[fx.Node]) -> None:
    for user in node.users:
        if user in live and user not in allowed and user.target is not torch.ops.aten.sym_size.int:
            name = "another attention" if user.target is ATTENTION else str(user.target)
            raise Refused(f"the cache is also read by {name}", user)


def _store(program: Program, group: list[_Site]) -> None:
    """Prune keys and values behind the exact attention of a prefill."""
    site = group[0]
    assert site.kept_key is not None
    assert site.kept_value is not None
    config, length = _config(program, site), tensor(site.kept_key).shape[2]
    originals = [restore(sharer.attention) for sharer in group]
    key, value = (
        restore(node) if node.target is APPEND else node for node in (site.key, site.value)
    )
    if site.slides:
        key, value = site.kept_key, site.kept_value
    with program.graph.inserting_before(max(*originals, key, value).next):
        stats = _query_stats(program, group, config)
        keys = inline(program, store_keys, (key, stats), config)
        values = inline(program, store_values, (value,), config)
    program.replaced[key] = Replacement(keys, True, length, None, site.slides)
    program.replaced[value] = Replacement(values, False, length, None, site.slides)


def _query_stats(program: Program, group: list[_Site], config: SparkConfig) -> fx.Node:
    """The statistics of all queries that meet a cache in this graph."""
    kv_heads = tensor(group[0].key).shape[1]
    stats = [
        call(program, torch.ops.spark.query_stats.default, (site.query, kv_heads, config.window))
        for site in group
    ]
    return reduce(lambda one, two: call(program, torch.ops.aten.add.Tensor, (one, two)), stats)


def store_keys(key: Tensor, stats: Tensor, config: SparkConfig) -> tuple[Tensor, ...]:
    """The stored tensors of dense keys [B, Hkv, S, D]: kept, bits, scale, norms, stats, tail."""
    packed, sinks = config.packed_length(key.shape[2]), config.sink_tokens
    kept = kept_channels(key.shape[3], config.key_ratio)
    norms = stats.sqrt()
    # With nothing to pack yet the rows are only room for the first block.
    body = key[:, :, sinks : sinks + packed] if packed else _room(key, config.window)
    quantized = config.key_dtype == "int8"
    rows = ops.prune(body, norms, norms, kept, config.recovery, config.saliency, quantized)
    dense = (key[:, :, :sinks], key[:, :, sinks + packed :]) if packed else (key,)
    tail = torch.cat((*dense, _room(key, config.window)), dim=2)
    return (*rows, norms, torch.zeros_like(stats) if packed else stats, tail)


def store_values(value: Tensor, config: SparkConfig) -> tuple[Tensor, ...]:
    """The stored tensors of values [B, Hkv, S, Dv] (``config.value_fields``), with some room."""
    padded = torch.cat((value, _room(value, config.window)), dim=2)
    if config.value_fields == ("rows",):
        return (padded,)
    bias = value_bias(value) if config.value_ratio else None
    kept = kept_channels(value.shape[3], config.value_ratio)
    packed = ops.pack_values(padded, bias, kept, config.value_dtype == "int8")
    named = dict(zip(("rows", "value_bits", "value_scale"), packed, strict=True))
    if bias is not None:
        named["value_bias"] = bias
    return tuple(named[name] for name in config.value_fields)


def _room(like: Tensor, rows: int) -> Tensor:
    return like.new_zeros((*like.shape[:2], rows, like.shape[3]))


def _append_and_attend(program: Program, group: list[_Site]) -> None:
    """One operator in place of append, recovery and attention; sharers append nothing."""
    site = group[0]
    assert site.past_key is not None
    assert site.past_value is not None
    new: list[fx.Node] = [site.key.args[1], site.value.args[1]]  # type: ignore[list-item]
    key, value = (stored_tensors(program, past) for past in (site.past_key, site.past_value))
    for past in (site.past_key, site.past_value):
        program.extra[past] = tensor(new[0]).shape[2]
    config = _config(program, site, program.states[site.past_key])  # type: ignore[arg-type]
    for sharer in group:
        with program.graph.inserting_before(sharer.attention):
            output = _attend(program, sharer.attention, new, key, value, config)
            if sharer is site and len(group) > 1:
                added = call(program, torch.ops.aten.sym_size.int, (new[0], 2))
                key = key | {"length": call(program, operator.add, (key["length"], added))}
                new = [call(program, torch.ops.aten.slice.Tensor, (n, 2, 0, 0)) for n in new]
            if sharer is group[-1]:
                recent = _query_stats(program, group, config)
                stats = call(program, torch.ops.aten.add.Tensor, (key["stats"], recent))
        sharer.attention.replace_all_uses_with(output)
    for kept, past, nodes in (
        (site.kept_key, site.past_key, (stats,)),
        (site.kept_value, site.past_value, ()),
    ):
        assert kept is not None
        length = tensor(site.key).shape[2]
        program.replaced[kept] = Replacement(
            nodes, kept is site.kept_key, length, past, dropped=site.dropped
        )


def _attend(
    program: Program, attention: fx.Node, new: list[fx.Node], key: dict[str, Any],
    value: dict[str, Any], config: SparkConfig,
) -> fx.Node:  # fmt: skip
    """Append ``new`` key and value tokens, then attend."""
    sliding = "first" in key
    firsts = (key["first"], value["first"]) if sliding else ()
    mask, causal_offset, scale, softcap, sinks = attention.args[3:]
    pair = call(program, _OPERATORS[sliding], (
        attention.args[0], *firsts, *new,
        key["kept"], key["bits"], key["scale"], key["norms"], key["packed_length"],
        key["tail"], value["rows"], key["length"],
        mask, causal_offset, scale, softcap, sinks,
        config.sink_tokens, config.recovery, config.saliency, False,
        value.get("value_bits"), value.get("value_scale"), value.get("value_bias"),
    ))  # fmt: skip
    return call(program, operator.getitem, (pair, 0))


def _described(site: _Site, config: SparkConfig) -> Site:
    (_, query_heads, _, _), (_, kv_heads, _, key_dim) = (
        tensor(site.query).shape,
        tensor(site.key).shape,
    )
    value_dim, itemsize = tensor(site.value).shape[3], tensor(site.key).element_size()
    key_bytes = key_token_bytes(
        key_dim, config.key_ratio, itemsize, config.recovery, config.key_dtype == "int8"
    )
    value_itemsize = tensor(site.value).element_size()
    value_bytes = value_token_bytes(
        value_dim, config.value_ratio, value_itemsize, config.value_dtype == "int8"
    )
    return Site(
        layer_name(site.attention), int(query_heads), int(kv_heads), int(key_dim), int(value_dim),
        dense_token_bytes=int(kv_heads * (key_dim * itemsize + value_dim * value_itemsize)),
        stored_token_bytes=int(kv_heads * (key_bytes + value_bytes)),
    )  # fmt: skip
