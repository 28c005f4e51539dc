"""The compressed key/value state: tensors of the logical shape that store less.

:class:`PrunedKeys` and :class:`StoredValues` have the shape [B, Hkv, S, D] that the model expects
in its own cache object, and are traceable wrapper subclasses, so Dynamo passes them through a
compiled graph. Operators that only move tokens or batch entries keep them compressed; any other
one gets the recovered dense tensor (never wrong, at worst slow: a warning says so once).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
import torch._dynamo
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils._pytree import tree_map_only

from . import ops
from .config import SparkConfig
from .report import SparkWarning
from .sharing import Rows, grown

_warned: set[str] = set()


class SparkTensor(torch.Tensor):
    """A cached tensor [B, Hkv, S, D] whose storage is the tensors named by ``INNER``."""

    INNER: ClassVar[tuple[str, ...]]
    config: SparkConfig
    _borrowed: bool = False  # made by tracing machinery from tensors that others may share

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], config: SparkConfig, inner: Mapping[str, Tensor]
    ) -> SparkTensor:
        like = inner[cls.INNER[-1]]
        return cast(
            SparkTensor,
            torch.Tensor._make_wrapper_subclass(
                cls, tuple(shape), dtype=like.dtype, device=like.device, requires_grad=False
            ),
        )

    def __init__(
        self, shape: tuple[int, ...], config: SparkConfig, inner: Mapping[str, Tensor]
    ) -> None:
        self.config = config
        for name in self.INNER:
            setattr(self, name, inner[name])
        if not is_fake(inner[self.INNER[-1]]):
            self._mark_growing()

    def _mark_growing(self) -> None:
        """Tell Dynamo that lengths and capacities change, so that no graph burns them in."""
        torch._dynamo.maybe_mark_dynamic(self, 2)
        for tensor in self.inner().values():
            if tensor.dim() >= 4 and tensor.shape[2] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 2)

    def inner(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {name: getattr(self, name) for name in self.INNER}

    def stored_bytes(self) -> int:
        """Every byte of the storage: rows in use, slack, masks, scales, norms."""
        return sum(t.numel() * t.element_size() for t in self.inner().values())

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
        return list(self.INNER), self.config

    @classmethod
    def __tensor_unflatten__(
        cls,
        inner: dict[str, Tensor],
        config: SparkConfig,
        outer_size: tuple[int, ...],
        outer_stride: object,
    ) -> SparkTensor:
        state = cls(outer_size, config, inner)
        state._borrowed = True
        return state

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(
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

    def __repr__(self, *, tensor_contents: object = None) -> str:
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
        return _rebuild, (type(self).__name__, tuple(self.shape), config, own.inner())


class PrunedKeys(SparkTensor):
    """Keys stored as sinks | packed tokens | recent tokens; see ``kernels/layout``.

    ``norms`` [B, Hkv, D] float32 are the query norms the recovery divides by, fixed when the first
    token is packed; ``stats`` [B, Hkv, D] float32 sums the squared queries since the last packing.
    """

    INNER = ("kept", "bits", "scale", "norms", "packed_length", "stats", "tail")
    kept: Tensor
    bits: Tensor
    scale: Tensor
    norms: Tensor
    packed_length: Tensor
    stats: Tensor
    tail: Tensor
    _packed_rows: Rows | None = None
    _tail_rows: Rows | None = None

    def packed_tokens(self) -> int:
        """Number of packed tokens."""
        return int(self.packed_length)

    def _shares(self) -> tuple[Rows, Rows]:
        """The shares of packed rows and of tail rows, made when first asked for."""
        if self._packed_rows is None or self._tail_rows is None:
            packed = self.packed_tokens()
            self._packed_rows = Rows(packed, borrowed=self._borrowed)
            self._tail_rows = Rows(self.shape[2] - packed, borrowed=self._borrowed)
        return self._packed_rows, self._tail_rows

    def _handle(
        self, length: int, packed_rows: Rows, tail_rows: Rows, **changed: Tensor
    ) -> PrunedKeys:
        inner = self.inner() | changed
        shape = (inner["tail"].shape[0], self.shape[1], length, self.shape[3])
        handle = PrunedKeys(shape, self.config, inner)
        handle._packed_rows, handle._tail_rows = packed_rows, tail_rows
        return handle

    def dense(self) -> Tensor:
        config = self.config
        return ops.recover(
            self.kept, self.bits, self.scale, self.norms, self.packed_length, self.tail,
            self.shape[2], config.sink_tokens, config.recovery, config.saliency,
        )  # fmt: skip

    def resized(self, length: int) -> PrunedKeys:
        packed_rows, tail_rows = self._shares()
        sinks = self.config.sink_tokens
        packed = min(packed_rows.count, max(length - sinks, 0))
        return self._handle(
            length,
            Rows(packed, shared_with=packed_rows),
            Rows(length - packed, shared_with=tail_rows),
            packed_length=_count(packed),
        )

    def reserve(self, extra: int) -> PrunedKeys:
        packed_rows, tail_rows = self._shares()
        (tail,), rows = tail_rows.reserve((self.tail,), extra, self.config.window)
        packed = Rows(packed_rows.count, shared_with=packed_rows)
        return self._handle(self.shape[2] + extra, packed, rows, tail=tail)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> PrunedKeys:
        packed_rows, tail_rows = self._shares()
        inner = self.inner()
        for name in ("kept", "bits", "scale"):
            inner[name] = inner[name][:, :, : max(packed_rows.count, self.config.window)]
        inner["tail"] = inner["tail"][:, :, : tail_rows.count + self.config.window]
        changed = {name: change(t) for name, t in inner.items() if name != "packed_length"}
        changed["packed_length"] = self.packed_length.clone()
        packed, tail = Rows(packed_rows.count), Rows(tail_rows.count)
        return self._handle(self.shape[2], packed, tail, **changed)

    def appended(self, new: Tensor) -> PrunedKeys:
        handle = self.reserve(new.shape[2])
        ops.append(handle.tail, new, self.shape[2], self.packed_length)
        return handle

    def with_stats(self, stats: Tensor) -> PrunedKeys:
        """This handle with other query statistics, packed as far as the tail has outgrown it."""
        self.stats = stats
        config, (packed_rows, tail_rows) = self.config, self._shares()
        surplus = tail_rows.count - config.sink_tokens - config.recent
        if surplus < config.window or self.shape[2] < config.min_tokens:
            return self
        return self._pack(surplus, packed_rows)

    def _pack(self, surplus: int, packed_rows: Rows) -> PrunedKeys:
        """Move the first ``surplus`` tokens behind the sinks from the tail to the packed rows."""
        config, first, packed = self.config, self.config.sink_tokens, packed_rows.count
        select = self.stats.sqrt()
        norms = self.norms if packed else select
        fresh = ops.prune(
            self.tail[:, :, first : first + surplus], select, norms,
            self.kept.shape[3], config.recovery, config.saliency,
        )  # fmt: skip
        store = (self.kept, self.bits, self.scale)
        store, rows = packed_rows.reserve(store, surplus, config.window)
        for buffer, new in zip(store, fresh, strict=True):
            buffer[:, :, packed : packed + surplus] = new
        dense = self.shape[2] - packed - surplus
        tail = grown(self.tail, first, max(config.dense_room, dense))
        tail[:, :, first:dense] = self.tail[:, :, first + surplus : dense + surplus]
        return self._handle(
            self.shape[2], rows, Rows(dense),
            kept=store[0], bits=store[1], scale=store[2], norms=norms, tail=tail,
            stats=torch.zeros_like(self.stats), packed_length=_count(packed + surplus),
        )  # fmt: skip


class StoredValues(SparkTensor):
    """Values stored dense [B, Hkv, C, Dv] with room to grow."""

    INNER = ("values",)
    values: Tensor
    _rows: Rows | None = None

    def _share(self) -> Rows:
        if self._rows is None:
            self._rows = Rows(self.shape[2], borrowed=self._borrowed)
        return self._rows

    def _handle(self, rows: Rows, values: Tensor) -> StoredValues:
        shape = (values.shape[0], values.shape[1], rows.count, values.shape[3])
        handle = StoredValues(shape, self.config, {"values": values})
        handle._rows = rows
        return handle

    def dense(self) -> Tensor:
        # A copy: the rows behind the view may be written by a later append of another handle.
        return ops.first_rows(self.values, self.shape[2])

    def resized(self, length: int) -> StoredValues:
        return self._handle(Rows(length, shared_with=self._share()), self.values)

    def reserve(self, extra: int) -> StoredValues:
        (values,), rows = self._share().reserve((self.values,), extra, self.config.window)
        return self._handle(rows, values)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> StoredValues:
        room = self.shape[2] + self.config.window
        return self._handle(Rows(self.shape[2]), change(self.values[:, :, :room]))

    def appended(self, new: Tensor) -> StoredValues:
        handle = self.reserve(new.shape[2])
        ops.append(handle.values, new, self.shape[2])
        return handle


def _count(tokens: int) -> Tensor:
    """A number of tokens as the operators take it: on the CPU whatever the default device is."""
    return torch.tensor(tokens, dtype=torch.int64, device="cpu")


def new_keys(inner: Mapping[str, Tensor], length: int, config: SparkConfig) -> PrunedKeys:
    """Keys of ``length`` tokens from the tensors that a prefill graph made."""
    batch, heads, _, head_dim = inner["tail"].shape
    packed = _count(config.packed_length(length))
    return PrunedKeys((batch, heads, length, head_dim), config, {**inner, "packed_length": packed})


def new_values(values: Tensor, length: int, config: SparkConfig) -> StoredValues:
    """Values of ``length`` tokens from the buffer that a prefill graph made."""
    batch, heads, _, head_dim = values.shape
    return StoredValues((batch, heads, length, head_dim), config, {"values": values})


def _rebuild(
    kind: str, shape: tuple[int, ...], config: dict[str, Any], inner: dict[str, Tensor]
) -> SparkTensor:
    """Undo ``SparkTensor.__reduce_ex__``; the one global that unpickling a state needs."""
    kinds: dict[str, type[SparkTensor]] = {
        "PrunedKeys": PrunedKeys,
        "StoredValues": StoredValues,
    }
    return kinds[kind](shape, SparkConfig(**config), inner)


# Operators that keep the state compressed. Each takes the operator's own arguments and may return
# NotImplemented for a form it does not cover, which then goes to the dense fallback.


def _alias(state: SparkTensor) -> SparkTensor:
    return state.resized(state.shape[2])


def _clone(state: SparkTensor, *, memory_format: object = None) -> SparkTensor:
    return state.mapped(Tensor.clone)


def _to_copy(state: SparkTensor, **kwargs: Any) -> SparkTensor:
    if kwargs.get("dtype", state.dtype) != state.dtype:
        return NotImplemented
    device = kwargs.get("device") or state.device
    non_blocking = kwargs.get("non_blocking", False)
    return state.mapped(lambda t: t.to(device, non_blocking=non_blocking, copy=True))


def _index_select(state: SparkTensor, dim: int, index: Tensor) -> SparkTensor:
    if dim not in (0, -4):
        return NotImplemented
    return state.mapped(lambda tensor: tensor.index_select(0, index))


def _index(state: SparkTensor, indices: list[Tensor | None]) -> SparkTensor:
    first = indices[0]
    if first is None or first.dim() != 1 or any(i is not None for i in indices[1:]):
        return NotImplemented
    return state.mapped(lambda tensor: tensor[first])


def _slice(
    state: SparkTensor, dim: int = 0, start: int | None = None, end: int | None = None,
    step: int = 1,
) -> SparkTensor:  # fmt: skip
    first, last, step = slice(start, end, step).indices(state.shape[dim])
    if step == 1 and first == 0 and last == state.shape[dim]:
        return _alias(state)
    if dim % 4 == 2 and step == 1 and first == 0:
        return state.resized(last)
    if dim % 4 == 0:
        return state.mapped(lambda tensor: tensor[first:last:step].clone())
    return NotImplemented


def _cat(tensors: list[Tensor], dim: int = 0) -> SparkTensor:
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
    for name, tensor in zeros.inner().items():
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
    return any(is_fake(s.inner()[s.INNER[-1]]) for s in _states(args))


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


def _register_safe_globals() -> None:
    """Let ``torch.load(weights_only=True)`` read states, alone or inside transformers' caches."""
    torch.serialization.add_safe_globals([_rebuild])
    try:
        from transformers import cache_utils
    except ImportError:
        return
    names = ("DynamicCache", "DynamicLayer", "DynamicSlidingWindowLayer")
    known = [getattr(cache_utils, name) for name in names if hasattr(cache_utils, name)]
    torch.serialization.add_safe_globals(known)


_register_safe_globals()
