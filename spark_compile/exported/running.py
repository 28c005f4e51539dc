"""Running a program of an exported folder, compiled or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind

from ..report import warn_once
from ..torch_private import drop_false_symbols, lookup_backend
from .aot import Package, misfit
from .decoder import Phase
from .folder import Manifest

Runner = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""Takes the states, which it changes, and the inputs; returns logits [B, K, V]."""


def runner(
    folder: Path, manifest: Manifest, phase: Phase, weights: Mapping[str, Tensor], inner: str
) -> Runner:
    """What runs a phase; see ``load``."""
    file = manifest.programs[phase]
    if inner == "inductor" and file.package is not None:
        if (reason := misfit(manifest)) is None:
            try:
                return Package(folder / file.package, file, weights)
            except RuntimeError as error:
                reason = str(error).strip().partition("\n")[0]
        warn_once(f"packages cannot run here, their graphs are compiled instead: {reason}")
    program = torch.export.load(folder / file.file)
    module = program.graph_module
    specs = program.graph_signature.input_specs
    lifted = [spec.target for spec in specs if spec.kind is InputKind.CONSTANT_TENSOR]
    fixed = [program.constants[str(name)] for name in lifted]  # a portable program has some
    fixed += [weights[name] for name in file.weights]
    call: Callable[..., Sequence[Tensor]] = module
    if inner != "eager":
        values = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
        drop_false_symbols(values)
        with torch.no_grad():
            call = lookup_backend(inner)(module, values)

    def run(states: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            return call(*fixed, *states, *inputs)[0]

    return run
