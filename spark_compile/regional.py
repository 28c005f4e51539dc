"""Compilation of a model's repeated blocks, one by one, in place of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


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
    idle = set(blocks)
    for path, block in blocks.items():
        _compile_block(block, backend, options, path, idle)

    def check(*_: object) -> None:
        handle.remove()
        if len(idle) == len(blocks):
            complain(
                f"nothing is compiled: the model called none of its {len(blocks)} blocks "
                f"({next(iter(blocks))}, ...), only parts of them; leave out regional=True"
            )

    handle: RemovableHandle = model.register_forward_hook(check)


def _compile_block(
    block: nn.Module, backend: str, options: Mapping[str, Any], path: str, idle: set[str]
) -> None:
    call: Any = block._call_impl

    def region(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    # Dynamo keeps graphs with the code object, and those of all modules of a class, or of all of
    # transformers' layers, would count against one limit and be searched through at each call.
    region.__code__ = region.__code__.replace(co_name=path.replace(".", "_"))
    compiled = torch.compile(region, backend=backend, options=dict(options) or None)

    def first_call(*args: Any, **kwargs: Any) -> Any:
        idle.discard(path)
        block._compiled_call_impl = compiled
        return compiled(*args, **kwargs)

    block._compiled_call_impl = first_call
