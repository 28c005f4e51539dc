"""Compilation of a model's repeated blocks, one by one, in place of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .config import SparkConfig
from .copies import clear_calls, set_call
from .kernels.eviction import parse_scorer
from .offload import moving_around
from .report import OptionError
from .torch_private import call_of


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The elements of the outermost lists of modules in a model, by their paths.

    Elements without modules of their own, as the heads or embeddings of several codebooks, are no
    blocks. The classes of a list's elements may differ: hybrid decoders mix theirs.
    """
    blocks: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        inside = find_blocks(child)
        if isinstance(child, nn.ModuleList):
            own = {key: block for key, block in child.named_children() if [*block.children()]}
            inside = own or inside
        blocks.update((f"{name}.{path}", block) for path, block in inside.items())
    return blocks


@dataclass(frozen=True)
class ByBlocks:
    """Compiles each block of a model in place, if the options are those of all layers."""

    options: Mapping[str, Any]
    """Of the backend; fields of :class:`SparkConfig`."""
    complain: Callable[[str], None]
    """As :func:`compile_blocks`' one."""
    source: str | None = None
    """Of the options, where that is not the caller."""

    def __call__(self, model: nn.Module) -> None:
        """
        Raises:
            OptionError: the options say something else of each layer.
            ValueError: there are no blocks.
        """
        # Equal layers share one compiled graph, and a layer does not know where it is.
        config = SparkConfig.from_options(self.options)
        how = "by layers (regional=True, a device map or an offloaded cache)"
        allowed = f"allowed in a model that is compiled {how} is"
        for name in ("key_format", "value_format", "evict"):
            if isinstance(getattr(config, name), tuple):
                source = self.source or f"option {name!r}"
                raise OptionError(f"{source} has texts by layer: {allowed} one text")
        if isinstance(config.evict, str) and parse_scorer(config.evict).BY_LAYER:
            raise OptionError(
                f"option 'evict' is {config.evict!r}: {allowed} a scorer that does the same in "
                "every layer"
            )
        compile_blocks(model, self.options, self.complain)


def compile_blocks(
    model: nn.Module,
    options: Mapping[str, Any],
    complain: Callable[[str], None],
    backend: str = "spark",
) -> None:
    """Compile each block of a model in place.

    Args:
        model: a decoder that calls its blocks, elements of an ``nn.ModuleList``.
        options: of the backend; fields of :class:`SparkConfig`.
        complain: is told if the model's first call calls none of the blocks.
        backend: as ``torch.compile``'s.

    Raises:
        ValueError: there are no blocks.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no repeated blocks (an nn.ModuleList of modules that "
            "consist of modules): compile it as a whole, without regional=True"
        )
    clear(model)
    idle = set(blocks)
    for path, block in blocks.items():
        _Block(backend, options, path, idle)(block)
    model.register_forward_hook(_FirstCall(len(blocks), next(iter(blocks)), idle, complain))


def clear(model: nn.Module) -> None:
    """Undo what has been compiled in a model, which is to be compiled anew."""
    clear_calls(model)
    _remove(model, lambda hook: isinstance(hook, _FirstCall))


def _remove(model: nn.Module, chosen: Callable[[object], bool]) -> None:
    for key in [key for key, hook in model._forward_hooks.items() if chosen(hook)]:
        del model._forward_hooks[key]


@dataclass(frozen=True)
class _Block:
    """Compiles a block's call."""

    backend: str
    options: Mapping[str, Any]
    path: str
    idle: set[str]
    """Paths of the blocks that no call has come to; of copies in one go, one set."""

    def __call__(self, block: nn.Module) -> None:
        own_call: Any = call_of(block)

        def region(*args: Any, **kwargs: Any) -> Any:
            return own_call(*args, **kwargs)

        # Dynamo keeps graphs with the code object, and those of all modules of a class, or of all
        # of transformers' layers, would count against one limit and be searched through at each
        # call.
        region.__code__ = region.__code__.replace(co_name=self.path.replace(".", "_"))
        compiled = torch.compile(region, backend=self.backend, options=dict(self.options) or None)

        def first_call(*args: Any, **kwargs: Any) -> Any:
            self.idle.discard(self.path)
            call = moving_around(block, compiled)
            set_call(block, call, self)
            return call(*args, **kwargs)

        set_call(block, first_call, self)


@dataclass(frozen=True)
class _FirstCall:
    """The hook that looks, after a model's first call, whether that came to any block.

    Not a closure: it is copied and pickled with the model.
    """

    count: int
    first: str
    idle: set[str]
    complain: Callable[[str], None]

    def __call__(self, model: nn.Module, *_: object) -> None:
        _remove(model, lambda hook: hook is self)
        if len(self.idle) == self.count:
            self.complain(
                f"nothing is compiled: the model called none of its {self.count} blocks "
                f"({self.first}, ...), only parts of them; leave out regional=True"
            )
