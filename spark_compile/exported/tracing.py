"""A decoder's graphs: traced by torch.export, rewritten by the backend's passes, and traced again.

The second trace makes a program of the rewritten graph that torch can save, whose inputs are
weights, states and what changes from call to call.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from ..config import SparkConfig
from ..kernels.spec import Side, Spec
from ..passes.lower import lower
from ..passes.pipeline import run_passes
from ..passes.program import PassFailed, PlainInput, Program, StateInput
from ..report import GraphReport
from ..storage import STORED
from ..torch_private import detect_fake_mode
from .decoder import Decoder, ExportError, Phase
from .graph import Graph


def trace(
    decoder: Decoder, phase: Phase, config: SparkConfig | None, max_tokens: int, batch: int
) -> Graph:
    """Trace and rewrite one phase.

    Args:
        config: None leaves the graph as the model wrote it.

    Raises:
        ExportError: torch cannot trace the model, or a pass failed; the message says why.
    """
    decoder.phase = phase
    inputs, dynamic = _inputs(decoder, phase, max_tokens, batch)
    exported = _exported(decoder, inputs, dynamic, max_tokens)
    graph = exported.graph_module
    fakes = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    mode = detect_fake_mode(fakes)
    assert mode is not None
    try:
        program = lower(graph, mode, fakes, config or SparkConfig())
        program.rolls = False
        before = _copy(exported, program.graph)
        matches = run_passes(program) if config is not None else {}
    except PassFailed as error:
        raise ExportError(f"the {phase} cannot be rewritten: {error}") from error
    if config is None:
        program.module.recompile()
    report = GraphReport(phase, tuple(program.sites), None, matches)
    return _graph(exported, program, phase, max_tokens, report, inputs, dynamic, before)


def _exported(
    decoder: Decoder, inputs: Mapping[str, Tensor], dynamic: dict[str, Any], max_tokens: int
) -> ExportedProgram:
    """What torch.export makes of a decoder; ``dynamic`` is changed where it needs longer prompts.

    Raises:
        ExportError: it cannot.
    """
    least = 0
    while True:
        try:
            with torch.no_grad():
                return torch.export.export(
                    decoder,
                    tuple(inputs.values()),
                    dynamic_shapes=dynamic,
                    strict=False,
                    # What torch cannot prove for every size is checked by the graph.
                    prefer_deferred_runtime_asserts_over_guards=True,
                )
        except Exception as error:  # whatever the model's code, or torch's tracing of it, raises
            text = str(error).strip()
            suggested = re.search(r"tokens = Dim\('tokens', min=(\d+)", text)
            if suggested is None or int(suggested[1]) <= least:
                why = re.search(r"your code specialized it to be a constant", text)
                first = (
                    text.partition("\n")[0] if why is None else "the graph is for one length alone"
                )
                raise ExportError(
                    f"torch cannot export the {decoder.phase}: {type(error).__name__}: {first}"
                ) from error
            least = int(suggested[1])
            dynamic["input_ids"] = {1: Dim("tokens", min=least, max=max_tokens - 1)}


def _inputs(
    decoder: Decoder, phase: Phase, max_tokens: int, batch: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Example inputs by name and their sizes that change."""
    count = 1 if phase == "decode" else max(2, min(max_tokens // 2, 100))
    rows = count if phase == "prefill" else 1
    inputs = {
        "input_ids": torch.zeros(batch, count, dtype=torch.int64),
        "position": torch.zeros(1, dtype=torch.int64),
        "rows": torch.arange(rows),
    }
    dynamic: dict[str, Any] = dict.fromkeys(inputs)
    if phase == "prefill":
        # The last token that fits comes from a decode.
        dynamic["input_ids"] = {1: Dim("tokens", min=2, max=max_tokens - 1)}
        dynamic["rows"] = {0: Dim("rows", min=1, max=max_tokens - 1)}
    if decoder.masked:
        inputs["attention_mask"] = torch.ones(batch, max_tokens, dtype=torch.int64)
        dynamic["attention_mask"] = None
    return inputs, dynamic


def _graph(
    exported: ExportedProgram, program: Program, phase: Phase, max_tokens: int,
    report: GraphReport, inputs: Mapping[str, Tensor], dynamic: Mapping[str, Any],
    before: fx.Graph,
) -> Graph:  # fmt: skip
    """The rewritten graph with the names of what its placeholders stand for."""
    tensors: dict[str, Any] = {**exported.state_dict, **exported.constants}
    written = _written(program)
    placeholders = iter(program.graph.find_nodes(op="placeholder"))
    weights: dict[str, Tensor] = {}
    states: dict[str, Tensor] = {}
    specs: dict[str, tuple[Spec, Side]] = {}
    sources: list[tuple[str, str]] = []
    same: dict[tuple[Any, ...], str] = {}
    plans = program.inputs or [PlainInput()] * len(program.arguments)
    for spec, plan in zip(exported.graph_signature.input_specs, plans, strict=True):
        name = _name(spec.target or "")
        if isinstance(plan, StateInput):
            assert plan.adopted is not None
            for part in STORED:
                states[f"{name}.{part}"] = next(placeholders).meta["val"]
                specs[f"{name}.{part}"] = plan.adopted.form.spec, plan.adopted.side
                sources.append(("state", f"{name}.{part}"))
            continue
        node = next(placeholders)
        if spec.kind is InputKind.USER_INPUT:
            sources.append(("input", spec.arg.name))
        elif node in written:
            if bool(tensors[spec.target].count_nonzero()):
                raise ExportError(
                    f"buffer {name} is written by the model and not zero at first: allowed is zero"
                )
            states[name] = node.meta["val"]
            sources.append(("state", name))
        else:
            value = tensors[spec.target].detach()
            key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
            name = same.setdefault(key, name) if value.numel() else name
            weights[name] = value
            sources.append(("weight", name))
    return Graph(
        phase, program.module, tuple(sources), weights, states, specs, max_tokens, report,
        tuple(inputs.values()), {name: dynamic[name] for name in inputs}, before,
    )  # fmt: skip


def _copy(exported: ExportedProgram, graph: fx.Graph) -> fx.Graph:
    """A graph to look at, since the passes change the one that they get."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    placeholders = copy.find_nodes(op="placeholder")
    for spec, node in zip(exported.graph_signature.input_specs, placeholders, strict=True):
        node.target = _name(spec.target or spec.arg.name)
    return copy


def _written(program: Program) -> set[fx.Node]:
    """The placeholders that the graph copies to."""
    copies = program.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    return {copy.args[0] for copy in copies if copy.args[0].op == "placeholder"}


def _name(target: str) -> str:
    """What the model itself calls a tensor of the decoder around it."""
    return target.removeprefix("model.")
