"""Tensor subclasses, such as quantized or sharded weights, as plain tensors.

A graph gets what a subclass flattens to, as inputs, or as attributes where weights stay in the
module. Pre-dispatch tracing asks no subclass what an operator does with it; so operators on them
are traced on their own, where the subclass is asked, and inserted as plain ATen. Those that hand
subclasses to one another are traced at once, because a subclass may keep what its flat form does
not show (DTensor: which rows of a sharded embedding are another device's). Compressed states, which
are subclasses too, are not meant here.

A mesh of devices, which code around sharded weights (DTensor) reads, is an input of a graph too.
It flattens to nothing: what is traced with it has the names of its groups as constants, and what
those depend on Dynamo guards on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, fx
from torch.distributed.device_mesh import DeviceMesh

from ..state import SparkTensor
from ..torch_private import (
    FakeScriptObject,
    FakeTensor,
    enter_autocast,
    exit_autocast,
    is_traceable_wrapper_subclass,
    make_fx,
    tree_leaves,
    tree_map,
)
from .vmap import insert


def is_wrapper(value: object) -> bool:
    """Whether a value is a subclass that can be flattened, and no compressed state."""
    return is_traceable_wrapper_subclass(value) and not isinstance(value, SparkTensor)


def wrappers(values: Sequence[Any]) -> tuple[int, ...]:
    """Where such subclasses, and meshes, are among the inputs of a graph."""
    return tuple(i for i, v in enumerate(values) if is_wrapper(v) or isinstance(v, DeviceMesh))


def flattened(values: Sequence[Any], positions: Iterable[int]) -> list[Any]:
    """The values, with the plain tensors inside in place of each subclass at ``positions``."""
    flat: list[Any] = []
    start = 0
    for position in positions:
        flat.extend(values[start:position])
        flat.extend(_plain(values[position]))
        start = position + 1
    return [*flat, *values[start:]]


def _plain(value: Any) -> Iterator[Tensor]:
    """The plain tensors in a subclass, or the tensor itself; subclasses may be nested."""
    if is_wrapper(value):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain(getattr(value, name))
    elif not isinstance(value, DeviceMesh):
        yield value


def _example(node: fx.Node) -> Any:
    """The value that Dynamo noted of a node, with the meshes themselves."""
    return tree_map(_real, node.meta["example_value"])


def _real(value: Any) -> Any:
    return value.real_obj if isinstance(value, FakeScriptObject) else value


@dataclass(frozen=True)
class _Flat:
    """A value of the graph with subclasses in it, and the nodes of the plain tensors in those."""

    like: Any
    parts: tuple[Any, ...]

    def rebuilt(self, parts: Iterator[Any]) -> Any:
        return tree_map(lambda leaf: _rebuilt(leaf, parts), self.like)


def without_subclasses(module: fx.GraphModule, positions: Sequence[int]) -> fx.GraphModule:
    """The module itself, or a copy that takes its inputs at ``positions`` flattened.

    An attribute of the module that is a subclass (a weight, where Inductor is told to freeze them)
    becomes one for each plain tensor inside.

    Args:
        module: Dynamo's graph.
        positions: of the inputs that are subclasses.

    Raises:
        NotImplementedError: the graph returns a subclass.
    """
    if not positions and not _wrapped_attributes(module):
        return module
    module = fx.GraphModule(module, copy.deepcopy(module.graph))
    placeholders = module.graph.find_nodes(op="placeholder")
    flat: dict[fx.Node, _Flat] = {}
    for position in positions:
        whole = placeholders[position]
        value = _example(whole)
        with module.graph.inserting_before(whole):
            parts = tuple(
                _placeholder(module.graph, f"{whole.name}_part{number}", part)
                for number, part in enumerate(_plain(value))
            )
        flat[whole] = _Flat(value, parts)
    for whole in _wrapped_attributes(module):
        flat[whole] = _Flat(_example(whole), _attributes(module, whole))
    done = [*flat]
    region: dict[fx.Node, bool] = {}  # whether a node makes what only nodes of a region can read
    autocasts: dict[fx.Node, Any] = {}
    try:
        for node in list(module.graph.nodes):
            operands = node.all_input_nodes
            if node.op != "output" and any(o in flat or region.get(o, False) for o in operands):
                value = node.meta["example_value"]
                region[node] = not isinstance(value, Tensor) or is_wrapper(value)
                continue
            borders = node.op == "output" or node.target in (enter_autocast, exit_autocast)
            if region and (borders or not region.keys().isdisjoint(operands)):
                _trace(module, list(region), node, flat)
                done += region
                region.clear()
            if node.op == "output" and not flat.keys().isdisjoint(operands):
                raise NotImplementedError("the graph returns a tensor subclass")
            if node.target is enter_autocast:
                autocasts[node] = enter_autocast(*node.args)
            elif node.target is exit_autocast:
                exit_autocast(autocasts.pop(node.args[0]))
    finally:
        for entered in reversed(autocasts.values()):
            exit_autocast(entered)
    for node in reversed(done):
        module.graph.erase_node(node)
    return fx.GraphModule(module, module.graph)  # without what the graph no longer reads


def _wrapped_attributes(module: fx.GraphModule) -> list[fx.Node]:
    read = module.graph.find_nodes(op="get_attr")
    return [node for node in read if is_wrapper(_attribute(module, node))]


def _attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    return attrgetter(str(node.target))(module)


def _attributes(module: fx.GraphModule, whole: fx.Node) -> tuple[fx.Node, ...]:
    """Nodes of attributes that are the plain tensors in the one that a node reads."""
    parts = []
    name = f"_spark_{str(whole.target).replace('.', '_')}_part"
    examples = _plain(_example(whole))
    for number, part in enumerate(_plain(_attribute(module, whole))):
        module.register_buffer(f"{name}{number}", part)
        with module.graph.inserting_before(whole):
            parts.append(module.graph.get_attr(f"{name}{number}"))
        parts[-1].meta["example_value"] = next(examples)
    return tuple(parts)


def _placeholder(graph: fx.Graph, name: str, part: Tensor) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["example_value"] = part
    return node


def _trace(
    module: fx.GraphModule, region: list[fx.Node], at: fx.Node, flat: dict[fx.Node, _Flat]
) -> None:
    """Hand the uses of a region to what it computes with the tensors in subclasses.

    Args:
        region: operators on subclasses.
        at: the node before which what is traced is inserted.
        flat: what is flattened so far; what the region makes is added.

    Raises:
        NotImplementedError: the region reads a tensor that no node of the graph makes.
    """
    inside = set(region)
    operands = list(dict.fromkeys(o for n in region for o in n.all_input_nodes if o not in inside))
    inputs = [part for o in operands for part in (flat[o].parts if o in flat else (o,))]
    outputs = [node for node in region if not inside.issuperset(node.users)]

    def compute(*plain: Any) -> list[Any]:
        left = iter(plain)
        values = {o: flat[o].rebuilt(left) if o in flat else next(left) for o in operands}
        for node in region:
            values[node] = _call(node, values)
        return [part for node in outputs for part in _parts(values[node])]

    examples = [part.meta["example_value"] for part in inputs]
    # In their mode what a subclass makes is fake, too: the constant of `x[mask] = 0`.
    with next((e.fake_mode for e in examples if isinstance(e, FakeTensor)), nullcontext()):
        traced = make_fx(compute, _allow_non_fake_inputs=True)(*examples)
    for constant in traced.graph.find_nodes(op="get_attr"):
        if isinstance(getattr(traced, str(constant.target)), FakeTensor):
            names = ", ".join(node.name for node in region)
            raise NotImplementedError(f"a subclass keeps a tensor that it does not show ({names})")
    results = iter(insert(module, traced, inputs, at, f"_subclass_{region[0].name}"))
    for node in outputs:
        value = _example(node)
        made = []
        for part in _parts(value):
            made.append(next(results))
            if isinstance(made[-1], fx.Node):
                made[-1].meta["example_value"] = part
        if isinstance(value, Tensor) and not is_wrapper(value):
            node.replace_all_uses_with(made[0])
        else:
            flat[node] = _Flat(value, tuple(made))


def _parts(value: Any) -> Iterator[Any]:
    """The plain tensors in whatever an operator returns."""
    return (part for leaf in tree_leaves(value) for part in _plain(leaf))


def _call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    raise NotImplementedError(f"{node.op} of {node.target} on a tensor subclass")


def _rebuilt(like: Any, parts: Iterator[Any]) -> Any:
    if isinstance(like, DeviceMesh):
        return like
    if not is_wrapper(like):
        return next(parts)
    names, context = like.__tensor_flatten__()
    inner = {name: _rebuilt(getattr(like, name), parts) for name in names}
    return type(like).__tensor_unflatten__(inner, context, like.size(), like.stride())
