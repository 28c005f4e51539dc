"""Dynamo's cache of graphs: whose they count as, and a word when it takes no more.

Dynamo keeps the graphs of all modules that run the same code in one list, and compiles no more
once there are ``torch._dynamo.config.recompile_limit`` (8) of them. Layers of a decoder that are
compiled one by one need two or three each: the graph of a layer reads its own part of the cache.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import fx, nn

from . import torch_private
from .torch_private import (
    GuardBuilder,
    InstructionTranslator,
    LocalSource,
    TracingContext,
    innermost_backend,
    limit_log,
    module_call,
)

Complain = Callable[[str], None]
MOST_GRAPHS = 32
"""Of a whole model. Prompts in chunks need about ten: first chunks and later ones, of one token and
of more, each of the sizes that come first and then of all."""


@dataclass
class Seen:
    """What the backend has met so far in the graphs of one model."""

    cache: bool = False
    """An attention with a cache, rewritten or refused."""
    graph_break: str | None = None
    """The latest one, as :func:`graph_break` says it."""


_modules: WeakKeyDictionary[CodeType, WeakSet[nn.Module]] = WeakKeyDictionary()
_complaints: WeakKeyDictionary[object, Complain] = WeakKeyDictionary()
"""By what Dynamo calls to compile graphs, one for each call of ``torch.compile``."""
_seen: WeakKeyDictionary[object, Seen] = WeakKeyDictionary()
_by_options: dict[object, Callable[[Mapping[str, Any] | None], Complain]] = {}


def watch(backend: object, by_options: Callable[[Mapping[str, Any] | None], Complain]) -> None:
    """Look out for limits that are met by frames which a backend compiles.

    Args:
        by_options: gives who is told where ``torch.compile`` got such options. A frame may meet a
            limit before the backend has seen a graph: a hook that breaks each one, a decorator.
    """
    _by_options[backend] = by_options
    limit_log.addHandler(_watch)


def compiling(complain: Complain) -> None:
    """Called by the backend for each graph, while Dynamo traces the frame that it is from.

    Args:
        complain: is told when Dynamo refuses to compile a frame again for the same call of
            ``torch.compile``.
    """
    context = TracingContext.try_get()
    if context is None:
        return  # somebody calls the backend without Dynamo
    root = InstructionTranslator.current_tx().output.root_tx
    _count_by_module(root.f_code, root.f_locals, context)
    _complaints[_compiler()] = complain
    if _watch not in limit_log.handlers:
        limit_log.addHandler(_watch)


def compiler() -> object | None:
    """What stands for the call of ``torch.compile`` whose graph Dynamo compiles now, if it does."""
    return None if TracingContext.try_get() is None else _compiler()


def seen() -> Seen:
    """What was met in graphs of the model that is being called, of which parts may be compiled one
    by one; outside of a model, of the call of ``torch.compile`` for which Dynamo compiles now."""
    frame: FrameType | None = sys._getframe(1)
    owner: object | None = compiler()
    while frame is not None:
        if frame.f_code is module_call:
            owner = frame.f_locals["self"]
        frame = frame.f_back
    return Seen() if owner is None else _seen.setdefault(owner, Seen())


def graph_break(module: fx.GraphModule) -> str | None:
    """Why and where Dynamo ended a graph in the middle of a function, if it did."""
    reason = getattr(module, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    what = str(reason.reason).strip().partition("\n")[0]
    place = [f"{frame.filename}:{frame.lineno}" for frame in reason.user_stack[-1:]]
    return " at ".join((what, *place))


def recompile_limit(graphs: int) -> dict[str, int]:
    """An argument of ``torch.compile``: room for at least so many graphs.

    Empty where torch does not have it: then ``torch._dynamo.config.recompile_limit`` counts.
    """
    if "recompile_limit" not in inspect.signature(torch.compile).parameters:
        return {}
    return {"recompile_limit": max(graphs, torch_private.recompile_limit())}


def forget() -> None:
    """Drop everything, as ``torch._dynamo.reset`` drops all graphs."""
    _modules.clear()
    _complaints.clear()
    _seen.clear()


def _count_by_module(code: CodeType, f_locals: dict[str, object], context: TracingContext) -> None:
    """Let the limit count this graph for the module that it is from alone.

    It does where a guard on the module's identity goes with the graph. That guard costs nothing if
    the graphs of other modules did not fit: then something else guards on what tells them apart.
    """
    here = {name: value for name, value in f_locals.items() if isinstance(value, nn.Module)}
    known = _modules.setdefault(code, WeakSet())
    if any(module not in here.values() for module in known):
        for name in here:
            guard = LocalSource(name).make_guard(GuardBuilder.ID_MATCH)
            context.guards_context.dynamo_guards.add(guard)
    known.update(here.values())


def _compiler() -> object:
    """What Dynamo calls to compile graphs of the frame that it is at; nothing else tells whose."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == limit_log.name and "compiler_fn" in frame.f_locals:
            return frame.f_locals["compiler_fn"]
        frame = frame.f_back
    return _compiler


def _complain_of(compiler: object) -> Complain | None:
    if compiler in _complaints:
        return _complaints[compiler]
    given: Any = innermost_backend(compiler)  # type: ignore[arg-type]
    by_options = _by_options.get(getattr(given, "compiler_fn", given))
    return None if by_options is None else by_options(getattr(given, "kwargs", {}).get("options"))


class _Watch(logging.Handler):
    """Reads what Dynamo logs: there is no other sign of a limit that is met."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "recompile_limit" not in text:
            return
        complain = _complain_of(_compiler())
        place = re.search(r"'[^']*' \(.*:\d+\)", text)
        if complain is not None and place is not None:
            complain(
                f"Dynamo compiles no more graphs of {place[0]}: a limit of torch._dynamo.config, "
                "recompile_limit or accumulated_recompile_limit, is met. What it has not compiled "
                "runs as written, and the caches of layers it meets first now stay dense. Raise "
                "the limit; spark_compile.optimize(model, regional=True) gives each layer one of "
                "its own"
            )


_watch = _Watch()
