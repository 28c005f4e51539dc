"""Weights and caches that move between devices, moved around a layer's graph in place of in it.

accelerate's device maps put a hook on whatever has weights elsewhere: on every linear layer of a
block that is on disk. transformers' offloaded caches wait for streams and move layers in their
``update``. Each of these ends Dynamo's graph in the middle of the layer. Around the layer's call
they do the same, in the same order, and what moves of a cache is what is stored of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[..., Any]
Hook = tuple[nn.Module, Any]
"""A module and accelerate's hook on it."""


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether accelerate has a hook on one of the modules, or in it."""
    return any(_hooks_in(module) for module in modules)


def offloaded_cache(values: Iterable[object]) -> Any:
    """The cache of transformers among the arguments of a call, if it moves its layers."""
    others = (value for value in values if not isinstance(value, Tensor))
    return next((v for v in others if getattr(v, "offloading", False) is True), None)


def moving_around(block: nn.Module, call: Call) -> Call:
    """The call of a block with what moves weights and caches around it.

    From now on accelerate's hooks in the block do nothing by themselves. Those of several devices
    in one block, and hooks that do something else, stay where they are.

    Args:
        block: a layer of a decoder; its attentions have transformers' ``layer_idx``.
        call: the block's, compiled.
    """
    numbers = [getattr(module, "layer_idx", None) for module in block.modules()]
    layers = sorted({number for number in numbers if isinstance(number, int)})
    if layers:
        call = _around_offloading(layers, call)
    if _can_be_around(_hooks_in(block)):
        for module, _hook in _hooks_in(block):
            module.forward = module._old_forward  # type: ignore[assignment]
        call = _around_hooks(block, call)  # outermost: it brings the arguments to the device
    return call


def _hooks_in(module: nn.Module) -> list[Hook]:
    return [(m, vars(m)["_hf_hook"]) for m in module.modules() if "_hf_hook" in vars(m)]


def _can_be_around(hooks: Sequence[Hook]) -> bool:
    """Whether hooks do nothing but to bring weights and arguments to one device."""
    accelerate = sys.modules.get("accelerate.hooks")
    if not hooks or accelerate is None:
        return False
    single: list[Any] = []
    for _, hook in hooks:
        single += hook.hooks if type(hook) is accelerate.SequentialHook else [hook]
    if any(type(hook) is not accelerate.AlignDevicesHook for hook in single):
        return False
    return len({str(hook.execution_device) for hook in single}) == 1


def _around_hooks(block: nn.Module, call: Call) -> Call:
    def with_weights(*args: Any, **kwargs: Any) -> Any:
        hooks = _hooks_in(block)  # as they are now: they may be taken away or be others
        if not hooks:
            return call(*args, **kwargs)
        (outer, first), *inner = hooks
        args, kwargs = first.pre_forward(outer, *args, **kwargs)
        for module, hook in inner:
            hook.pre_forward(module)
        output = call(*args, **kwargs)
        for module, hook in reversed(inner):
            hook.post_forward(module, None)
        return first.post_forward(outer, output)

    return with_weights


def _around_offloading(layers: Sequence[int], call: Call) -> Call:
    def with_cache(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        cache = offloaded_cache(values)
        if cache is None:
            return call(*args, **kwargs)
        _fetch(cache, layers, next(value.device for value in values if isinstance(value, Tensor)))
        cache.offloading = False
        try:
            output = call(*args, **kwargs)
        finally:
            cache.offloading = True
        for layer in _with_keys(cache, layers):
            cache.offload(layer, cache.only_non_sliding)
        return output

    return with_cache


def _with_keys(cache: Any, layers: Sequence[int]) -> list[int]:
    """Those of the layers that the model has made, and whose keys and values are cached."""
    made = [layer for layer in layers if layer < len(cache.layers)]
    return [layer for layer in made if hasattr(cache.layers[layer], "keys")]


def _fetch(cache: Any, layers: Sequence[int], device: torch.device) -> None:
    """Have a cache's layers on their device, and the next one on its way: see ``Cache.update``."""
    if device.type != "cpu":
        # What comes has come; and what is on the way to the CPU is there before it is read.
        stream = torch.accelerator.current_stream(device)
        stream.wait_stream(cache.prefetch_stream)
        cache.prefetch_stream.wait_stream(stream)
    present = _with_keys(cache, layers)
    for layer in present:
        cache.layers[layer].prefetch()
    if present:
        cache.prefetch(present[-1] + 1, cache.only_non_sliding)
