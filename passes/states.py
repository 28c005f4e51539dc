"""The placeholders of a compressed state's stored tensors, in place of the state's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt, fx

from ..cache import PrunedKeys
from .dataflow import call
from .program import Program


def stored_tensors(program: Program, state: fx.Node) -> dict[str, Any]:
    """The placeholders of a state's stored tensors by name, and "length", a node or an int."""
    if state not in program.stored:
        fake = program.states[state]
        with program.graph.inserting_before(state):
            stored: dict[str, Any] = {
                name: _placeholder(program, f"{state.name}_{name}", value)
                for name, value in fake.stored().items()
            }
            stored["length"] = length = fake.shape[2]
            if isinstance(length, SymInt):
                stored["length"] = _placeholder(program, f"{state.name}_length", length)
        program.stored[state] = stored
    return program.stored[state]


def _placeholder(program: Program, name: str, value: object) -> fx.Node:
    node = program.graph.placeholder(name)
    node.meta["val"] = value
    return node


def recover(program: Program, state: fx.Node) -> fx.Node:
    """Add the dense tensor [B, H, S, D] of a state, for users that cannot read it compressed."""
    stored = stored_tensors(program, state)
    fake = program.states[state]
    if not isinstance(fake, PrunedKeys):
        optional = ("value_bits", "value_scale", "value_bias", "first")
        packed = (stored.get(name) for name in optional)
        rows = (stored["rows"], stored["length"], *packed)
        return call(program, torch.ops.spark.first_rows.default, rows)
    config = fake.config
    return call(program, torch.ops.spark.recover.default, (
        stored["kept"], stored["bits"], stored["scale"], stored["norms"],
        stored["packed_length"], stored["tail"], stored["length"],
        config.sink_tokens, config.recovery, config.saliency, stored.get("first"),
    ))  # fmt: skip
