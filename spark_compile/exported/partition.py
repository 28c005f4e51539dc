"""Which parts of an exported graph TensorRT would run: a dry run that needs neither it nor a GPU.

The compressed cache's operators stay with torch, and so does what changes a state or computes with
sizes; everything else goes into subgraphs, as torch-tensorrt's own partitioner makes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor, fx

from ..torch_private import CapabilityBasedPartitioner, OperatorSupportBase

SMALLEST = 5
"""Operators of the smallest subgraph, torch-tensorrt's own ``min_block_size``."""
_DTYPES = {torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool}
_EFFECTS = {torch.ops.aten.copy_.default, torch.ops.aten._assert_async.msg}


@dataclass(frozen=True)
class Partition:
    """How a graph would be split."""

    subgraphs: tuple[int, ...]
    """Operators of each subgraph that TensorRT would run, in order."""
    stays: Mapping[str, int]
    """Operators that torch would run, with their numbers, most frequent first."""


def partition(module: fx.GraphModule) -> Partition:
    """Split a graph, which is left as it is.

    Args:
        module: of ATen and ``spark`` operators, with fake values, such as ``Graph.module``.
    """
    found = CapabilityBasedPartitioner(
        module, _Engine(), allows_single_node_partition=True
    ).propose_partitions()
    blocks = [[node for node in block.nodes if _computes(node)] for block in found]
    kept = [block for block in blocks if len(block) >= SMALLEST]
    taken = {node for block in kept for node in block}
    first = {node: index for index, node in enumerate(module.graph.nodes)}
    stays = Counter(
        str(node.target) for node in module.graph.nodes if _computes(node) and node not in taken
    )
    kept.sort(key=lambda block: min(first[node] for node in block))
    return Partition(tuple(len(block) for block in kept), dict(stays.most_common()))


class _Engine(OperatorSupportBase):
    """What may be in a subgraph."""

    def is_node_supported(self, submodules: Mapping[str, torch.nn.Module], node: fx.Node) -> bool:
        """Whether TensorRT may run an operator."""
        if node.op != "call_function" or getattr(node.target, "namespace", "") != "aten":
            return False
        if node.target in _EFFECTS:
            return False
        operands = [operand.meta.get("val") for operand in (node, *node.all_input_nodes)]
        return all(isinstance(value, Tensor) and value.dtype in _DTYPES for value in operands)


def _computes(node: fx.Node) -> bool:
    return node.op == "call_function" and hasattr(node.target, "namespace")


def partition_table(partitions: Mapping[str, Partition]) -> Table:
    """A row for each phase."""
    table = Table(title="Parts for TensorRT", caption="A dry run: nothing was built.")
    for column in ("phase", "subgraphs", "operators in them", "stay with torch"):
        table.add_column(column, overflow="fold")
    for phase, found in partitions.items():
        stays = ", ".join(f"{count} x {name}" for name, count in found.stays.items())
        table.add_row(phase, str(len(found.subgraphs)), str(sum(found.subgraphs)), stays)
    return table
