"""The passes in their order, and the checks after each of them."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor, fx

from .cleanup import Cleanup
from .dataflow import fake_value, same_size, value_of
from .debug import GraphDump
from .find_attention import FindAttention
from .find_kv_append import FindKVAppend
from .insert_spark import InsertSpark
from .normalize import Normalize
from .program import PassFailed, PlainOutput, Program

Pass = Callable[[Program], int]

PIPELINE: tuple[Pass, ...] = (
    Normalize(),
    FindAttention(),
    FindKVAppend(),
    InsertSpark(),
    Cleanup(),
)


def run_passes(program: Program, passes: tuple[Pass, ...] = PIPELINE) -> dict[str, int]:
    """Run the passes on a program in place.

    Returns:
        The number of matches of each pass by its name.

    Raises:
        PassFailed: names the pass; the program is of no further use.
    """
    matches: dict[str, int] = {}
    checked = {node: node.all_input_nodes for node in program.graph.nodes}
    promised = [value_of(value) for value in program.returned()]
    dump = GraphDump.open(program)
    for step in passes:
        name, start_s = type(step).__name__, time.perf_counter()
        try:
            matches[name] = step(program)
            check(program, checked)
            _check_outputs(program, promised)
        except Exception as error:
            reason = f"failed: {type(error).__name__}: {error}"
            if dump is not None:
                dump.write(name, time.perf_counter() - start_s, reason)
            raise PassFailed(f"pass {name} {reason}") from error
        if dump is not None:
            dump.write(name, time.perf_counter() - start_s, str(matches[name]))
    program.module.recompile()
    return matches


def check(program: Program, checked: dict[fx.Node, list[fx.Node]]) -> None:
    """Lint the graph and recompute the fake value of every node that is new or reads another one.

    ``checked`` remembers what each node read when it was last checked.
    """
    program.graph.lint()
    for node in program.graph.nodes:
        operands = node.all_input_nodes
        if node.op == "call_function" and checked.get(node) != operands:
            _compare(node.name, fake_value(program, node), node.meta.get("val"))
        checked[node] = operands


def _check_outputs(program: Program, promised: list[object]) -> None:
    """The graph returns what it did before, except keys and values that are now states."""
    returned = program.returned()
    plans = program.outputs or [PlainOutput(position) for position in range(len(returned))]
    for plan, expected in zip(plans, promised, strict=True):
        if isinstance(plan, PlainOutput):
            actual = returned[plan.position]
            _compare(f"output {actual}", value_of(actual), expected)


def _compare(name: str, actual: object, expected: object) -> None:
    if isinstance(actual, Tensor):
        agree = isinstance(expected, Tensor) and actual.dtype == expected.dtype
        if not agree or not same_size(actual, expected):  # type: ignore[arg-type]
            raise ValueError(f"{name} is {_shape(actual)}, not {_shape(expected)}")


def _shape(value: object) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else repr(value)
