"""The passes' work grows with the graph and not with its square, counted, not timed."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from decoders import EmptyFirst, KeyValue, ScaledLate
from torch import Tensor, fx, nn

from spark_compile.passes.pipeline import run_passes
from spark_compile.passes.program import Program

FEW, MANY = 20, 100
ALLOWED = 1.1
"""How much more work per node the larger graph may take."""


class Block(nn.Module):
    """One layer: norm, attention over a cache, residual; flat arguments and results."""

    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.attention = attention()

    def forward(self, x: Tensor, past: KeyValue | None = None) -> tuple[Tensor, KeyValue]:
        output, present = self.attention(self.norm(x), past)
        return x + torch.tanh(output), present


def chain(block: Program, layers: int) -> Program:
    """A program of so many copies of a block, each with its own states, one behind another."""
    graph = fx.Graph()
    inputs = block.graph.find_nodes(op="placeholder")
    (x,) = [node for node in inputs if node not in block.states and _rank(node) == 3]
    shared = {node: graph.node_copy(node) for node in inputs if node not in block.states}
    own = [{node: _renamed(graph.node_copy(node)) for node in block.states} for _ in range(layers)]
    present: list[Any] = []
    for states in own:
        shared[x], *caches = graph.graph_copy(block.graph, {**shared, **states})
        present += caches
    graph.output((shared[x], *present))
    module = fx.GraphModule(block.module, graph)
    states_of = {copy: block.states[node] for states in own for node, copy in states.items()}
    arguments = list(graph.find_nodes(op="placeholder"))
    return Program(module, block.fake_mode, block.config, arguments, states_of)


def _renamed(placeholder: fx.Node) -> fx.Node:
    """A copy of a placeholder as an argument of its own."""
    placeholder.target = placeholder.name
    return placeholder


def _rank(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.dim() if isinstance(value, Tensor) else 0


@contextmanager
def counted(work: Counter[str]) -> Iterator[None]:
    """Count calls of Python functions and, in the passes and networkx, lines by function."""

    def lines(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            work[_name(frame)] += 1
        return lines

    def calls(frame: FrameType, event: str, _: Any) -> Any:
        work[_name(frame)] += 1
        path = frame.f_code.co_filename
        return lines if "/passes/" in path or "/networkx/" in path else None

    before = sys.gettrace()
    sys.settrace(calls)
    try:
        yield
    finally:
        sys.settrace(before)


def _name(frame: FrameType) -> str:
    path = frame.f_code.co_filename.rsplit("/", 1)[-1]
    return f"{path}:{frame.f_code.co_qualname}"


def work_of(block: Program, layers: int, *, refused: bool) -> tuple[Counter[str], int]:
    """What the passes do to a chain, and how many nodes it has."""
    program, work = chain(block, layers), Counter[str]()
    nodes = len(program.graph.nodes)
    with counted(work):
        run_passes(program)
    assert [site.refusal is not None for site in program.sites] == [refused] * layers
    return work, nodes


PHASES = {"prefill": EmptyFirst, "decode": EmptyFirst, "refused": ScaledLate}


@pytest.mark.parametrize("phase", PHASES)
def test_work_per_node_does_not_grow(capture: Any, compressed: Any, phase: str) -> None:
    block, x = Block(PHASES[phase]).eval().requires_grad_(False), torch.randn(1, 12, 32)
    inputs = [x]
    if phase == "decode":
        inputs = [x[:, :1], *compressed(lambda x: (None, [block(x)[1]]), x)]
    captured = capture(block, *inputs)
    refused = phase == "refused"
    work_of(captured, 1, refused=refused)  # what is computed once and kept counts for neither
    few, few_nodes = work_of(captured, FEW, refused=refused)
    many, many_nodes = work_of(captured, MANY, refused=refused)
    growth = (many.total() / many_nodes) / (few.total() / few_nodes)
    extra = {name: many[name] - few[name] * MANY // FEW for name in many}
    worst = sorted(extra, key=extra.__getitem__, reverse=True)[:5]
    where = ", ".join(f"{name} {few[name]} -> {many[name]}" for name in worst)
    assert growth < ALLOWED, f"work per node grows {growth:.2f} times: {where}"
