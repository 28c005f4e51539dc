"""Every way to add tokens to a key/value cache becomes one ``torch.ops.spark.kv_append``.

Alternatives: ``cat`` of past and new tokens along the sequence; ``cat`` of an empty tensor and the
first tokens; a write into a preallocated buffer by ``index_copy``, by ``index_put`` at positions,
or by slice assignment; a full buffer that rolls: ``roll`` by one and a write at its end, or a
``cat`` to its last tokens. The sequence is dimension 2 of a cache [B, H, S, D], or dimension 1 of
[B, S, H, D] and of [B, S, H * D], which grows by ``cat`` alone. A cache that returns its first
tokens unchanged has no append to find.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import ops as _registered  # noqa: F401  (torch.ops.spark)
from ..torch_private import statically_known_true
from .axes import equal, merged, same_shape, viewed
from .dataflow import call
from .find_attention import CANONICAL as ATTENTION
from .find_attention import ORIGINAL
from .patterns import argument, moved_from, rank, tensor
from .program import Program
from .scores import constant, is_tensor

CANONICAL = torch.ops.spark.kv_append.default
_aten = torch.ops.aten


@dataclass(frozen=True)
class Found:
    """The operands of an append."""

    past: fx.Node | None
    new: fx.Node
    dim: int
    """Of the sequence: 2, or 1 of a cache [B, S, H, D] or [B, S, H * D]."""
    position: Any = None
    """Where the new tokens are written: a tensor, or the first one as a number; None: at the end"""


@dataclass(frozen=True)
class FindKVAppend:
    """Returns the number of appends that feed a canonical attention."""

    def __call__(self, program: Program) -> int:
        given = set(program.arguments)
        program.continues = any(_takes_a_past(node, given) for node in program.graph.nodes)
        found = 0
        positions: dict[Any, fx.Node] = {}
        for attention in program.graph.find_nodes(op="call_function", target=ATTENTION):
            for operand in (attention.args[1], attention.args[2]):
                for node, dim in candidates(operand):
                    found += _canonicalize(program, node, dim, positions)
        return found


def candidates(operand: fx.Node) -> Iterator[tuple[fx.Node, int]]:
    """What may be the append that an attention's operand is a view of, with its sequence's dim."""
    dim = 2
    if _turns_heads(operand):
        operand, dim = operand.args[0], 1  # type: ignore[assignment]
    yield operand, dim
    if is_front(operand, dim):
        yield operand.args[0], dim  # type: ignore[misc]
    whole = merged(operand, dim)
    if whole is not None:
        yield whole, 1


def _turns_heads(node: fx.Node) -> bool:
    """Whether a node is [B, H, S, D] of [B, S, H, D]."""
    if node.target is _aten.permute.default:
        return list(node.args[1]) == [0, 2, 1, 3]  # type: ignore[arg-type]
    return node.target is _aten.transpose.int and {*node.args[1:3]} == {1, 2}


def is_front(node: fx.Node, dim: int) -> bool:
    """Whether a node is a slice from the first token on."""
    if node.target is not _aten.slice.Tensor or argument(node, "dim") % rank(node) != dim:
        return False
    return argument(node, "start") in (None, 0) and argument(node, "step") == 1


def _takes_a_past(node: fx.Node, given: set[fx.Node]) -> bool:
    """Whether a node adds tokens to a cache among the arguments, or attends over a longer one.

    Of every attention, also of one that no matcher knows.
    """
    if node.target is not ATTENTION:
        return _grows(node, given) and rank(node) == 4
    query, key = node.args[:2]
    if equal(tensor(key).shape[2], tensor(query).shape[2]):  # type: ignore[arg-type]
        return False
    # What has three dimensions need not be a cache: prompts are put together so, too.
    grown = any(_grows(whole, given) for whole, _ in candidates(key))  # type: ignore[arg-type]
    return grown or any(base in given for base, _ in viewed(key))  # type: ignore[arg-type]


def _grows(node: fx.Node, given: set[fx.Node]) -> bool:
    """Whether a node adds tokens to one of the arguments."""
    if node.target not in MATCHERS:
        return False
    before: Any = node.args[0]
    if node.target is _aten.cat.default:
        if argument(node, "dim") not in (1, 2):
            return False
        before = next((part for part in before if not _is_empty(part)), node)
    return moved_from(before, given)


def _canonicalize(program: Program, node: fx.Node, dim: int, positions: dict[Any, fx.Node]) -> bool:
    """Put the canonical node in the place of an append; the original stays in the graph, dead."""
    match = MATCHERS.get(node.target)
    known = rank(node) == 4 or node.target is _aten.cat.default
    found = match(program, node) if match is not None and known else None
    if found is None or found.dim != dim:
        return False
    position = found.position
    if position is not None and not is_tensor(position):
        if position not in positions:
            positions[position] = _position(program, position)
        position = positions[position]
    with program.graph.inserting_after(node):
        canonical = call(program, CANONICAL, (found.past, found.new, position, dim))
    node.replace_all_uses_with(canonical)
    canonical.meta = {**node.meta, "val": canonical.meta["val"], ORIGINAL: node}
    return True


def _position(program: Program, start: Any) -> fx.Node:
    """A tensor of the number of tokens before a slice, a constant or a node."""
    first = next(node for node in program.graph.nodes if node.op != "placeholder")
    before = start.next if isinstance(start, fx.Node) and start.op != "placeholder" else first
    with program.graph.inserting_before(before):
        return call(program, _aten.full.default, ([1], start), dtype=torch.int64)


def _match_cat(_program: Program, node: fx.Node) -> Found | None:
    parts = [part for part in argument(node, "tensors") if not _is_empty(part)]
    if not 1 <= len(parts) <= 2 or argument(node, "dim") not in (1, 2):
        return None
    past, new = (None, parts[0]) if len(parts) == 1 else parts
    return Found(past, new, argument(node, "dim"))


def _match_index_copy(_program: Program, node: fx.Node) -> Found | None:
    past, dim, position, new = node.args
    return Found(past, new, dim % 4, position)  # type: ignore[arg-type, operator]


def _match_index_put(program: Program, node: fx.Node) -> Found | None:
    """``buffer[:, :, position] = new``, or a full buffer rolled by one whose last token is set."""
    past, indices, new = (argument(node, name) for name in ("self", "indices", "values"))
    dims = [dim for dim, index in enumerate(indices) if index is not None]
    if len(dims) != 1 or argument(node, "accumulate"):
        return None
    (dim,), position = dims, indices[dims[0]]
    if rank(position) != 1 or tensor(position).dtype == torch.bool:
        return None
    shape = list(tensor(past).shape)
    shape[dim] = tensor(position).shape[0]
    missing = 4 - rank(new)
    if not all(equal(size, 1) for size in shape[:missing]):
        return None  # broadcast
    if not same_shape(shape[missing:], tensor(new).shape):
        return None
    with program.graph.inserting_before(node):
        for _ in range(missing):  # torch drops leading dimensions of size 1 when it assigns
            new = call(program, _aten.unsqueeze.default, (new, 0))
        if past.target is not _aten.roll.default:
            return Found(past, new, dim, position)
        shifts, over = argument(past, "shifts"), argument(past, "dims")
        if list(shifts) != [-1] or [d % 4 for d in over] != dims or constant(position) != -1:
            return None
        return Found(call(program, _aten.slice.Tensor, (past.args[0], dim, 1)), new, dim)


def _match_slice_scatter(_program: Program, node: fx.Node) -> Found | None:
    """``buffer[:, :, start : start + L] = new``."""
    past, new = node.args[:2]
    if argument(node, "step") != 1:
        return None
    start = argument(node, "start")
    return Found(past, new, argument(node, "dim") % 4, 0 if start is None else start)  # type: ignore[arg-type]


MATCHERS: dict[Any, Callable[[Program, fx.Node], Found | None]] = {
    _aten.cat.default: _match_cat,
    _aten.index_copy.default: _match_index_copy,
    _aten.index_put.default: _match_index_put,
    _aten.slice_scatter.default: _match_slice_scatter,
}
"""The ways to add tokens, by the operator that does it."""


def _is_empty(node: fx.Node) -> bool:
    return statically_known_true(tensor(node).numel() == 0)
