"""One phase of a decoder: the rewritten graph, and the programs that torch makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from ..kernels.reference.portable import NotPortableError
from ..kernels.spec import Side, Spec
from ..report import GraphReport
from .decoder import ExportError, Phase
from .folder import constant_names
from .portable import as_aten, check_aten

Stored = dict[str, Tensor]


@dataclass(frozen=True)
class Graph:
    """One phase of a decoder."""

    phase: Phase
    module: fx.GraphModule
    """The rewritten graph; its placeholders are those of ``sources``."""
    sources: tuple[tuple[str, str], ...]
    """Of each placeholder: "weight", "state" or "input", and the name."""
    weights: Mapping[str, Tensor]
    """Parameters and constants by name, those that are the same tensor once."""
    states: Mapping[str, Tensor]
    """Fake tensors of the states' shapes and dtypes, zero before the first token."""
    specs: Mapping[str, tuple[Spec, Side]]
    """How the tokens of a state are stored, of those that are compressed."""
    max_tokens: int
    report: GraphReport
    inputs: tuple[Any, ...]
    """Example values of what changes from call to call."""
    dynamic: Mapping[str, Any]
    """Which sizes of those change, as torch.export wants it."""
    before: fx.Graph
    """The graph as the model wrote it; its placeholders' targets are names as in ``sources``."""

    @property
    def least(self) -> int:
        """The fewest tokens that it takes."""
        sizes = self.dynamic["input_ids"]
        return int(sizes[1].min) if sizes else 1

    def empty_states(self) -> Stored:
        """The states before the first token."""
        return {name: torch.zeros(s.shape, dtype=s.dtype) for name, s in self.states.items()}

    def run(self, states: Mapping[str, Tensor], ids: Tensor, position: int, row: int) -> Tensor:
        """Run the graph operator by operator, without padding: logits [B, 1, V] of one token."""
        given = [ids, torch.tensor([position]), torch.tensor([row]), *self.inputs[3:]]
        values = {
            "weight": self.weights,
            "state": states,
            "input": dict(zip(self.dynamic, given, strict=True)),
        }
        flat = [values[kind][name] for kind, name in self.sources]
        return self.module(*flat)[0]  # type: ignore[no-any-return]

    def program(self, *, with_weights: bool = False, portable: bool = False) -> ExportedProgram:
        """The graph as a program of torch.

        It is called with ``(weights, states, *inputs)``, the first two as dictionaries in the order
        of ``self.weights`` and ``self.states``; it returns logits and changes the states.

        Args:
            with_weights: keep the weights in the program, which is then called without them.
            portable: express what stores the cache in ATen, so that torch alone can run it.

        Raises:
            ExportError: what the graph stores is not portable, or another operator is not ATen.
        """
        graph = replace(self, module=as_aten(self.module)) if portable else self
        zeros = self.empty_states()
        states = dict.fromkeys(zeros)
        if with_weights:
            module: nn.Module = _WithWeights(graph)
            args: tuple[Any, ...] = (zeros, *self.inputs)
            dynamic: dict[str, Any] = {"states": states}
        else:
            module, args = _Flat(graph), (dict(self.weights), zeros, *self.inputs)
            dynamic = {"weights": dict.fromkeys(self.weights), "states": states}
        dynamic["inputs"] = tuple(self.dynamic.values())
        try:
            with torch.no_grad():
                program = torch.export.export(
                    module,
                    args,
                    dynamic_shapes=dynamic,
                    strict=False,
                    prefer_deferred_runtime_asserts_over_guards=True,  # as in `_exported`
                )
        except NotPortableError as error:
            raise ExportError(f"the {self.phase}: {error}") from error
        if portable:
            check_aten(program)
        if not with_weights:  # AOTInductor wants them, a saved program should not have them
            program.example_inputs = None
        return program


class _Flat(nn.Module):
    """A graph called with dictionaries and inputs in place of a list of tensors."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph, self._sources = graph.module, graph.sources
        self._names = tuple(graph.dynamic)

    def forward(self, weights: Stored, states: Stored, *inputs: Tensor) -> Tensor:
        given = {
            "weight": weights,
            "state": states,
            "input": dict(zip(self._names, inputs, strict=True)),
        }
        return self._graph(*(given[kind][name] for kind, name in self._sources))[0]  # type: ignore[no-any-return]


class _WithWeights(nn.Module):
    """The same with the weights inside, as AOTInductor wants them."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._flat = _Flat(graph)
        self._keys = constant_names(graph.weights)
        for name, key in self._keys.items():
            # A package reads them as they lie in the file of the weights.
            self.register_buffer(key, graph.weights[name].contiguous())

    def forward(self, states: Stored, *inputs: Tensor) -> Tensor:
        weights = {name: getattr(self, key) for name, key in self._keys.items()}
        return self._flat(weights, states, *inputs)  # type: ignore[no-any-return]
