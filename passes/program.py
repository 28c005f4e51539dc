"""The graph that the passes rewrite, with what is known about its inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import SymInt, fx

from ..config import SparkConfig
from ..form import StateForm
from ..kernels.spec import Side
from ..report import Site
from ..state import SparkTensor
from ..torch_private import FakeTensorMode


class PassFailed(RuntimeError):
    """A pass raised or left an inconsistent graph, or nothing can call it; the message names it."""


@dataclass(frozen=True)
class PlainInput:
    """An input that the rewritten graph takes unchanged."""


@dataclass(frozen=True)
class Growth:
    """What a graph does to a state that it continues."""

    extra: int | SymInt
    """Number of tokens that it appends."""
    keep: int | SymInt
    """Number of latest tokens that stay."""
    shared: bool
    """Whether several attentions read the cache."""


@dataclass(frozen=True)
class Adopted:
    """A buffer of the model that becomes a static state when the graph first gets it."""

    side: Side
    form: StateForm
    position: fx.GraphModule | None
    """Makes, of the graph's arguments, the position of the first new token: the number of tokens
    in the buffer. None: it is full."""


@dataclass(frozen=True)
class StateInput:
    """A compressed state, which the rewritten graph takes as its stored tensors."""

    growth: Growth | None
    """None if the graph only reads it, or writes into it in place (a static one)."""
    with_length: bool
    """Whether the number of tokens follows the tensors as an argument of its own."""
    adopted: Adopted | None = None
    """How it becomes a state where it is still a plain tensor."""


@dataclass(frozen=True)
class PlainOutput:
    """An output of the original graph that is one value of the rewritten graph."""

    position: int


@dataclass(frozen=True)
class NewState:
    """A state made of the tensors at ``positions`` of the rewritten graph's outputs."""

    side: Side
    positions: tuple[int, ...]
    length: int | SymInt
    """Its tokens, or its capacity."""
    form: StateForm


@dataclass(frozen=True)
class GrownState:
    """The state of input ``argument`` with the tokens that the graph appended in place."""

    argument: int


OutputPlan = PlainOutput | NewState | GrownState


@dataclass(frozen=True)
class Replacement:
    """What takes the place of one output of the original graph."""

    side: Side
    form: StateForm
    past: fx.Node | None = None
    """The placeholder whose state grew, None for a new state."""
    nodes: tuple[fx.Node, ...] = ()
    """The stored tensors of a new state, which the rewritten graph returns instead."""
    length: int | SymInt = 0
    """Tokens of a new state, or its capacity."""


@dataclass
class Program:
    """A functional ATen graph; passes change ``module.graph`` and set the other fields."""

    module: fx.GraphModule
    fake_mode: FakeTensorMode
    config: SparkConfig
    arguments: list[fx.Node]
    """The placeholders as the caller passes them, subclasses flattened."""
    states: dict[fx.Node, SparkTensor]
    """Those that stand for a compressed state: fake, with the stored tensors' shapes."""
    wrapped: tuple[int, ...] = ()
    """Which of Dynamo's arguments are other tensor subclasses, and flattened before the call."""
    stored: dict[fx.Node, dict[str, Any]] = field(default_factory=dict)
    """The placeholders of a state's stored tensors and its "length", once they are made."""
    growth: dict[fx.Node, Growth] = field(default_factory=dict)
    """What the graph does to the states that it continues."""
    adopted: dict[fx.Node, Adopted] = field(default_factory=dict)
    """The plain tensors among the states."""
    replaced: dict[fx.Node, Replacement] = field(default_factory=dict)
    traced: dict[Any, fx.Graph] = field(default_factory=dict)
    """What ``dataflow.inline`` has traced."""
    sites: list[Site] = field(default_factory=list)
    rolls: bool = True
    """Whether a full buffer of a static cache may drop its first tokens in another graph."""
    continues: bool = False
    """Whether the graph adds tokens to a cache that it gets, dense or compressed."""
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
        if self.states or self.continues:
            return "decode"
        return "prefill" if self.sites else "no attention"
