"""What is left over goes: canonical nodes without a home, states as dense tensors, dead code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, fx

from .dataflow import has_effect, live_nodes
from .find_attention import CANONICAL as ATTENTION
from .find_attention import restore
from .find_kv_append import CANONICAL as APPEND
from .program import GrownState, NewState, OutputPlan, PlainInput, PlainOutput, Program, StateInput
from .states import recover, stored_tensors


@dataclass(frozen=True)
class Cleanup:
    """Returns the number of states that had to be recovered dense."""

    def __call__(self, program: Program) -> int:
        _plan_outputs(program)
        for canonical in (ATTENTION, APPEND):
            for node in program.graph.find_nodes(op="call_function", target=canonical):
                restore(node)
        recovered = _replace_states(program)
        program.graph.eliminate_dead_code(has_effect)
        _plan_inputs(program)
        return recovered


def _plan_outputs(program: Program) -> None:
    """Return the replacements instead of the dense keys and values."""
    values: list[Any] = []
    plans: dict[fx.Node, OutputPlan] = {}
    for node in program.returned():
        replacement = program.replaced.get(node) if isinstance(node, fx.Node) else None
        if replacement is None:
            program.outputs.append(PlainOutput(len(values)))
            values.append(node)
            continue
        if node not in plans:
            positions = tuple(range(len(values), len(values) + len(replacement.nodes)))
            values.extend(replacement.nodes)
            plans[node] = (
                NewState(replacement.side, positions, replacement.length, replacement.form)
                if replacement.past is None
                else GrownState(program.arguments.index(replacement.past))
            )
        program.outputs.append(plans[node])
    program.output.args = (tuple(values),)


def _replace_states(program: Program) -> int:
    """Read stored tensors wherever a state was read."""
    live = live_nodes(program.graph)
    recovered = 0
    for state in program.states:
        stored = stored_tensors(program, state)
        users = [user for user in state.users if user in live]
        if any(user.target is torch.ops.aten.copy_.default for user in users):
            reasons = {str(site.refusal) for site in program.sites if site.refusal is not None}
            raise ValueError(
                f"{state} is compressed, and written to by a site that is refused: "
                f"{'; '.join(sorted(reasons)) or 'not an attention that is known'}"
            )
        for user in list(users):
            tokens_dim = program.states[state].form.tokens_dim
            if user.target is torch.ops.aten.sym_size.int and user.args[1] == tokens_dim:
                user.replace_all_uses_with(stored["length"])
                users.remove(user)
        if users:
            with program.graph.inserting_before(_first_call(program.graph)):
                state.replace_all_uses_with(recover(program, state))
            recovered += 1
    return recovered


def _first_call(graph: fx.Graph) -> fx.Node:
    nodes: list[fx.Node] = list(graph.nodes)
    return next(node for node in nodes if node.op != "placeholder")


def _plan_inputs(program: Program) -> None:
    """Drop the states' placeholders and say how to flatten what the caller passes."""
    for argument in program.arguments:
        if argument not in program.states:
            program.inputs.append(PlainInput())
            continue
        with_length = isinstance(program.states[argument].tokens, SymInt)
        growth, adopted = program.growth.get(argument), program.adopted.get(argument)
        program.inputs.append(StateInput(growth, with_length, adopted))
        program.graph.erase_node(argument)
