"""The operators of the Triton kernels as compilers see them, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.symbolic_shapes import ShapeEnv

pytest.importorskip("triton")

from spark_compile import ops as spark_ops
from spark_compile import spread_ops
from spark_compile.kernels.formats import parse
from spark_compile.kernels.spec import SIDES, Spec
from spark_compile.kernels.triton import ops

FORMATS = [
    parse(text, 64, torch.bfloat16)
    for text in ("spark(kept=13,stored=int8)", "pruned(kept=32,stored=int8)")
]
SPEC = Spec(*FORMATS, 32, 32, 4, 0, 0.125)


class Step(torch.nn.Module):
    """A decoding step on the stored tensors."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_pages: Tensor, key_head: Tensor,
        value_pages: Tensor, value_head: Tensor, position: Tensor,
    ) -> tuple[Tensor]:  # fmt: skip
        stored = (key_pages, key_head, value_pages, value_head)
        how = (None, None, 500, 400, position, SPEC.text)
        return (torch.ops.spark_triton.step(query, key, value, *stored, *how),)


class Build(torch.nn.Module):
    """A prefill."""

    def forward(self, key: Tensor, value: Tensor, query: Tensor) -> tuple[Tensor, ...]:
        stored: tuple[Tensor, ...] = torch.ops.spark_triton.build(
            key, value, [query], SPEC.text, None
        )
        return stored


def rows(heads: int, tokens: int) -> Tensor:
    return torch.empty(2, heads, tokens, 64, dtype=torch.bfloat16)


def stored() -> tuple[Tensor, ...]:
    """Arguments of ``Step``."""
    sides: list[Tensor] = []
    for side in SIDES:
        head, page = int(SPEC.head(side).head_bytes(96)), SPEC.pages(side).page_bytes
        for shape in ((2, 2, 10, page), (2, 2, head)):
            sides.append(torch.empty(shape, dtype=torch.uint8))
    position = torch.empty(1, dtype=torch.int64)
    return rows(8, 1), rows(2, 1), rows(2, 1), *sides, position


def kernels_of(module: torch.nn.Module, arguments: tuple[Any, ...]) -> list[Any]:
    """The kernels in the graph that functionalization makes of a module."""
    graph, _ = aot_export_module(module, arguments, trace_joint=False)
    wrapper = torch.ops.higher_order.triton_kernel_wrapper_functional
    return [node for node in graph.graph.nodes if node.target is wrapper]


def test_growing_pages_make_no_guard() -> None:
    with FakeTensorMode(shape_env=ShapeEnv()):
        arguments = stored()
    pages = Dim("pages", min=2)
    grows = (None, None, None, {2: pages}, None, {2: pages}, None, None)
    program = export(Step(), arguments, dynamic_shapes=grows)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "spark_triton.step.default" in called


def test_a_prefill_of_any_length_makes_no_guard() -> None:
    with FakeTensorMode(shape_env=ShapeEnv()):
        arguments = rows(2, 300), rows(2, 300), rows(8, 300)
    grows = ({2: Dim("tokens", min=100)},) * 3
    program = export(Build(), arguments, dynamic_shapes=grows)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "spark_triton.build.default" in called


def test_functionalization_sees_the_kernels() -> None:
    with FakeTensorMode(shape_env=ShapeEnv()):
        # rewind, prepare, pack and update of both sides, attend and merge
        assert len(kernels_of(Step(), stored())) == 10
        # pack and update of both sides
        assert len(kernels_of(Build(), (rows(2, 300), rows(2, 300), rows(8, 300)))) == 4


def test_results_are_those_of_the_operators_they_stand_for() -> None:
    with FakeTensorMode(shape_env=ShapeEnv()):
        *given, position = stored()
        built = (rows(2, 300), rows(2, 300), [rows(8, 300)], SPEC.text)
        for name, arguments in (
            ("step", (*given, None, None, 500, 400, position, SPEC.text)),
            ("step_partial", (*given, None, None, 500, 400, None, SPEC.text)),
            ("build", (*built, None)),
            ("build", (*built, 1000)),
        ):
            expected = getattr(torch.ops.spark, name)(*arguments)
            result = getattr(torch.ops.spark_triton, name)(*arguments)
            if name == "step":
                expected, result = (expected,), (result,)
            for ours, theirs in zip(result, expected, strict=True):
                assert ours.shape == theirs.shape, name
                assert ours.dtype == theirs.dtype, name


def test_every_kernel_stands_for_an_operator() -> None:
    for name in ops.EAGER:
        assert hasattr(spread_ops if name == "step_partial" else spark_ops, name)
        theirs = getattr(torch.ops.spark, name).default._schema
        ours = getattr(torch.ops.spark_triton, name).default._schema
        assert [a.name for a in ours.arguments] == [a.name for a in theirs.arguments]
        mutated = [[a.alias_info is not None for a in s.arguments] for s in (ours, theirs)]
        assert mutated[0] == mutated[1], name
