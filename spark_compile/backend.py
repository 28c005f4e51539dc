"""The Dynamo entry: capture, passes, inner compiler, runtime wrapper."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from . import dynamo, ranks, reuse
from .adoption import give_back
from .config import SparkConfig
from .copies import Whole
from .generation import called_modules, watch_generate
from .offload import has_hooks
from .passes.eligibility import NO_CACHE
from .passes.find_attention import has_softmax
from .passes.lower import as_dense, fake_inputs, lower
from .passes.pipeline import run_passes
from .passes.program import PassFailed, Program
from .plan import Plan, loaded
from .regional import ByBlocks, clear, find_blocks
from .report import GraphReport, OptionError, SparkError, note_activity, record, warn_once
from .runtime import SparkGraph
from .state import SparkTensor
from .torch_private import FakeTensorMode, inductor_options, lookup_backend, writes

Compiled = Callable[..., Any]
InnerCompiler = Callable[[fx.GraphModule, list[Any]], Compiled]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def spark(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """The backend of ``torch.compile(model, backend="spark", options={...})``.

    Args:
        module: Dynamo's graph.
        example_inputs: its inputs; tensors, integers and compressed states.
        options: fields of :class:`SparkConfig`.
        mode: as ``torch.compile``'s, handed on to Inductor.

    Raises:
        OptionError: an option, or the mode, is wrong, or another rank of a model was told others.
        SparkError: under ``strict=True``, where otherwise a SparkWarning is given.
    """
    config = SparkConfig.from_options(options)
    inner = inner_compiler(config, mode)
    dynamo.compiling(partial(_complain, config=config))
    ranks.compare_options(example_inputs, config)
    # Modes of Inductor record CUDA graphs, and those the addresses of a layer's weights.
    reuse_for = config if mode in (None, "default") else None
    return compile_graph(module, example_inputs, config, inner, reuse_for)


def _reset() -> None:
    """Called by ``torch._dynamo.reset``."""
    dynamo.forget()
    ranks.forget()
    reuse.forget()


spark.reset = _reset  # type: ignore[attr-defined]
dynamo.watch(spark, lambda options: partial(_complain, config=SparkConfig.from_options(options)))


def compile_graph(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: SparkConfig,
    inner: InnerCompiler,
    reuse_for: Hashable = None,
) -> Compiled:
    """Rewrite one graph and hand it to ``inner``; where that fails, the untouched graph.

    Graphs compiled with equal ``reuse_for``, which stands for ``config`` and ``inner``, share what
    was compiled if they are equal; None shares nothing.
    """
    start = time.perf_counter()
    fake_mode, fakes = fake_inputs(example_inputs)
    reason = _reason_to_leave_alone(example_inputs)
    described = None
    if reason is None and reuse_for is not None:
        described = reuse.signature(module, example_inputs, fakes, reuse_for)
        found = None if described is None else described.find()
        if found is not None:
            compiled, report = found
            report = replace(report, graph_break=dynamo.graph_break(module))
            record(report)
            return _noted(compiled, _complain_about_refusals(report, config))
    if reason is None:
        try:
            program = lower(module, fake_mode, fakes, config)
            lower_ms, start = _ms_since(start), time.perf_counter()
            matches = run_passes(program)
            passes_ms = _ms_since(start)
            wrapper = _wrapper(program, fakes)
        except PassFailed as error:
            reason = str(error)
    if reason is not None:
        record(GraphReport("left alone", left_alone=reason))
        _complain(f"spark left a graph alone: {reason}", config)
        return _unrewritten(module, example_inputs, fake_mode, fakes, inner)
    sites = tuple(program.sites)
    report = GraphReport(
        program.phase, sites, None, matches, lower_ms, passes_ms,
        graph_break=dynamo.graph_break(module),
        suspicious=bool(program.states) or has_softmax(program.graph),
    )  # fmt: skip
    try:
        again = _complain_about_refusals(report, config)
        start = time.perf_counter()
        if wrapper is None:  # nothing was rewritten
            compiled = inner(module, list(example_inputs))
        else:
            placeholders = program.graph.find_nodes(op="placeholder")
            values = [node.meta["val"] for node in placeholders]
            compiled = wrapper.running(inner(program.module, values))
        if described is not None:
            described.keep(compiled, replace(report, lower_ms=0.0, passes_ms=0.0))
        report = replace(report, compile_ms=_ms_since(start))
    finally:
        record(report)
    return _noted(compiled, again)


def _wrapper(program: Program, fakes: Sequence[Any]) -> SparkGraph | None:
    """What the rewritten graph is called through; None if nothing was rewritten.

    Raises:
        PassFailed: the graph's states cannot be made of what it is called with.
    """
    if not program.replaced and not program.states:
        return None
    try:
        return SparkGraph(program, fakes)
    except Exception as error:
        raise PassFailed(f"the wrapper failed: {type(error).__name__}: {error}") from error


def _ms_since(start_s: float) -> float:
    return (time.perf_counter() - start_s) * 1e3


def optimize(
    model: ModuleT, *, regional: bool = False, plan: Plan | str | Path | None = None, **options: Any
) -> ModuleT:
    """Compile ``model`` in place with ``backend="spark"`` and return it, ready for ``generate``.

    ``torch.compile(model).generate`` runs the uncompiled original: ``torch.compile`` returns a
    wrapper whose other methods are those of the model inside. Compiling in place does not. Of a
    wrapper whose ``generate`` calls a model inside, such as PEFT's, that model is compiled too. A
    ``generate`` that ends without having run a compiled graph gives a SparkWarning. Copies of the
    model, deep or shallow or through ``pickle``, are compiled in the same way.

    Args:
        model: any decoder, or a wrapper around one.
        regional: compile the repeated blocks of the model, elements of an ``nn.ModuleList``, in
            place of the whole; equal ones share a graph, so that compiling takes less time. A
            model whose blocks accelerate has put on several devices is always compiled so.
        plan: formats by layer, as :func:`spark_compile.calibrate` chose them, or the path of the
            file that they are in.
        options: fields of :class:`SparkConfig`.

    Raises:
        OptionError: an option or the plan is wrong, which is a SparkError and a ValueError.
        OSError: the file of the plan cannot be read.
        ValueError: ``regional`` is set and there are no such blocks.
        SparkError: from ``generate``, under ``strict=True``, in place of that warning.
    """
    if plan is not None:
        options = loaded(plan).options_for(model, options)
    config = SparkConfig.from_options(options)
    if "context_parallel" in options:  # a group itself could not be copied with the model
        options = {**options, "context_parallel": config.context_parallel}
    complain = partial(_complain, config=config)
    by_blocks = ByBlocks(options, complain, None if plan is None else "a plan")
    if regional or has_hooks(find_blocks(model).values()):
        by_blocks(model)
    else:
        clear(model)
        compile_whole = Whole(options, dynamo.recompile_limit(dynamo.MOST_GRAPHS), by_blocks)
        for module in called_modules(model):
            compile_whole(module)
    watch_generate(model, complain)
    return model


def _reason_to_leave_alone(example_inputs: Sequence[Any]) -> str | None:
    tensors = [value for value in example_inputs if isinstance(value, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "gradients are enabled and a parameter needs one (training): use torch.no_grad()"
    return None


def inner_compiler(config: SparkConfig, mode: str | None) -> InnerCompiler:
    """The compiler of the rewritten graph.

    Raises:
        OptionError: Inductor does not know the mode, or is not the one that compiles.
    """
    compiler = lookup_backend(config.inner)
    if mode is None or mode == "default":
        return compiler
    if config.inner != "inductor":
        raise OptionError(f"mode is {mode!r}: allowed with inner={config.inner!r} is None")
    try:
        patches = inductor_options(mode)
    except RuntimeError as error:
        raise OptionError(f"mode is {mode!r}: allowed is a mode of Inductor: {error}") from error
    return lambda module, inputs: compiler(module, inputs, config_patches=patches)  # type: ignore[call-arg]


def _unrewritten(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    fake_mode: FakeTensorMode,
    fakes: Sequence[Any],
    inner: InnerCompiler,
) -> Compiled:
    """The untouched graph under the inner compiler; its states are recovered before each call."""
    if not any(isinstance(value, SparkTensor) for value in example_inputs):
        return _noted(inner(module, list(example_inputs)))
    compiled = inner(module, [as_dense(fake_mode, fake) for fake in fakes])

    def densely(*args: Any) -> Any:
        note_activity()
        recovered = {i: a.dense() for i, a in enumerate(args) if isinstance(a, SparkTensor)}
        before = {i: writes(dense) for i, dense in recovered.items()}
        results = compiled(*(recovered.get(i, a) for i, a in enumerate(args)))
        for i, dense in recovered.items():
            if writes(dense) != before[i]:
                give_back(args[i], dense)
        return results

    return densely


def _noted(compiled: Compiled, again: Callable[[], None] | None = None) -> Compiled:
    """The same code; that it runs is noted, as a rewritten graph does by itself, for ``generate``.

    Args:
        again: called when it does not run for the first time.
    """
    if isinstance(compiled, SparkGraph):
        return compiled
    has_run = False

    def run(*args: Any) -> Any:
        nonlocal has_run
        note_activity()
        if has_run and again is not None:
            again()
        has_run = True
        return compiled(*args)

    return run


def _complain_about_refusals(report: GraphReport, config: SparkConfig) -> Callable[[], None] | None:
    """Complain of what stays dense, or return what does when the graph runs again.

    A graph without a cache may be a part of a model that has one in another part, not traced yet:
    an encoder, or what is between graph breaks, as where images come between tokens.
    """
    seen = dynamo.seen()
    before, seen.graph_break = seen.graph_break, report.graph_break
    caching = [site for site in report.sites if NO_CACHE not in str(site.refusal)]
    seen.cache |= bool(caching)
    if caching and len(report.rewritten) == len(caching):
        return None
    if report.rewritten:
        total = f"{len(report.rewritten)} of {len(report.sites)}"
        message = f"spark rewrote {total} sites: {report.refusals()}"
    elif report.sites:
        message = f"spark rewrote nothing: {report.refusals()}"
    else:
        message = "spark found no attention in the graph"
        if report.graph_break or before:
            which = "which" if report.graph_break else "nor in the one before it, which"
            message += f", {which} ends at a graph break, {report.graph_break or before}"
        message += ": nothing was rewritten"
    if caching or (report.phase == "decode" if report.sites else report.suspicious):
        _complain(message, config)
        return None
    return lambda: None if seen.cache else _complain(message, config)


def _complain(message: str, config: SparkConfig) -> None:
    """Warn once per message, or raise under ``strict``."""
    if config.strict:
        raise SparkError(message)
    warn_once(message, stacklevel=2)
