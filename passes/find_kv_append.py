"""Every way to append to a key/value cache becomes one ``torch.ops.spark.kv_append``.

Alternatives: ``cat`` of past and new tokens along the sequence; ``cat`` of an empty tensor and the
first tokens. A cache that returns its first tokens unchanged has no append to find.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .. import ops as _registered  # noqa: F401  (torch.ops.spark)
from .dataflow import call
from .find_attention import CANONICAL as ATTENTION
from .find_attention import ORIGINAL
from .patterns import argument, rank, tensor
from .program import Program

CANONICAL = torch.ops.spark.kv_append.default


@dataclass(frozen=True)
class FindKVAppend:
    """Returns the number of appends that feed a canonical attention."""

    def __call__(self, program: Program) -> int:
        found = 0
        for attention in program.graph.find_nodes(op="call_function", target=ATTENTION):
            for operand in (attention.args[1], attention.args[2]):
                found += _canonicalize(program, operand)
        return found


def _canonicalize(program: Program, node: fx.Node) -> bool:
    """Replace a ``cat`` along dimension 2; the original stays in the graph, dead."""
    if node.target is not torch.ops.aten.cat.default or argument(node, "dim") != 2:
        return False
    if rank(node) != 4:
        return False
    parts = [part for part in argument(node, "tensors") if not _is_empty(part)]
    if not 1 <= len(parts) <= 2:
        return False
    past, new = (None, parts[0]) if len(parts) == 1 else parts
    with program.graph.inserting_after(node):
        canonical = call(program, CANONICAL, (past, new))
    node.replace_all_uses_with(canonical)
    canonical.meta = {**node.meta, "val": canonical.meta["val"], ORIGINAL: node}
    return True


def _is_empty(node: fx.Node) -> bool:
    return statically_known_true(tensor(node).numel() == 0)
