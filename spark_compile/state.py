"""A tensor of the logical shape that stores less: what torch asks of it, and what it answers.

A state has the shape [B, Hkv, S, D] that the model expects in its own cache object, and is a
traceable wrapper subclass, so Dynamo passes it through a compiled graph. Operators that only move
tokens or batch entries keep it compressed; any other one gets the recovered dense tensor (never
wrong, at worst slow: a warning says so once).
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from typing import Any, ClassVar

import torch
import torch._dynamo
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils._pytree import tree_map_only

from .config import SparkConfig
from .report import SparkWarning

_warned: set[str] = set()


@functools.cache
def _growing_marks() -> dict[str, Any]:
    """What ``maybe_mark_dynamic`` notes on a tensor; on a state it would go through all inside."""
    marked = torch.empty(0, 0, 0)
    torch._dynamo.maybe_mark_dynamic(marked, 2)
    return dict(marked.__dict__)


class SparkTensor(torch.Tensor):
    """A cached tensor [B, Hkv, S, D] whose storage is tensors named by ``STORED``, not always all.

    The last stored one has the dtype of the state.
    """

    STORED: ClassVar[tuple[str, ...]]
    KINDS: ClassVar[dict[str, type[SparkTensor]]] = {}
    config: SparkConfig
    _borrowed: bool = False  # made by tracing machinery from tensors that others may share

    def __init_subclass__(cls) -> None:
        SparkTensor.KINDS[cls.__name__] = cls

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], config: SparkConfig, stored: Mapping[str, Tensor]
    ) -> SparkTensor:
        like = stored[[name for name in cls.STORED if name in stored][-1]]
        return torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=like.dtype, device=like.device, requires_grad=False
        )

    def __init__(
        self, shape: tuple[int, ...], config: SparkConfig, stored: Mapping[str, Tensor]
    ) -> None:
        self.config = config
        for name, tensor in stored.items():
            setattr(self, name, tensor)
        if not is_fake(next(iter(stored.values()))):
            self._mark_growing(stored.values())

    def _mark_growing(self, stored: Iterable[Tensor]) -> None:
        """Tell Dynamo that lengths and capacities change, so that no graph burns them in."""
        marks = _growing_marks()
        # A step makes two handles per layer, most of them on buffers that are marked already.
        self.__dict__.update((name, copy(mark)) for name, mark in marks.items())
        for tensor in stored:
            if marks.keys() <= tensor.__dict__.keys() or tensor.dim() < 4:
                continue
            if tensor.shape[2] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 2)

    def stored(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {name: t for name in self.STORED if (t := getattr(self, name)) is not None}

    def stored_bytes(self) -> int:
        """Every byte of the storage: rows in use, slack, masks, scales, norms."""
        return sum(t.numel() * t.element_size() for t in self.stored().values())

    # What each of the two kinds defines

    def dense(self) -> Tensor:
        """The recovered dense tensor [B, Hkv, S, D]."""
        raise NotImplementedError

    def resized(self, length: int) -> SparkTensor:
        """A handle on the first ``length`` tokens, sharing the storage."""
        raise NotImplementedError

    def reserve(self, extra: int) -> SparkTensor:
        """A handle with ``extra`` more tokens, whose rows a graph will write."""
        raise NotImplementedError

    def mapped(self, change: Callable[[Tensor], Tensor]) -> SparkTensor:
        """A handle on storage of its own, with ``change`` done to each stored tensor [B, ...]."""
        raise NotImplementedError

    def appended(self, new: Tensor) -> SparkTensor:
        """A handle with the dense tokens ``new`` [B, Hkv, L, D] behind these."""
        raise NotImplementedError

    # Protocols of torch

    def __tensor_flatten__(self) -> tuple[list[str], SparkConfig]:
        return list(self.stored()), self.config

    @classmethod
    def __tensor_unflatten__(
        cls,
        stored: dict[str, Tensor],
        config: SparkConfig,
        outer_size: tuple[int, ...],
        outer_stride: object,
    ) -> SparkTensor:
        state = cls(outer_size, config, stored)
        state._borrowed = True
        return state

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and not _is_traced(args):
            # A view of a tensor from outside inference mode must be one itself.
            with torch.inference_mode(all(state.is_inference() for state in _states(args))):
                return cls._dispatched(func, args, kwargs)
        return cls._dispatched(func, args, kwargs)

    @classmethod
    def _dispatched(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        compressed = _COMPRESSED.get(func)
        if compressed is not None and not _is_traced(args):
            result = compressed(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return _on_dense(func, args, kwargs)

    def __getitem__(self, index: Any) -> Tensor:
        result = super().__getitem__(index)
        # As a view it would keep this handle alive, and no append to it could be done in place.
        return result.detach() if isinstance(result, SparkTensor) else result

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError("a compressed cache tensor cannot be written to; call .dense() for a copy")

    def repeat_interleave(self, repeats: Any, dim: int | None = None, **kwargs: Any) -> Tensor:
        # torch makes views, copies and reshapes of it before any of them could be known here.
        if dim is None or dim % 4 != 0 or not isinstance(repeats, int):
            return super().repeat_interleave(repeats, dim, **kwargs)
        return self.index_select(
            0, torch.arange(len(self), device=self.device).repeat_interleave(repeats)
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device={self.device}, stored_bytes={self.stored_bytes()})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> SparkTensor:
        copy = self.mapped(Tensor.clone)
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        own = self.mapped(Tensor.clone)  # a handle may be a short view of a long shared storage
        config = dataclasses.asdict(self.config)
        return rebuild, (type(self).__name__, tuple(self.shape), config, own.stored())


def rebuild(
    kind: str, shape: tuple[int, ...], config: dict[str, Any], stored: dict[str, Tensor]
) -> SparkTensor:
    """Undo ``SparkTensor.__reduce_ex__``; the one global that unpickling a state needs."""
    return SparkTensor.KINDS[kind](shape, SparkConfig(**config), stored)


# Operators that keep the state compressed. Each takes the operator's own arguments and may return
# NotImplemented for a form it does not cover, which then goes to the dense fallback.


def _alias(state: SparkTensor) -> SparkTensor:
    return state.resized(state.shape[2])


def _clone(state: SparkTensor, *, memory_format: object = None) -> SparkTensor:
    return state.mapped(Tensor.clone)


def _to_copy(state: SparkTensor, **kwargs: Any) -> Any:
    if kwargs.get("dtype", state.dtype) != state.dtype:
        return NotImplemented
    device = kwargs.get("device") or state.device
    non_blocking = kwargs.get("non_blocking", False)
    return state.mapped(lambda t: t.to(device, non_blocking=non_blocking, copy=True))


def _index_select(state: SparkTensor, dim: int, index: Tensor) -> Any:
    if dim not in (0, -4):
        return NotImplemented
    return state.mapped(lambda tensor: tensor.index_select(0, index))


def _index(state: SparkTensor, indices: list[Tensor | None]) -> Any:
    first = indices[0]
    if first is None or first.dim() != 1 or any(i is not None for i in indices[1:]):
        return NotImplemented
    return state.mapped(lambda tensor: tensor[first])


def _slice(
    state: SparkTensor, dim: int = 0, start: int | None = None, end: int | None = None,
    step: int = 1,
) -> Any:  # fmt: skip
    first, last, step = slice(start, end, step).indices(state.shape[dim])
    if step == 1 and first == 0 and last == state.shape[dim]:
        return _alias(state)
    if dim % 4 == 2 and step == 1 and first == 0:
        return state.resized(last)
    if dim % 4 == 0:
        return state.mapped(lambda tensor: tensor[first:last:step].clone())
    return NotImplemented


def _cat(tensors: list[Tensor], dim: int = 0) -> Any:
    state, *rest = tensors
    if dim not in (2, -2) or not isinstance(state, SparkTensor):
        return NotImplemented
    rows = (*state.shape[:2], state.shape[3])
    if any(t.dim() != 4 or (*t.shape[:2], t.shape[3]) != rows for t in rest):
        return NotImplemented  # torch.cat says what is wrong
    if any(isinstance(t, SparkTensor) or t.dtype != state.dtype for t in rest):
        return NotImplemented
    for new in rest:
        state = state.appended(new)
    return state


def _zero_(state: SparkTensor) -> SparkTensor:
    zeros = state.mapped(torch.zeros_like)
    for name, tensor in zeros.stored().items():
        setattr(state, name, tensor)
    state.__dict__.update(
        {name: share for name, share in zeros.__dict__.items() if name.endswith("_rows")}
    )
    return state


_aten = torch.ops.aten
_COMPRESSED: dict[Any, Callable[..., Any]] = {
    _aten.alias.default: _alias,
    _aten.detach.default: _alias,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.index_select.default: _index_select,
    _aten.index.Tensor: _index,
    _aten.slice.Tensor: _slice,
    _aten.cat.default: _cat,
    _aten.zero_.default: _zero_,
}


def _is_traced(args: tuple[Any, ...]) -> bool:
    """Whether a state among the arguments is being traced, not computed."""
    return any(is_fake(next(iter(s.stored().values()))) for s in _states(args))


def _states(tree: object) -> Iterator[SparkTensor]:
    for leaf in torch.utils._pytree.tree_leaves(tree):
        if isinstance(leaf, SparkTensor):
            yield leaf


def _on_dense(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on the recovered dense tensors."""
    given = dict(zip((schema.name for schema in func._schema.arguments), args, strict=False))
    given.update(kwargs)
    for schema in func._schema.arguments:
        if schema.is_write and any(True for _ in _states(given.get(schema.name))):
            raise TypeError(
                f"{func} writes into a compressed cache tensor, which only zero_ may do; "
                "call .dense() for a copy"
            )
    if not _is_traced(args) and str(func) not in _warned:
        _warned.add(str(func))
        message = f"{func} does not work on a compressed cache: it gets the recovered dense tensor"
        warnings.warn(message, SparkWarning, stacklevel=3)
    args, kwargs = tree_map_only(SparkTensor, lambda state: state.dense(), (args, kwargs))
    return func(*args, **kwargs)
