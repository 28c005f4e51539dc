"""Cached attentions: a canonical attention, the appends that feed it, and what the cache keeps."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, fx

from ..kernels.formats import Format
from ..kernels.reference.store import ALL
from ..kernels.spec import DTYPES, SIDES, Side, Spec
from ..report import Site
from .axes import equal
from .find_attention import layer_name
from .find_kv_append import CANONICAL as APPEND
from .find_kv_append import candidates
from .patterns import Refused, argument, is_open_ended, rank, tensor
from .program import Program

_aten = torch.ops.aten


@dataclass(frozen=True)
class CachedSide:
    """The keys or the values of an attention."""

    operand: fx.Node
    """[B, Hkv, S, D], what the attention reads."""
    base: fx.Node
    """The append that it is a view of, or the operand itself; in the model's layout."""
    dim: int
    """Of the sequence in ``base``: 2, or 1 in a cache [B, S, H, D] or [B, S, H * D]."""
    kept: fx.Node | None
    """What the cache keeps: the base, its last tokens, or None if that is not known."""
    written_to: fx.Node | None
    """The placeholder that the base is copied to, where the cache is a buffer of the model."""

    @property
    def past(self) -> fx.Node | None:
        """The cache before the append; of a buffer that is cut for it, the whole."""
        before: Any = self.base.args[0] if self.base.target is APPEND else None
        return self.written_to if self.rolls else before

    @property
    def rolls(self) -> bool:
        """Whether a buffer of the model drops its first tokens to take new ones."""
        return self.written_to is not None and self.position is None

    @property
    def new(self) -> fx.Node:
        """The new tokens, in the model's layout."""
        return self.base.args[1] if self.base.target is APPEND else self.base  # type: ignore[return-value]

    @property
    def position(self) -> fx.Node | None:
        """Where they are written; None where they are appended."""
        return self.base.args[2] if self.base.target is APPEND else None  # type: ignore[return-value]

    @property
    def heads(self) -> int:
        """Hkv."""
        return int(tensor(self.operand).shape[1])

    @property
    def merged(self) -> bool:
        """Whether heads and channels are one dimension of the cache."""
        return rank(self.base) == 3

    @property
    def slides(self) -> bool:
        return self.rolls or self.kept is not self.base

    @property
    def length(self) -> int | SymInt:
        """Number of tokens in the base."""
        return tensor(self.base).shape[self.dim]

    @property
    def keep(self) -> int | SymInt:
        """Number of latest tokens that the cache keeps."""
        kept = tensor(self.kept).shape[self.dim]  # type: ignore[arg-type]
        if self.rolls:
            # The first token of a full buffer goes before the next one is read.
            return int(tensor(self.written_to).shape[self.dim]) - 1  # type: ignore[arg-type]
        return ALL if equal(kept, self.length) else kept


@dataclass(frozen=True)
class CachedAttention:
    """A canonical attention and what feeds it."""

    attention: fx.Node
    query: fx.Node
    key: CachedSide
    value: CachedSide

    @property
    def sides(self) -> tuple[tuple[Side, CachedSide], ...]:
        return tuple(zip(SIDES, (self.key, self.value), strict=True))

    @property
    def is_static(self) -> bool:
        """Whether the cache has a capacity."""
        return self.key.position is not None or self.key.rolls


def cached_attention(
    attention: fx.Node, returned: set[fx.Node], written: dict[fx.Node, fx.Node]
) -> CachedAttention:
    """What feeds a canonical attention, and what of that outlives the graph.

    Args:
        returned: what the graph returns.
        written: the placeholders that values are copied to at its end.
    """
    query, key, value = attention.args[:3]
    sides = (_side(operand, returned, written) for operand in (key, value))  # type: ignore[arg-type]
    return CachedAttention(attention, query, *sides)  # type: ignore[arg-type]


def _side(operand: fx.Node, returned: set[fx.Node], written: dict[fx.Node, fx.Node]) -> CachedSide:
    found = list(candidates(operand))
    # Of a buffer the first tokens may be read; else the whole cache is.
    whole = [found[0], *(one for one in found[1:] if rank(one[0]) == 3)]
    appends = [
        one
        for one in found
        if one[0].target is APPEND and (one[0].args[2] is not None or one in whole)
    ]
    known = [one for one in whole if kept(*one, returned) is not None]
    base, dim = (appends or known or [(operand, 2)])[0]
    if base.target is APPEND:
        stays = kept(base, dim, written.keys())
        if stays is not None:
            return CachedSide(operand, base, dim, stays, written[stays])
    return CachedSide(operand, base, dim, kept(base, dim, returned), None)


def kept(node: fx.Node, dim: int, returned: Collection[fx.Node]) -> fx.Node | None:
    """What the graph returns of keys or values: all of them, or the last ones by a slice."""
    if node in returned:
        return node
    users = (user for user in node.users if user in returned)
    return next((user for user in users if _cuts_front(user, dim)), None)


def _cuts_front(node: fx.Node, dim: int) -> bool:
    """Whether a node is what its operand ends with along the sequence."""
    if node.target is not _aten.slice.Tensor or argument(node, "dim") % rank(node) != dim:
        return False
    size = tensor(node.args[0]).shape[dim]  # type: ignore[arg-type]
    to_the_end = is_open_ended(node) or argument(node, "end") is size
    return to_the_end and argument(node, "step") == 1


def formats(program: Program, site: CachedAttention) -> list[Format]:
    """How the options want the keys and the values of a site stored.

    Raises:
        Refused: they have a dtype that is not stored, or an option names a format that cannot
            store them.
    """
    layer, found = layer_name(site.attention), []
    sizes = [(int(t.shape[3]), t.dtype) for t in (tensor(s.operand) for _, s in site.sides)]
    for (side, cached), size, other in zip(site.sides, sizes, reversed(sizes), strict=True):
        stored = tensor(cached.operand)
        if stored.dtype not in DTYPES.values():
            raise Refused(f"{side}s of {stored.dtype} cannot be pruned", cached.operand)
        try:
            format = program.config.format_for(side, *size, layer, other)
        except ValueError as error:
            raise Refused(str(error), site.attention) from error
        if format.uses_queries and stored.shape[3] != tensor(site.query).shape[3]:
            reason = f"format {format.text} needs queries of as many channels as the {side}s have"
            raise Refused(reason, cached.operand)
        found.append(format)
    return found


def wanted(program: Program, site: CachedAttention, slides: bool) -> Spec:
    """How the options want a site's cache stored, of one that slides or of one that does not.

    Raises:
        Refused: see :func:`formats`; also if an option cannot tell which layer this is.
    """
    key, value = formats(program, site)
    try:
        layer = layer_name(site.attention)
        static = site.is_static and program.rolls
        return program.config.spec(key, value, slides=slides, static=static, layer=layer)
    except ValueError as error:
        raise Refused(str(error), site.attention) from error


def spec_of(program: Program, site: CachedAttention) -> Spec:
    """How a site's cache is stored: as its past is, or as the options want.

    Raises:
        Refused: see :func:`wanted`.
    """
    past = program.states.get(site.key.past)  # type: ignore[arg-type]
    if past is not None:
        return past.spec
    return wanted(program, site, site.key.slides)


def described(program: Program, site: CachedAttention) -> Site:
    """The site as a report has it, with the bytes of one token before and after."""
    key, value = tensor(site.key.operand), tensor(site.value.operand)
    kv_heads = int(key.shape[1])
    shape = int(tensor(site.query).shape[1]), kv_heads, int(key.shape[3]), int(value.shape[3])
    row_bytes = sum(t.shape[3] * t.element_size() for t in (key, value))
    try:
        spec = spec_of(program, site)
    except Refused:
        stored, names, evict = 0, ("", ""), ""
    else:
        page_bytes = sum(spec.pages(side).page_bytes for side in SIDES)
        stored = -(-kv_heads * page_bytes // spec.window)
        names = spec.key.text, spec.value.text
        evict = "" if spec.evict is None else spec.evict.text
    return Site(
        layer_name(site.attention), *shape, dense_token_bytes=int(kv_heads * row_bytes),
        stored_token_bytes=stored, formats=names, evict=evict,
    )  # fmt: skip


def written_buffers(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The placeholders that values are copied to at the end of a graph, by the value."""
    copies: list[Any] = graph.find_nodes(op="call_function", target=_aten.copy_.default)
    return {
        copy.args[1]: copy.args[0]
        for copy in copies
        if copy.args[0].op == "placeholder" and isinstance(copy.args[1], fx.Node)
    }
