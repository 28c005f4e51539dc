"""What the tests of the passes share: graphs captured on their way through the passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx

from spark_compile import ops
from spark_compile.config import SparkConfig
from spark_compile.form import StateForm
from spark_compile.passes.dataflow import live_nodes
from spark_compile.passes.lower import fake_inputs, lower
from spark_compile.passes.pipeline import run_passes
from spark_compile.passes.program import Program
from spark_compile.state import SparkTensor, new_state

CONFIG = SparkConfig(key_ratio=0.5, window=4, inner="eager")


class Captured(Exception):
    """Ends a compile once its graph is captured."""


@pytest.fixture
def capture() -> Callable[..., Program]:
    """``capture(function, *inputs, passes=[...], config=...)``: the program behind those passes.

    What each pass returned is then in ``program.matches``, the graph's inputs in
    ``program.examples``.
    """

    def run(
        function: Callable[..., Any],
        *inputs: Any,
        passes: Sequence[Any] = (),
        config: SparkConfig = CONFIG,
    ) -> Program:
        programs: list[Program] = []

        def backend(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
            program = lower(module, *fake_inputs(example_inputs), config)
            program.matches = run_passes(program, tuple(passes))  # type: ignore[attr-defined]
            program.examples = example_inputs  # type: ignore[attr-defined]
            programs.append(program)
            raise Captured

        torch._dynamo.reset()
        with torch.no_grad(), pytest.raises(Exception, match=r".") as raised:
            torch.compile(function, backend=backend, fullgraph=True)(*inputs)
        if not programs:
            raise raised.value
        return programs[0]

    return run


@pytest.fixture
def count() -> Callable[..., int]:
    """``count(program, "aten.cat", ...)``: calls of these operators whose value matters."""

    def run(program: Program, *prefixes: str) -> int:
        live = live_nodes(program.graph)
        targets = [
            str(n.target) for n in program.graph.nodes if n.op == "call_function" and n in live
        ]
        return sum(target.startswith(prefixes) for target in targets)

    return run


@pytest.fixture
def calls() -> Callable[..., Counter[str]]:
    """``calls(program)``: how often each operator is called, dead nodes included."""

    def run(program: Program) -> Counter[str]:
        return Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")

    return run


@pytest.fixture
def compressed() -> Callable[..., Any]:
    """``compressed(model, tokens)``: the model's cache of these tokens, every tensor compressed."""

    def run(model: Any, tokens: torch.Tensor, config: SparkConfig = CONFIG) -> Any:
        with torch.no_grad():
            return tuple(compress(*states, config) for states in model(tokens)[1])

    return run


def compress(
    key: torch.Tensor, value: torch.Tensor, config: SparkConfig
) -> tuple[SparkTensor, SparkTensor]:
    """What a rewritten prefill returns in the place of a key and a value."""
    spec = config.spec(
        config.format_for("key", key.shape[3], key.dtype),
        config.format_for("value", value.shape[3], value.dtype),
    )
    stored = ops.build(key, value, [key], spec.text, None)
    form = StateForm(spec)
    keys = new_state("key", form, *stored[:2], key.shape[2])
    return keys, new_state("value", form, *stored[2:], key.shape[2])
