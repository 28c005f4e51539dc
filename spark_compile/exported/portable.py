"""Programs without operators of this library, which plain torch can load and run."""

from __future__ import annotations

import copy

import torch
from torch import fx
from torch.export import ExportedProgram

from ..kernels.reference import portable as kernels
from ..torch_private import OpOverload
from .decoder import ExportError

_FUNCTIONS = {
    torch.ops.spark.build.default: kernels.build,
    torch.ops.spark.step.default: kernels.step,
}


def as_aten(module: fx.GraphModule) -> fx.GraphModule:
    """A rewritten graph whose operators that store a cache are functions that torch can trace."""
    graph = copy.deepcopy(module.graph)
    for target, function in _FUNCTIONS.items():
        for node in graph.find_nodes(op="call_function", target=target):
            node.target = function
    return fx.GraphModule(module, graph)


def check_aten(program: ExportedProgram) -> None:
    """Raise ExportError if a program has operators that plain torch does not have."""
    foreign = set()
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            targets = {node.target for node in module.graph.nodes if node.op == "call_function"}
            foreign |= {t for t in targets if isinstance(t, OpOverload)}
    names = sorted(str(target) for target in foreign if target.namespace != "aten")
    if names:
        raise ExportError(
            f"the program has the operators {', '.join(names)}: allowed is ATen alone where it is "
            "portable"
        )
