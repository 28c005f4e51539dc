"""The placeholders of a compressed state's stored tensors, in place of the state's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt, Tensor, fx

from ..form import StateForm
from ..kernels.spec import Side
from ..report import SparkError
from ..state import new_state
from .dataflow import call
from .patterns import tensor
from .program import Adopted, Program


def stored_tensors(program: Program, state: fx.Node) -> dict[str, Any]:
    """The placeholders of a state's stored tensors by name, and "length", a node or an int."""
    if state not in program.stored:
        fake = program.states[state]
        with program.graph.inserting_before(state):
            stored: dict[str, Any] = {
                name: _placeholder(program, f"{state.name}_{name}", _apart(program, value))
                for name, value in fake.stored().items()
            }
            stored["length"] = length = fake.tokens
            if isinstance(length, SymInt):
                stored["length"] = _placeholder(program, f"{state.name}_length", length)
        program.stored[state] = stored
    return program.stored[state]


def _apart(program: Program, value: Tensor) -> Tensor:
    """A fake tensor of the same layout on a storage of its own.

    Pages of caches that have packed nothing share one, which no step writes to: a graph that is
    compiled for that would be another one than those that pack.
    """
    with program.fake_mode:
        return value.new_empty_strided(value.shape, value.stride())


def _placeholder(program: Program, name: str, value: object) -> fx.Node:
    node = program.graph.placeholder(name)
    node.meta["val"] = value
    return node


def recover(program: Program, state: fx.Node) -> fx.Node:
    """Add the dense tensor of a state, in its layout, for users that cannot read it compressed."""
    stored, fake = stored_tensors(program, state), program.states[state]
    if fake.form.ranks > 1:
        raise SparkError(f"{state} is spread over ranks, none of which can make it dense")
    dense = call(program, torch.ops.spark.recover.default, (
        stored["pages"], stored["head"], fake.spec.text, fake.SIDE == "key", stored["length"],
    ))  # fmt: skip
    if fake.form.tokens_dim == 2:
        return dense
    dense = call(program, torch.ops.aten.transpose.int, (dense, 1, 2))
    dense = call(program, torch.ops.aten.contiguous.default, (dense,))
    if not fake.form.merged:
        return dense
    return call(program, torch.ops.aten.flatten.using_ints, (dense, 2))


def adopt(
    program: Program, buffer: fx.Node, side: Side, form: StateForm, position: fx.Node | None
) -> None:
    """Take a buffer of the model, which may be a state already, for a static state."""
    if buffer in program.states and program.states[buffer].static:
        return
    dense, spec = tensor(buffer), form.spec
    heads = dense.shape[3 - form.tokens_dim]
    capacity = int(dense.shape[form.tokens_dim])
    shapes = spec.stored_shapes(side, (dense.shape[0], heads), *spec.room(capacity, capacity))
    with program.fake_mode:
        pages, head = (dense.new_empty(shape, dtype=torch.uint8) for shape in shapes)
        program.states[buffer] = new_state(side, form, pages, head, capacity)
    count = None if position is None else _computed(program, position)
    program.adopted[buffer] = Adopted(side, form, count)


def _computed(program: Program, wanted: fx.Node) -> fx.GraphModule:
    """The part of the graph that makes one value of the arguments, as a module of its own."""
    needed, stack = {wanted}, [wanted]
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in needed:
                needed.add(operand)
                stack.append(operand)
    graph, copies = fx.Graph(), {}
    for node in program.arguments:
        copies[node] = graph.placeholder(node.name)
    for node in program.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[wanted])
    return fx.GraphModule(program.module, graph)
