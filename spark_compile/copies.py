"""Copies of a module that is compiled in place, which are compiled as it is.

``nn.Module.__getstate__`` leaves out what ``module.compile`` has set. So a copy, a deep copy and
what is loaded from a pickle (or ``torch.save``) would run as written, with a dense cache.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .offload import offloaded_cache
from .torch_private import call_of, compiled_call, set_compiled_call

_AGAIN = "_spark_again"
"""Attribute of the call that is compiled: what compiles a copy of the module."""


Again = Callable[[nn.Module], None]
"""Compiles a module in place, which may have no attributes yet; can be copied and pickled."""


@dataclass(frozen=True)
class Whole:
    """Compiles a module's call."""

    options: Mapping[str, Any]
    """Of the backend; fields of :class:`SparkConfig`."""
    limit: Mapping[str, Any]
    """As ``dynamo.recompile_limit`` gives it."""
    by_blocks: Again
    """Compiles it in the way that goes with a cache of which each layer is moved by itself."""

    def __call__(self, module: nn.Module) -> None:
        options = dict(self.options)
        call = torch.compile(call_of(module), backend="spark", options=options, **self.limit)

        def whole(*args: Any, **kwargs: Any) -> Any:
            if offloaded_cache((*args, *kwargs.values())) is None:
                return call(*args, **kwargs)
            self.by_blocks(module)
            return module(*args, **kwargs)

        set_call(module, whole, self)


def set_call(module: nn.Module, call: Callable[..., Any], again: Again) -> None:
    """Let ``module(...)`` be ``call``, and ``again`` see to its copies."""
    setattr(call, _AGAIN, again)
    set_compiled_call(module, call)
    # By class, of which modules that are not compiled are copied as before. A method of the
    # instance, __getstate__, could not tell a shallow copy from the module itself.
    cls = type(module)
    if cls not in copyreg.dispatch_table:
        copyreg.pickle(cls, _reduced)


def clear_calls(model: nn.Module) -> None:
    """Undo :func:`set_call` for all modules in a model, which is to be compiled in another way."""
    for module in model.modules():
        if _again(module) is not None:
            set_compiled_call(module, None)


def _again(module: nn.Module) -> Again | None:
    return getattr(compiled_call(module), _AGAIN, None)


def _reduced(module: nn.Module) -> str | tuple[Any, ...]:
    """What ``copy`` and ``pickle`` make a copy of."""
    again, reduced = _again(module), module.__reduce_ex__(4)
    if again is None or isinstance(reduced, str):
        return reduced
    make, arguments, *state = reduced
    return _compiled_copy, (again, make, *arguments), *state


def _compiled_copy(again: Again, make: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    module = make(*arguments)
    again(module)
    return module
