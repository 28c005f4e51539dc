"""Any way to write attention becomes one ``torch.ops.spark.attention``.

The canonical node takes over the uses of the original output; the original nodes stay in the
graph, dead, so that a site which is refused later gets back exactly what the model computed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import fx

from .. import ops as _registered  # noqa: F401  (torch.ops.spark)
from ..report import Refusal, Site
from .attention import MATCHERS, Attention
from .causal import without_causal_mask
from .dataflow import call, live_nodes, readers_inside
from .operands import as_output, mask_of, query_of, sinks_of
from .patterns import WRITES, Refused, rank
from .program import Program

CANONICAL = torch.ops.spark.attention.default
_aten = torch.ops.aten
GROWS = (_aten.cat.default, *WRITES)
"""Operators whose result may be a cache."""
_FRAME = re.compile(r"^L\['[^']*'\](\[\d+\])?(\.__self__)?\.?")
"""How Dynamo gets from the frame that it compiles to the module that is called."""
ORIGINAL = "spark_original"
"""Key of ``node.meta`` under which a canonical node keeps the node that it replaces."""
RESULT = "spark_result"
"""Key for the node that took over those uses: the canonical node, or a cast or view of it."""


@dataclass(frozen=True)
class FindAttention:
    """Returns the number of attentions that were made canonical; the others are refused."""

    def __call__(self, program: Program) -> int:
        live = live_nodes(program.graph)
        nodes = [node for node in program.graph.nodes if node in live]
        kept = {node for node in program.returned() if isinstance(node, fx.Node)}
        kept.update(
            node.args[0]  # type: ignore[misc]
            for node in list(kept)
            if node.target is _aten.slice.Tensor  # the last tokens of a cache that slides
        )
        for target in GROWS:
            kept.update(program.graph.find_nodes(op="call_function", target=target))
        return sum(self._visit(program, node, live, kept) for node in nodes)

    def _visit(
        self, program: Program, node: fx.Node, live: set[fx.Node], kept: set[fx.Node]
    ) -> bool:
        try:
            for matcher in MATCHERS:
                attention = matcher(node, kept)
                if attention is not None:
                    _check(attention, live)
                    _replace(program, attention)
                    return True
        except Refused as refused:
            program.sites.append(refused_site(node, refused.refusal))
        return False


def has_softmax(graph: fx.Graph) -> bool:
    """Whether there is a softmax, or an operator with one in it: maybe (a part of) an attention."""
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return any("softmax" in name or "attention" in name for name in names)


def _check(attention: Attention, live: set[fx.Node]) -> None:
    """Refuse an attention whose scores or weights have other readers."""
    readers = readers_inside(attention.scores, attention.output)
    others = [reader for reader in readers if reader in live]
    if others:
        raise Refused("the attention weights are also used elsewhere", others[0])


def _replace(program: Program, attention: Attention) -> None:
    original = attention.output
    attention, causal = without_causal_mask(attention)
    with program.graph.inserting_before(original):
        query, mask = query_of(program, attention), mask_of(program, attention)
        offset = attention.causal_offset if causal is None else causal.node(program)
        sinks = sinks_of(program, attention)
        key, value = (
            heads_first(program, node, tokens_dim, attention.kv_heads)
            for node, tokens_dim in zip(
                (attention.key, attention.value), attention.tokens_dims, strict=True
            )
        )
    with program.graph.inserting_after(original):
        canonical = call(
            program,
            CANONICAL,
            (
                query, key, value, mask, offset, attention.scale,
                attention.softcap, sinks,
            ),
        )  # fmt: skip
    with program.graph.inserting_before(canonical.next):
        result = as_output(program, canonical, attention)
    original.replace_all_uses_with(result, lambda user: user is not result)
    canonical.meta = {
        **original.meta, "val": canonical.meta["val"], ORIGINAL: original, RESULT: result,
    }  # fmt: skip


def heads_first(program: Program, node: fx.Node, tokens_dim: int, heads: int) -> fx.Node:
    """Tokens [B, H, S, D], [B, S, H, D] or [B, S, H * D] as [B, H, S, D]."""
    if rank(node) == 3:
        node = call(program, _aten.unflatten.int, (node, 2, [heads, -1]))
    return node if tokens_dim == 2 else call(program, _aten.transpose.int, (node, 1, 2))


def restore(canonical: fx.Node) -> fx.Node:
    """Give the uses back to the node that a canonical one replaces, and return that node."""
    original: fx.Node = canonical.meta[ORIGINAL]
    canonical.meta.get(RESULT, canonical).replace_all_uses_with(original)
    return original


def refused_site(node: fx.Node, refusal: Refusal) -> Site:
    """The site of an attention whose operands are not known."""
    return Site(layer_name(node), 0, 0, 0, 0, 0, 0, refusal)


def layer_name(node: fx.Node) -> str:
    """The module path that a node was traced in, or its own name."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    path = str(paths[-1]) if paths else ""
    return _FRAME.sub("", path) or node.name
