"""Compiled graphs by what they compute, so that layers compiled one by one share one graph.

The layers of a decoder differ in their weights and in their place in the cache. Both are inputs of
a graph: Dynamo's graphs of two equal layers are the same but for the names of nodes and of symbolic
sizes. Inductor's own cache looks behind the lowering and the passes, and at those names.

What was compiled relies on facts about the sizes (guards). They are evaluated again on the sizes of
the graph that reuses it, which makes them guards of that graph too, as Inductor's cache does it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import SymInt, Tensor, fx

from .report import GraphReport
from .torch_private import (
    GlobalStateGuard,
    inductor_config,
    is_traceable_wrapper_subclass,
    storage_identity,
)

_CAPACITY = 64
_kept: dict[Hashable, _Kept] = {}


class _Incomparable(Exception):
    """Something in a graph or an input that two graphs cannot be compared by."""


@dataclass(frozen=True)
class _Kept:
    compiled: Callable[..., Any]
    report: GraphReport
    guards: str | None
    """What must hold for the sizes of a graph, as ``ShapeEnv`` writes it."""


@dataclass(frozen=True)
class Signature:
    """What a graph computes on which inputs: a key, and the symbolic sizes it is a function of."""

    key: Hashable
    sizes: tuple[SymInt, ...]

    def find(self) -> tuple[Callable[..., Any], GraphReport] | None:
        """What was kept for an equal graph whose guards hold for these sizes, with its report."""
        kept = _kept.get(self.key)
        if kept is None:
            return None
        if kept.guards is not None:
            shape_env = self.sizes[0].node.shape_env
            # On the numbers first: a guard that fails must not become a guard of this graph.
            hints = [size.node.hint for size in self.sizes]
            if not shape_env.evaluate_guards_expression(kept.guards, hints):
                return None
            # On the symbols it is a symbol, too, until somebody asks.
            if not bool(shape_env.evaluate_guards_expression(kept.guards, self.sizes)):
                raise AssertionError(f"holds for {hints} and not for their symbols: {kept.guards}")
        return kept.compiled, kept.report

    def keep(self, compiled: Callable[..., Any], report: GraphReport) -> None:
        """Offer what was compiled to equal graphs to come; the oldest gives way."""
        guards = None
        if self.sizes:
            shape_env = self.sizes[0].node.shape_env
            relevant = shape_env.get_pruned_guards(self.sizes)
            guards = shape_env.produce_guards_expression(self.sizes, guards=relevant)
        if len(_kept) >= _CAPACITY:
            del _kept[next(iter(_kept))]
        _kept[self.key] = _Kept(compiled, report, guards)


def forget() -> None:
    """Drop everything; ``torch._dynamo.reset`` calls this."""
    _kept.clear()


def signature(
    module: fx.GraphModule, inputs: Sequence[Any], fakes: Sequence[Any], options: Hashable
) -> Signature | None:
    """Describe a graph up to the names in it.

    Args:
        module: Dynamo's graph.
        inputs: its example inputs, which tell what shares storage.
        fakes: the same with symbolic sizes.
        options: whatever else the result depends on.

    Returns:
        The signature, None if the graph has parts that cannot be compared.
    """
    sizes = _Sizes()
    try:
        for fake in fakes:
            sizes.collect(fake)
        storages: dict[int, int] = {}
        ambient = (options, _modes(), _inductor_options())
        described = tuple(
            _input(value, fake, sizes, storages) for value, fake in zip(inputs, fakes, strict=True)
        )
        key = (ambient, tuple(_nodes(module.graph)), described)
        hash(key)
    except (_Incomparable, TypeError):
        return None
    return Signature(key, tuple(sizes.symbols.values()))


def _modes() -> Hashable:
    """Gradient mode, autocast, threads and what else Dynamo guards each of its graphs on."""
    return str(GlobalStateGuard().__getstate__()), torch.is_inference_mode_enabled()


def _inductor_options() -> Hashable:
    config = inductor_config()
    if config.triton.cudagraphs:
        raise _Incomparable("a CUDA graph records addresses, of weights too")
    options: str = config.get_hash()
    return options


@dataclass
class _Sizes:
    """The symbols in the sizes of the inputs, in the order of their appearance."""

    symbols: dict[sympy.Symbol, SymInt] = field(default_factory=dict)

    def collect(self, fake: Any) -> None:
        """Note the symbols that are sizes of a tensor or of what it stores, or integers."""
        for size in _sizes_in(fake):
            expression = size.node.expr
            if isinstance(expression, sympy.Symbol) and size.node.has_hint():
                self.symbols.setdefault(expression, size)

    def name(self, size: int | SymInt) -> Hashable:
        """A size with symbols named by that order."""
        if isinstance(size, int):
            return size
        order = {symbol: sympy.Symbol(f"s{i}") for i, symbol in enumerate(self.symbols)}
        expression = size.node.expr
        if not expression.free_symbols <= order.keys():
            raise _Incomparable(f"{expression} has symbols that are no size")
        return str(expression.xreplace(order))


def _sizes_in(fake: Any) -> Iterator[SymInt]:
    if isinstance(fake, Tensor):
        sizes: tuple[int | SymInt, ...] = tuple(fake.shape)
        yield from (size for size in sizes if isinstance(size, SymInt))
        for inner in _inner_tensors(fake).values():
            yield from _sizes_in(inner)
    elif isinstance(fake, SymInt):
        yield fake


def _inner_tensors(tensor: Tensor) -> dict[str, Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        return {}
    names, _ = tensor.__tensor_flatten__()
    return {name: getattr(tensor, name) for name in names}


def _input(value: Any, fake: Any, sizes: _Sizes, storages: dict[int, int]) -> Hashable:
    if isinstance(fake, int | SymInt):
        return type(fake), sizes.name(fake)
    if not isinstance(fake, Tensor):
        return _constant(fake)
    common = (
        isinstance(value, torch.nn.Parameter),
        getattr(value, "_dynamo_static_input_type", None),
        fake.dtype,
        fake.device,
        fake.layout,
        value.requires_grad,
        value.is_inference(),
        tuple(map(sizes.name, fake.shape)),
    )
    if is_traceable_wrapper_subclass(fake):
        _, context = fake.__tensor_flatten__()
        real = _inner_tensors(value)
        inner = tuple(
            (name, _input(real[name], stored, sizes, storages))
            for name, stored in _inner_tensors(fake).items()
        )
        return type(fake), common, _argument(context, {}), inner
    if fake.layout != torch.strided:
        raise _Incomparable(f"layout {fake.layout}")
    storage = storages.setdefault(storage_identity(value), len(storages))
    view = (*map(sizes.name, fake.stride()), sizes.name(fake.storage_offset()))
    return common, view, storage, fake.is_conj(), fake.is_neg()


def _nodes(graph: fx.Graph) -> Iterator[Hashable]:
    positions: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            raise _Incomparable(f"{node.op} {node.target}")
        target = None if node.op == "placeholder" else node.target
        yield node.op, target, _argument(node.args, positions), _argument(node.kwargs, positions)
        positions[node] = len(positions)


def _argument(argument: Any, positions: dict[fx.Node, int]) -> Hashable:
    if isinstance(argument, fx.Node):
        return fx.Node, positions[argument]
    if isinstance(argument, tuple | list):
        return type(argument), tuple(_argument(item, positions) for item in argument)
    if isinstance(argument, dict):
        return dict, tuple((key, _argument(item, positions)) for key, item in argument.items())
    if isinstance(argument, slice):
        parts = (argument.start, argument.stop, argument.step)
        return slice, tuple(_argument(part, positions) for part in parts)
    return _constant(argument)


def _constant(value: Any) -> Hashable:
    # 1, 1.0 and True are equal, and so are 0.0 and -0.0.
    return type(value), repr(value) if isinstance(value, float) else value
