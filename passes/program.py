"""The graph that the passes rewrite, with what is known about its inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import SymInt, fx
from torch._subclasses import FakeTensorMode

from ..config import SparkConfig
from ..report import Site
from ..state import SparkTensor


class PassFailed(RuntimeError):
    """A pass raised, or left an inconsistent graph; the message names the pass."""


@dataclass(frozen=True)
class PlainInput:
    """An input that the rewritten graph takes unchanged."""


@dataclass(frozen=True)
class StateInput:
    """A compressed state, which the rewritten graph takes as its stored tensors."""

    extra: int | SymInt | None
    """Number of tokens that the graph appends, None if it only reads."""
    with_length: bool
    """Whether the number of tokens follows the tensors as an argument of its own."""


@dataclass(frozen=True)
class PlainOutput:
    """An output of the original graph that is one value of the rewritten graph."""

    position: int


@dataclass(frozen=True)
class NewState:
    """A state made of the tensors at ``positions`` of the rewritten graph's outputs."""

    is_key: bool
    positions: tuple[int, ...]
    length: int | SymInt
    slides: bool = False
    """Whether its first tokens will be evicted."""


@dataclass(frozen=True)
class GrownState:
    """The state of input ``argument`` with the tokens that the graph appended in place."""

    argument: int
    stats_position: int | None
    """Output with the new query statistics, None for values."""
    dropped: int | SymInt = 0
    """Number of first tokens that are evicted."""


OutputPlan = PlainOutput | NewState | GrownState


@dataclass(frozen=True)
class Replacement:
    """What takes the place of one output of the original graph."""

    nodes: tuple[fx.Node, ...]
    """The values that the rewritten graph returns instead."""
    is_key: bool
    length: int | SymInt
    past: fx.Node | None
    """The placeholder whose state grew, None for a new state."""
    slides: bool = False
    """Whether the cache keeps the last tokens only."""
    dropped: int | SymInt = 0
    """Number of first tokens that are evicted from the state that grew."""


@dataclass
class Program:
    """A functional ATen graph; passes change ``module.graph`` and set the other fields."""

    module: fx.GraphModule
    fake_mode: FakeTensorMode
    config: SparkConfig
    arguments: list[fx.Node]
    """The placeholders as the caller passes them."""
    states: dict[fx.Node, SparkTensor]
    """Those that stand for a compressed state: fake, with the stored tensors' shapes."""
    stored: dict[fx.Node, dict[str, Any]] = field(default_factory=dict)
    """The placeholders of a state's stored tensors and of its "length", once they exist."""
    extra: dict[fx.Node, int | SymInt] = field(default_factory=dict)
    """Number of tokens that the graph appends to a state."""
    replaced: dict[fx.Node, Replacement] = field(default_factory=dict)
    traced: dict[Any, fx.Graph] = field(default_factory=dict)
    """What ``dataflow.inline`` has traced."""
    sites: list[Site] = field(default_factory=list)
    inputs: list[PlainInput | StateInput] = field(default_factory=list)
    outputs: list[OutputPlan] = field(default_factory=list)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def output(self) -> fx.Node:
        """The graph's output node."""
        return self.graph.output_node()

    def returned(self) -> list[Any]:
        """The values that the graph returns, in order."""
        return list(self.output.args[0])  # type: ignore[arg-type]

    @property
    def phase(self) -> str:
        """The word for this graph in reports."""
        if self.states:
            return "decode"
        return "prefill" if self.sites else "no attention"
