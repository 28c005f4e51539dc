"""From Dynamo's graph of torch calls to functional pre-dispatch ATen.

Pre-dispatch, so that scaled_dot_product_attention, softmax and linear stay whole; functional, so
that a value is the same wherever it is read. Compressed states are traced as dense tensors of
their logical shape, because the patterns match what the model's code computes with.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from ..config import SparkConfig
from ..state import SparkTensor
from ..torch_private import (
    FakeTensor,
    FakeTensorMode,
    TracingContext,
    aot_export_module,
    detect_fake_mode,
    leave_transforms,
    transform_depth,
)
from .program import PassFailed, Program
from .subclasses import flattened, without_subclasses, wrappers
from .vmap import without_vmaps


def fake_inputs(example_inputs: Sequence[Any]) -> tuple[FakeTensorMode, list[Any]]:
    """Fakes of a backend's example inputs with the dynamic sizes that Dynamo decided on.

    Returns:
        The fake mode and the fakes; a compressed state becomes a state of fake tensors.
    """
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    if mode is None:
        mode = detect_fake_mode(example_inputs) or FakeTensorMode()
    contexts: Any = {} if context is None else context.tensor_to_context

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        symbolic = contexts.get(value)
        if symbolic is None:
            return mode.from_tensor(value, static_shapes=True)
        source = getattr(symbolic, "tensor_source", None)
        return mode.from_tensor(value, symbolic_context=symbolic, source=source, trace=False)

    return mode, [fake(value) for value in example_inputs]


def as_dense(mode: FakeTensorMode, fake: Any) -> Any:
    """A plain fake of the logical shape in place of a fake state."""
    if not isinstance(fake, SparkTensor):
        return fake
    with mode:
        return torch.empty(fake.shape, dtype=fake.dtype, device=fake.device)


def lower(
    module: fx.GraphModule, mode: FakeTensorMode, fakes: Sequence[Any], config: SparkConfig
) -> Program:
    """Lower a graph.

    Inputs that are tensor subclasses become the plain tensors in them, and mutations of inputs
    ``copy_`` calls at the end, as in AOTAutograd. Weights that Dynamo left in the module
    (Inductor's freezing asks for that) stay attributes.

    Raises:
        PassFailed: the graph cannot be made functional.
    """
    wrapped = wrappers(fakes)
    flat = flattened(fakes, wrapped)
    dense = [as_dense(mode, fake) for fake in flat]
    transforms = transform_depth()
    try:
        with torch.fx.traceback.preserve_node_meta(), torch.no_grad():
            module = without_subclasses(without_vmaps(_without_dropout(module)), wrapped)
            exported = aot_export_module(module, dense, trace_joint=False, pre_dispatch=True)
    except Exception as error:
        # A transform that was entered and not exited would stay on the caller's stack.
        leave_transforms(transforms)
        first_line = str(error).strip().partition("\n")[0]  # torch adds the model's own traceback
        raise PassFailed(f"pass Lower failed: {type(error).__name__}: {first_line}") from error
    lowered, signature = exported
    assert isinstance(lowered, fx.GraphModule)
    _write_back_mutations(lowered.graph, signature)
    _restore_attributes(module, lowered, signature)
    placeholders = lowered.graph.find_nodes(op="placeholder")
    states = {
        node: fake
        for node, fake in zip(placeholders, flat, strict=True)
        if isinstance(fake, SparkTensor)
    }
    return Program(lowered, mode, config, list(placeholders), states, wrapped)


def _without_dropout(module: fx.GraphModule) -> fx.GraphModule:
    """The module itself, or a copy without dropout that is off, which returns its very input.

    What it returns is written to by some models (transformers' XLM), and of a dropout, on or off,
    the export forbids that.
    """
    dropout = torch.nn.functional.dropout
    if not any(map(_is_off, module.graph.find_nodes(op="call_function", target=dropout))):
        return module
    module = fx.GraphModule(module, copy.deepcopy(module.graph))
    for node in module.graph.find_nodes(op="call_function", target=dropout):
        if _is_off(node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            module.graph.erase_node(node)
    module.recompile()
    return module


def _is_off(dropout: fx.Node) -> bool:
    given = inspect.signature(torch.nn.functional.dropout).bind(*dropout.args, **dropout.kwargs)
    given.apply_defaults()
    return not given.arguments["training"] or given.arguments["p"] == 0


def _write_back_mutations(graph: fx.Graph, signature: Any) -> None:
    """Replace the leading outputs, which are new values of inputs, by copies into the inputs."""
    mutated = {**signature.user_inputs_to_mutate, **signature.buffers_to_mutate}
    if not mutated:
        return
    output = graph.output_node()
    values: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    by_name = {node.name: node for node in graph.nodes}
    by_name |= {name: by_name[node] for node, name in signature.inputs_to_buffers.items()}
    with graph.inserting_before(output):
        for value in values[: len(mutated)]:
            target = by_name[mutated[value.name]]
            copy = graph.call_function(torch.ops.aten.copy_.default, (target, value))
            copy.meta["val"] = target.meta["val"]
    output.args = (tuple(values[len(mutated) :]),)


def _restore_attributes(module: fx.GraphModule, lowered: fx.GraphModule, signature: Any) -> None:
    """Make attributes of the parameters and buffers that the export turned into inputs."""
    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    if not lifted:
        return
    graph = lowered.graph
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for index, node in enumerate(graph.find_nodes(op="placeholder")):
        if node.name not in lifted:
            continue
        name = f"_spark_constant_{index}"
        value = attrgetter(lifted[node.name])(module)
        if isinstance(value, torch.nn.Parameter):
            lowered.register_parameter(name, value)
        else:
            lowered.register_buffer(name, value)
        with graph.inserting_before(first):
            attribute = graph.get_attr(name)
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        graph.erase_node(node)
