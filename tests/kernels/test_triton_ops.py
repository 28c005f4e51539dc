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
from spark_compile.kernels.triton import ops


class Step(torch.nn.Module):
    """A decoding step on the stored tensors."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, kept: Tensor, bits: Tensor, scale: Tensor,
        norms: Tensor, packed: Tensor, tail: Tensor, values: Tensor,
    ) -> tuple[Tensor]:  # fmt: skip
        length = values.shape[2] - 20
        output, _ = torch.ops.spark_triton.append_attend(
            query, key, value, kept, bits, scale, norms, packed, tail, values, length,
            None, length, 0.1, 0.0, None, 4, "degenerate", "squared",
        )  # fmt: skip
        return (output,)


def stored(device: str = "cuda") -> tuple[Tensor, ...]:
    """Arguments of ``Step``."""
    half: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    return (
        torch.empty(2, 8, 1, 64, **half),
        torch.empty(2, 2, 1, 64, **half),
        torch.empty(2, 2, 1, 64, **half),
        torch.empty(2, 2, 256, 32, **half),
        torch.empty(2, 2, 256, 2, 8, dtype=torch.uint8, device=device),
        torch.empty(2, 2, 256, 1, **half),
        torch.empty(2, 2, 64, device=device),
        torch.empty((), dtype=torch.int64),
        torch.empty(2, 2, 64, 64, **half),
        torch.empty(2, 2, 400, 64, **half),
    )


def test_growing_buffers_make_no_guard() -> None:
    with FakeTensorMode(shape_env=ShapeEnv()):
        arguments = stored()
    capacity, tail, values = Dim("capacity", min=2), Dim("tail", min=2), Dim("values", min=30)
    grows = [{2: capacity}] * 3 + [None, None, {2: tail}, {2: values}]
    program = export(Step(), arguments, dynamic_shapes=(None, None, None, *grows))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "spark_triton.append_attend.default" in called


def test_functionalization_sees_the_kernels() -> None:
    with FakeTensorMode(shape_env=ShapeEnv()):
        arguments = stored()
        graph, _ = aot_export_module(Step(), arguments, trace_joint=False)
    kernels = [
        node
        for node in graph.graph.nodes
        if node.target is torch.ops.higher_order.triton_kernel_wrapper_functional
    ]
    assert len(kernels) == 4  # append the key, append the value, attend, merge


def test_results_are_those_of_the_operators_they_stand_for() -> None:
    with FakeTensorMode(shape_env=ShapeEnv()):
        arguments = stored()
        how = (380, None, None, 0.1, 0.0, None, 4, "degenerate", "squared", True)
        for name, given in (
            ("append_attend", (*arguments, *how)),
            ("attend", (arguments[0], *arguments[3:], *how)),
            ("prune", (arguments[9], arguments[6], arguments[6], 32, "none", "squared", True)),
            ("pack_values", (arguments[9], arguments[6], 20, True)),
        ):
            expected = getattr(torch.ops.spark, name)(*given)
            result = getattr(torch.ops.spark_triton, name)(*given)
            for ours, theirs in zip(result, expected, strict=True):
                assert ours.shape == theirs.shape, name
                assert ours.dtype == theirs.dtype, name


def test_every_kernel_stands_behind_an_operator() -> None:
    for name in ops.EAGER:
        assert hasattr(spark_ops, name)
        theirs = getattr(torch.ops.spark, name).default._schema
        ours = getattr(torch.ops.spark_triton, name).default._schema
        assert [a.name for a in ours.arguments] == [a.name for a in theirs.arguments]
        mutated = [[a.alias_info is not None for a in s.arguments] for s in (ours, theirs)]
        assert mutated[0] == mutated[1], name
