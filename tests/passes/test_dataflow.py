"""``dataflow``: what reaches what, and small edits of a graph."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from spark_compile.passes import dataflow


def diamond(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """start -> (left, right) -> end, and one more reader of right where b is one."""
    start = a.exp()
    left, right = start.sin(), start.cos()
    return left * right, right + b


def named(program: Any, name: str) -> fx.Node:
    (node,) = [
        node for node in program.graph.nodes
        if node.op == "call_function" and str(node.target).startswith(f"aten.{name}.")
    ]  # fmt: skip
    return node


def test_dead_nodes_are_not_live(capture: Any) -> None:
    program = capture(diamond, torch.ones(2), torch.ones(2))
    with program.graph.inserting_before(program.output):
        dead = dataflow.call(program, torch.ops.aten.neg.default, (named(program, "exp"),))
    live = dataflow.live_nodes(program.graph)
    assert dead not in live
    assert named(program, "exp") in live
    assert set(program.graph.find_nodes(op="placeholder")) <= live


def test_an_unread_attention_is_not_live_but_a_write_is(capture: Any) -> None:
    def write(x: Tensor, buffer: Tensor) -> Tensor:
        buffer.copy_(x)
        return x + 1

    program = capture(write, torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    x = program.arguments[0]
    with program.graph.inserting_before(program.output):
        sdpa = dataflow.call(program, torch.ops.aten.scaled_dot_product_attention.default, (x,) * 3)
    live = dataflow.live_nodes(program.graph)
    assert sdpa not in live
    assert named(program, "copy_") in live
    program.graph.eliminate_dead_code(dataflow.has_effect)
    assert sdpa not in program.graph.nodes
    assert named(program, "copy_").args[0] in program.arguments


def test_a_convex_region_has_no_readers_inside(capture: Any) -> None:
    program = capture(diamond, torch.ones(2), torch.ones(2))
    start, end = named(program, "exp"), named(program, "mul")
    assert dataflow.readers_inside(start, end) == [named(program, "add")]
    assert dataflow.readers_inside(named(program, "sin"), end) == []
    assert dataflow.readers_inside(end, end) == []


def test_the_end_may_be_read_by_anybody(capture: Any) -> None:
    def softmaxed(x: Tensor) -> tuple[Tensor, Tensor]:
        weights = F.softmax(x * 2, dim=-1)
        return weights + 1, weights - 1

    program = capture(softmaxed, torch.ones(2, 2))
    assert dataflow.readers_inside(named(program, "mul"), named(program, "softmax")) == []


def test_call_computes_the_fake_value(capture: Any) -> None:
    program = capture(diamond, torch.ones(2), torch.ones(2))
    with program.graph.inserting_before(program.output):
        node = dataflow.call(
            program, torch.ops.aten.cat.default, ([named(program, "sin"), named(program, "cos")],)
        )
    assert node.meta["val"].shape == (4,)
    assert dataflow.value_of(node) is node.meta["val"]
    assert dataflow.value_of(3) == 3


def test_inline_adds_a_function_s_operators(capture: Any, calls: Any) -> None:
    program = capture(diamond, torch.ones(2), torch.ones(2))
    before = calls(program)
    with program.graph.inserting_before(program.output):
        added = dataflow.inline(program, lambda x: (x.tanh(), x + 1), (named(program, "exp"),))
    assert len(added) == 2
    assert calls(program) - before == {"aten.tanh.default": 1, "aten.add.Tensor": 1}
    assert [node.meta["val"].shape for node in added] == [(2,), (2,)]
    program.graph.lint()


def test_same_size_compares_ranks_and_symbols() -> None:
    assert dataflow.same_size(torch.ones(2, 3), torch.zeros(2, 3))
    assert not dataflow.same_size(torch.ones(2, 3), torch.ones(2, 1))
    assert not dataflow.same_size(torch.ones(2, 3), torch.ones(2, 3, 1))
