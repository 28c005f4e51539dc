"""Every part of torch in use that torch does not document, with why, and what breaks without it.

What torch changes is mended here; ``make test-matrix`` runs the tests with the oldest and the
newest torch. A test finds private names anywhere else.
"""

# isort: off  (in the order of what they are for)
# The imports are in the order of what they are for.
# isort: off
from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import CodeType
from typing import Any

import torch
import torch._dynamo
import torch._inductor

# The errors of a backend reach the caller as they are only if they are of this class: every other
# one becomes Dynamo's BackendCompilerFailed, and ``except SparkError`` catches nothing.
from torch._dynamo.exc import ShortenTraceback as ShortenTraceback

# Fake tensors: inputs of a backend, and what passes compute sizes and dtypes with. Nothing works
# without them. The cache of fake results knows no operators whose fakes depend on a spec.
from torch._guards import detect_fake_mode as detect_fake_mode
from torch._subclasses import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import disable_fake_tensor_cache as disable_fake_tensor_cache
from torch._subclasses.fake_tensor import is_fake as is_fake

# What Dynamo knows of the frame that it compiles: which sizes vary, and the guards, to which those
# of equal layers are added. Without it sizes are burnt into graphs.
from torch._guards import TracingContext as TracingContext

# The functional pre-dispatch ATen that all passes read; torch.export's is the same, but takes a
# module with parameters, not Dynamo's graph.
from torch._functorch.aot_autograd import aot_export_module as aot_export_module
from torch.fx.experimental.proxy_tensor import make_fx as make_fx

# Whether a relation of sizes holds for all of them. ``bool`` would add a guard, a recompilation.
from torch.fx.experimental.symbolic_shapes import statically_known_true as statically_known_true

# ``vmap`` and autocast are operators in Dynamo's graph that pre-dispatch tracing does not run:
# transformers' masks, and code around weights that are tensor subclasses, would not be traced.
from torch._functorch import predispatch as predispatch
from torch.amp import autocast_mode

# Weights that are tensor subclasses (torchao, DTensor) are flattened by their own protocol, and so
# are arguments of operators on states. A DTensor's mesh has a stand-in in Dynamo's graph.
from torch._library.fake_class_registry import FakeScriptObject as FakeScriptObject
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import (
    is_traceable_wrapper_subclass as is_traceable_wrapper_subclass,
)
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only

# Blocks that are compiled one by one: a guard on the module's identity, so that Dynamo's limit
# counts for each of them, and what Dynamo guards every graph on, by which equal graphs are told.
from torch._C._dynamo.guards import GlobalStateGuard as GlobalStateGuard
from torch._dynamo.eval_frame import innermost_backend as innermost_backend
from torch._dynamo.guards import GuardBuilder as GuardBuilder
from torch._dynamo.source import LocalSource as LocalSource
from torch._dynamo.symbolic_convert import InstructionTranslator as InstructionTranslator

# Inductor, or another compiler, called by name on a graph that did not come from Dynamo.
from torch._dynamo.backends.registry import lookup_backend as lookup_backend

# What an exported graph calls: told apart from Python's operators.
from torch._ops import OpOverload as OpOverload

# Which parts of a graph another engine could take, without importing that engine.
from torch.fx.passes.infra.partitioner import (
    CapabilityBasedPartitioner as CapabilityBasedPartitioner,
)
from torch.fx.passes.operator_support import OperatorSupportBase as OperatorSupportBase

# isort: on

enter_autocast: Callable[..., Any] = autocast_mode._enter_autocast
exit_autocast: Callable[..., Any] = autocast_mode._exit_autocast

# A device-side assertion: the only one that an exported program keeps.
assert_async: Callable[[torch.Tensor, str], None] = torch._assert_async

group_named: Callable[[Any], Any] = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
"""The process group of a name, which is what collectives in a graph have of it."""

limit_log = logging.getLogger("torch._dynamo.convert_frame")
"""Where Dynamo says that it compiles no more graphs of a frame; it tells nobody else."""

no_torch_function = torch._C._disabled_torch_function_impl
"""A subclass's ``__torch_function__`` that does nothing: Dynamo traces such a subclass."""

make_wrapper_subclass: Callable[..., Any] = torch.Tensor._make_wrapper_subclass
"""A tensor without storage of its own, which is what a state is."""

maybe_mark_dynamic: Callable[[torch.Tensor, int], None] = torch._dynamo.maybe_mark_dynamic
"""A size that varies, but that a graph may hold constant: without it every graph is made twice."""


def recompile_limit() -> int:
    """How many graphs of a frame Dynamo keeps."""
    limit: int = torch._dynamo.config.recompile_limit
    return limit


def transform_depth() -> int:
    """How many of torch.func's transforms are entered."""
    depth: int = torch._C._functorch.get_dynamic_layer_stack_depth()
    return depth


def leave_transforms(depth: int) -> None:
    """Leave all transforms but so many: else an error in ``vmap`` would keep the caller in it."""
    torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)


def swap_tensors(one: torch.Tensor, other: torch.Tensor) -> None:
    """Exchange what two objects are, but for class and attributes.

    ``torch.utils.swap_tensors`` refuses objects with weak references, which Dynamo has on its
    inputs: a model's buffer could not become a state.
    """
    torch._C._swap_tensor_impl(one, other)


module_call: CodeType = torch.nn.Module._wrapped_call_impl.__code__
"""The frame of ``module(...)``, compiled or not: whose call a graph is compiled in."""


def call_of(module: torch.nn.Module) -> Callable[..., Any]:
    """What ``module(...)`` runs, hooks included, if the module is not compiled."""
    call: Callable[..., Any] = module._call_impl
    return call


def compiled_call(module: torch.nn.Module) -> Any:
    """What ``module(...)`` runs if the module is compiled in place, else None."""
    return vars(module).get("_compiled_call_impl")


def set_compiled_call(module: torch.nn.Module, call: Callable[..., Any] | None) -> None:
    """As ``module.compile`` does, but for a call of one's own; None: as written.

    Without it blocks could not be compiled one by one, nor copies of a model as it is.
    """
    # Not by setattr, which a wrapper may hand on to the module inside.
    if call is None:
        vars(module).pop("_compiled_call_impl", None)
    else:
        vars(module)["_compiled_call_impl"] = call


def storage_identity(tensor: torch.Tensor) -> int:
    """Equal for tensors on one storage, also where that has no address yet."""
    identity: int = tensor.untyped_storage()._cdata
    return identity


def writes(tensor: torch.Tensor) -> int:
    """How often a tensor was written to in place."""
    return tensor._version


def inductor_options(mode: str) -> dict[str, Any]:
    """What a mode of Inductor stands for.

    Raises:
        RuntimeError: there is no such mode.
    """
    return dict(torch._inductor.list_mode_options(mode))


def inductor_config() -> Any:
    """Inductor's options: part of what makes two graphs equal."""
    from torch._inductor import config

    return config


def fresh_inductor_cache() -> AbstractContextManager[Any]:
    """An empty cache of Inductor's: compile times are not those of an earlier run."""
    from torch._inductor.utils import fresh_cache

    return fresh_cache()


def compile_package(
    program: torch.export.ExportedProgram, path: str, options: dict[str, Any]
) -> None:
    """AOTInductor, documented with a leading underscore alone."""
    torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)


def load_package(path: str) -> Any:
    """A package of AOTInductor."""
    return torch._inductor.aoti_load_package(path)


def drop_false_symbols(values: Sequence[object]) -> None:
    """Let a loaded program's sizes be what Inductor expects.

    torch 2.13 notes the value of every product of sizes that it reads as if that were a symbol.
    """
    mode = detect_fake_mode(values)
    known = getattr(getattr(mode, "shape_env", None), "backed_var_to_val", {})
    for name in [name for name in known if not name.is_symbol]:
        del known[name]


def can_tile() -> bool:
    """Whether the operating system lets this process use AMX, which has to be asked for."""
    return bool(torch.cpu._init_amx())
