"""A weight that is stored as int8 and is a tensor subclass, as the libraries for that make them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

aten = torch.ops.aten


class Int8Weight(Tensor):
    """[out, in] as int8 with one scale per row; operators get ``dense()``."""

    def __new__(cls, levels: Tensor, scale: Tensor, context: dict[str, Any]) -> Int8Weight:
        return Tensor._make_wrapper_subclass(
            cls, levels.shape, dtype=context["dtype"], device=levels.device
        )

    def __init__(self, levels: Tensor, scale: Tensor, context: dict[str, Any]) -> None:
        self.levels, self.scale, self.context = levels, scale, context

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return ["levels", "scale"], self.context

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: dict[str, Any], size: Any, stride: Any
    ) -> Int8Weight:
        return cls(inner["levels"], inner["scale"], context)

    def dense(self) -> Tensor:
        """The weight; ``context["factor"]`` is part of it that no inner tensor has."""
        return (self.levels * (self.scale * self.context["factor"])).to(self.dtype)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (aten.detach.default, aten.alias.default):
            return cls(args[0].levels, args[0].scale, args[0].context)
        plain = [arg.dense() if isinstance(arg, Int8Weight) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


def quantized(model: Any, kind: Any = Int8Weight, factors: tuple[float, ...] = (1.0,)) -> Any:
    """The model with every linear weight replaced, in place.

    Args:
        kind: makes the weight of levels, scale and context.
        factors: taken in turns by the blocks of the model.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
            levels = (module.weight.detach() / scale).round().to(torch.int8)
            number = int("".join(filter(str.isdigit, path)) or 0)
            factor = factors[number % len(factors)]
            context = {"dtype": module.weight.dtype, "factor": factor}
            module.weight = nn.Parameter(kind(levels, scale, context), requires_grad=False)
    return model
