"""What a person wants to see of one layer's attention in a graph: few boxes, and who reads whom.

Views become part of the arrows. Elementwise operators of one module that lead to a single value are
one box, and so are the stored tensors of a state. Weights are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, fx

from ..kernels.spec import SIDES, parse_spec
from ..storage import STORED
from .nodes import (
    PRODUCTS,
    VIEWS,
    argument_name,
    is_position,
    is_spark,
    module_of,
    nodes_of,
    operator,
    origin_of,
    readers_of,
    short_name,
    wanted_nodes,
    writes_into,
)

Kind = Literal["input", "product", "attention", "cache", "spark", "other"]
Sources = Mapping[fx.Node, tuple[str, str]]
"""Of each placeholder: "weight", "state" or "input", and the name."""

_AFTER = "written back"
_ROTARY = {"neg", "cat", "mul", "add"}
_SYMBOL = re.compile(r"\b[su]\d+\b(?=[^\[]*\])")  # in a shape: "u8" behind it is a dtype
_DTYPE = re.compile(r"^(b?)[a-z]+(\d+)$")


@dataclass
class Box:
    """A value, or several that are shown as one."""

    title: str
    kind: Kind
    details: list[str] = field(default_factory=list)
    """Further lines, in small type."""
    nodes: list[str] = field(default_factory=list)
    """Names of the graph's nodes that it stands for."""


@dataclass
class Diagram:
    """Boxes by key, and arrows between them."""

    boxes: dict[str, Box] = field(default_factory=dict)
    arrows: dict[tuple[str, str], bool] = field(default_factory=dict)
    """From one key to another; True if the reader also writes into what it reads."""


def diagram(graph: fx.Graph, layer: str, sources: Sources) -> Diagram:
    """The attention of a layer, empty if no node of the graph was traced in that module.

    Args:
        layer: module path of the attention, as ``Site.layer`` has it.
    """
    return _Builder(graph, layer, sources).build()


class _Builder:
    def __init__(self, graph: fx.Graph, layer: str, sources: Sources) -> None:
        self._graph, self._layer, self._sources = graph, layer, sources
        self._by_name = {node.name: node for node in graph.nodes}
        self._result = Diagram()
        self._root: dict[fx.Node, fx.Node] = {}

    def build(self) -> Diagram:
        wanted = wanted_nodes(self._graph) & nodes_of(self._graph, self._layer)
        visible = {n for n in wanted if not is_position(n) and operator(n) not in VIEWS}
        shown = [node for node in self._graph.nodes if node in visible]
        self._join(shown)
        for node in shown:
            if operator(node) == "copy_":
                self._written(node)
                continue
            key = self._operator(node)
            for operand in node.all_input_nodes:
                source = self._source(operand, node)
                if source is not None and source != key:
                    arrow = (source, key)
                    both = writes_into(node, operand) or self._result.arrows.get(arrow, False)
                    self._result.arrows[arrow] = both
        self._shorten()
        return self._result

    def _join(self, shown: list[fx.Node]) -> None:
        """Let elementwise operators whose only readers are of one box be in that box."""
        for node in reversed(shown):
            self._root[node] = node
            if self._kind(node) != "other":
                continue
            readers = {self._root.get(reader) for reader in readers_of(node)}
            root = readers.pop() if len(readers) == 1 else None
            if root is None or self._kind(root) != "other":
                continue
            if module_of(root) == module_of(node):
                self._root[node] = root

    def _kind(self, node: fx.Node) -> Kind:
        name = operator(node)
        if is_spark(node):
            return "spark"
        if name in PRODUCTS:
            return "product"
        if "softmax" in name or "attention" in name:
            return "attention"
        origins = [origin_of(operand) for operand in node.all_input_nodes]
        is_append = any(self._sources.get(origin, ("", ""))[0] == "state" for origin in origins)
        return "cache" if is_append or name == "copy_" else "other"

    def _operator(self, node: fx.Node) -> str:
        """The key of the box of a node, which is made or gets one node more."""
        root = self._root[node]
        if (box := self._result.boxes.get(root.name)) is None:
            box = self._result.boxes[root.name] = Box(_title(root, self._layer), self._kind(root))
        box.nodes.append(node.name)
        if node is not root:
            return root.name
        operators = dict.fromkeys(short_name(self._by_name[name]) for name in box.nodes)
        if box.title == short_name(root) and len(operators) > 1:
            box.title = "rotary" if set(operators) >= _ROTARY else box.title
        told = " · ".join(operators)
        box.details = [*([] if told == box.title else [told]), *_about(root)]
        return root.name

    def _source(self, operand: fx.Node, reader: fx.Node) -> str | None:
        """The key of the box that a value comes from; None if it is not shown."""
        origin = origin_of(operand)
        if origin.op == "placeholder":
            kind, name = self._sources[origin]
            if kind == "state":
                return self._state(origin, name, "cache")
            if kind == "weight" and self._kind(reader) in ("product", "other"):
                return None
            return self._given(f"input {name}", name.rpartition(".")[2], operand)
        if origin in self._root:
            return self._root[origin].name
        if origin.op != "call_function" or not isinstance(operand.meta.get("val"), Tensor):
            return None
        module = module_of(origin)
        if module and not f"{self._layer}.".startswith(f"{module}."):
            return self._given(f"module {module}", module.rpartition(".")[2], operand)
        is_named = self._kind(reader) in ("attention", "spark")
        name = argument_name(reader, operand) if is_named else short_name(origin)
        return self._given(f"value {origin.name}", name, operand)

    def _given(self, key: str, title: str, value: fx.Node) -> str:
        box = self._result.boxes.setdefault(key, Box(title, "input"))
        if value.name not in box.nodes:
            box.nodes.append(value.name)
            box.details.extend(line for line in [_shape(value)] if line not in box.details)
        return key

    def _state(self, node: fx.Node, name: str, prefix: str) -> str:
        """The box of a cache, which all of its stored tensors share."""
        side, _, part = name.rpartition(".")
        if part not in STORED:
            side, part = name, ""
        key = f"{prefix} {side}"
        box = self._result.boxes.setdefault(key, Box(side.rpartition(".")[2], "cache"))
        if node.name not in box.nodes:
            box.nodes.append(node.name)
            box.details.append(f"{part} {_shape(node)}".strip())
        return key

    def _written(self, copy: fx.Node) -> None:
        """A box for the cache after the call, if the graph replaces what is in it."""
        to, what = copy.args[:2]
        assert isinstance(to, fx.Node)
        assert isinstance(what, fx.Node)
        if to not in self._sources:
            return
        key = self._state(to, self._sources[to][1], "new")
        details = self._result.boxes[key].details
        details[:] = [*(line for line in details if line != _AFTER), _AFTER]
        source = self._source(what, copy)
        if source is not None:
            self._result.arrows[source, key] = False

    def _shorten(self) -> None:
        """The only symbol of a size is S."""
        texts = [text for box in self._result.boxes.values() for text in box.details]
        symbols = {symbol for text in texts for symbol in _SYMBOL.findall(text)}
        if len(symbols) == 1:
            for box in self._result.boxes.values():
                box.details = [_SYMBOL.sub("S", text) for text in box.details]


def _title(node: fx.Node, layer: str) -> str:
    """The name of the module inside the layer, else of the operator."""
    module = module_of(node)
    is_part = module.startswith(f"{layer}.")
    return module.rpartition(".")[2] if is_part else short_name(node)


def _about(node: fx.Node) -> list[str]:
    """The lines below a title: formats of what is stored, and the shape of the value."""
    lines = []
    if is_spark(node) and (text := next((arg for arg in node.args if isinstance(arg, str)), None)):
        spec = parse_spec(text)
        kinds = [spec.format(side).text.partition("(")[0] for side in SIDES]
        lines = [f"{side}s {kind}" for side, kind in zip(SIDES, kinds, strict=True)]
    return [*lines, *([shape] if (shape := _shape(node)) else [])]


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    dtype = str(value.dtype).removeprefix("torch.")
    if match := _DTYPE.match(dtype):
        dtype = f"{match[1]}{dtype[len(match[1])]}{match[2]}"
    return f"[{', '.join(str(size) for size in value.shape)}] {dtype}"
