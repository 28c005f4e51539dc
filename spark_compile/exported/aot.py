"""Packages of AOTInductor: the graphs as native code beside the programs, without the weights."""

from __future__ import annotations

import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.cpu.build import BuildFailed, level, library, supported
from ..torch_private import compile_package, load_package
from .decoder import ExportError
from .folder import Machine, Manifest, ProgramFile, constant_names

if TYPE_CHECKING:
    from .graph import Graph

LIBRARY = "libspark.so"
"""The native operators with their schemas, for programs without Python."""
_CONFIG = {
    "aot_inductor.package_constants_in_so": False,
    "freezing": False,  # frozen weights have other names and bytes than those of the file
}
_BY_NAME = {"aes", "clflush", "clflushopt", "clwb", "sha", "sse4a"}
"""What compilers do not use by themselves, nor does what Inductor generates ask for it."""


def package_file(phase: str) -> str:
    """The name of the package of a phase."""
    return f"{phase}.aoti.pt2"


def native_level() -> str:
    """The level of the native kernels.

    Raises:
        ExportError: they are turned off.
    """
    if (chosen := level()) == "off":
        allowed = ", ".join(supported())
        raise ExportError(f"SPARK_COMPILE_CPU is 'off': allowed with aot is {allowed}")
    return chosen


def write_packages(
    graphs: Mapping[str, Graph], folder: Path, told: Callable[[str], None]
) -> Machine:
    """Compile each graph to a package in a folder, and the operators that they call to a library.

    Returns:
        What a machine needs to run them.

    Raises:
        ExportError: they cannot be compiled here; the message says why.
    """
    chosen = native_level()
    told(f"building {LIBRARY}")
    try:
        with library(chosen, standalone=True) as built:
            shutil.copyfile(built, folder / LIBRARY)
    except BuildFailed as error:
        raise ExportError(f"{LIBRARY} cannot be built: {error}") from error
    for phase, graph in graphs.items():
        told(f"compiling the {phase}")
        try:
            _write(graph, folder / package_file(phase))
        except Exception as error:  # whatever Inductor or the compiler raises
            first = str(error).strip().partition("\n")[0]
            raise ExportError(
                f"AOTInductor cannot compile the {phase}: {type(error).__name__}: {first}"
            ) from error
    return this_machine(chosen)


def _write(graph: Graph, path: Path) -> None:
    with warnings.catch_warnings():
        # torch copies its own outdated classes.
        warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`", FutureWarning)
        with torch.no_grad():
            program = graph.program(with_weights=True)
            compile_package(program, str(path), dict(_CONFIG))
    names = set(constant_names(graph.weights).values())
    if unknown := set(_load(path).get_constant_fqns()) - names:
        raise ValueError(f"it has constants of its own: {', '.join(sorted(unknown))}")


def this_machine(kernels: str) -> Machine:
    """This one.

    Args:
        kernels: level of the native kernels.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        known = torch.cpu.get_capabilities()
        names = {name for name, has in known.items() if has is True} - _BY_NAME
        if "amx" not in supported():  # the operating system does not grant the tile registers
            names = {name for name in names if not name.startswith("amx")}
    else:  # before torch 2.13
        names = {torch.backends.cpu.get_cpu_capability()}
    return Machine(sys.platform, platform.machine(), tuple(sorted(names)), kernels)


def misfit(manifest: Manifest) -> str | None:
    """Why the packages of a folder cannot run here; None if they can."""
    wanted, torch_version = manifest.machine, manifest.versions.get("torch")
    if wanted is None:
        return "the manifest does not say what they need"
    here = this_machine(wanted.kernels)
    for name, needed, found in (
        ("torch", torch_version, version("torch")),
        ("system", wanted.system, here.system),
        ("processor", wanted.processor, here.processor),
    ):
        if needed != found:
            return f"{name} is {found!r}, allowed is {needed!r}"
    if lacking := set(wanted.cpu) - set(here.cpu):
        return f"this CPU has no {', '.join(sorted(lacking))}"
    return None


class Package:
    """A loaded package that computes with the weights that it is given, without a copy of them."""

    def __init__(self, path: Path, program: ProgramFile, weights: Mapping[str, Tensor]) -> None:
        """
        Raises:
            RuntimeError: it cannot be loaded.
        """
        package = _load(path)
        known = {key: weights[name] for name, key in constant_names(program.weights).items()}
        # The package has their addresses; those that Inductor has written into its code are not
        # asked for.
        self._constants = {key: known[key] for key in package.get_constant_fqns()}
        package.load_constants(self._constants, check_full_update=True, user_managed=True)
        self._loader = package.loader  # the package itself parses its signature at every call

    def __call__(self, states: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """Logits [B, K, V] of one call, as ``running.Runner`` has it."""
        with torch.no_grad():
            return self._loader.boxed_run([*states, *inputs])[0]  # type: ignore[no-any-return]


def _load(path: Path) -> Any:
    return load_package(str(path))
