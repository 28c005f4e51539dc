"""The passes in their order, and the checks after each of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from .cleanup import Cleanup
from .dataflow import same_size, value_of
from .find_attention import FindAttention
from .find_kv_append import FindKVAppend
from .insert_spark import InsertSpark
from .normalize import Normalize
from .program import PassFailed, Program

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
    checked: set[fx.Node] = set(program.graph.nodes)
    for step in passes:
        name = type(step).__name__
        try:
            matches[name] = step(program)
            check(program, checked)
        except Exception as error:
            raise PassFailed(f"pass {name} failed: {type(error).__name__}: {error}") from error
    program.module.recompile()
    return matches


def check(program: Program, checked: set[fx.Node]) -> None:
    """Lint the graph and recompute the fake value of every node that is not in ``checked`` yet."""
    program.graph.lint()
    for node in program.graph.nodes:
        if node.op == "call_function" and node not in checked:
            with program.fake_mode, torch.no_grad():
                actual = node.target(*fx.map_arg(node.args, value_of), **node.kwargs)  # type: ignore[operator]
            _compare(node, actual)
        checked.add(node)


def _compare(node: fx.Node, actual: object) -> None:
    expected = node.meta.get("val")
    if isinstance(actual, Tensor):
        agree = isinstance(expected, Tensor) and actual.dtype == expected.dtype
        if not agree or not same_size(actual, expected):  # type: ignore[arg-type]
            raise ValueError(f"node {node.name} is {_shape(actual)}, not {_shape(expected)}")


def _shape(value: object) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else repr(value)
