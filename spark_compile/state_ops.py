"""What ATen operators do with a state: the few that keep it compressed, and the dense fallback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .kernels.layout import LENGTH, counters
from .kernels.reference.store import ALL, Store, allocate, position_of
from .report import SparkError, warn_once
from .state import SparkTensor
from .torch_private import is_fake, tree_leaves, tree_map_only


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on states, compressed where it is known, else on dense tensors."""
    if torch.is_inference_mode_enabled() and not _is_traced(args):
        # A view of a tensor from outside inference mode must be one itself.
        with torch.inference_mode(all(state.is_inference() for state in _states(args))):
            return _dispatched(func, args, kwargs)
    return _dispatched(func, args, kwargs)


def _dispatched(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    compressed, traced = _COMPRESSED.get(func), _is_traced(args)
    if traced and func in _WRITES and isinstance(args[0], SparkTensor):
        # A fake state has nothing to change. What becomes of the write, the passes decide.
        return args[0]
    if compressed is not None and not traced:
        result = compressed(*args, **kwargs)
        if result is not NotImplemented:
            return result
    return _on_dense(func, args, kwargs)


# Operators that keep the state compressed. Each takes the operator's own arguments and may return
# NotImplemented for a form it does not cover, which then goes to the dense fallback.


def _alias(state: SparkTensor) -> SparkTensor:
    return state if state.static else state.resized(state.tokens)


def _clone(state: SparkTensor, *, memory_format: object = None) -> SparkTensor:
    return state.mapped(Tensor.clone)


def _to_copy(state: SparkTensor, **kwargs: Any) -> Any:
    if kwargs.get("dtype", state.dtype) != state.dtype:
        return NotImplemented
    device = torch.device(kwargs.get("device") or state.device)
    non_blocking = kwargs.get("non_blocking", False)

    def move(stored: Tensor) -> Tensor:
        return stored.to(device, non_blocking=non_blocking, copy=True)

    comes_from_cpu = state.device.type == "cpu" != device.type
    return state.moved(move) if comes_from_cpu else state.mapped(move)


def _index_select(state: SparkTensor, dim: int, index: Tensor) -> Any:
    if _dimension(state, dim) != 0:
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
    dim = _dimension(state, dim)
    if dim == state.form.tokens_dim and step == 1 and first == 0 and not state.static:
        return state.resized(last)
    if dim == 0:
        return state.mapped(lambda tensor: tensor[first:last:step].clone())
    return NotImplemented


def _cat(tensors: list[Tensor], dim: int = 0) -> Any:
    # As torch does, past nothing at all, which is what transformers' caches begin with.
    state, *rest = [t for t in tensors if t.shape != (0,) or t.dtype != tensors[-1].dtype]
    if not isinstance(state, SparkTensor) or state.static:
        return NotImplemented
    if (dim := _dimension(state, dim)) != state.form.tokens_dim:
        return NotImplemented
    if any(t.dim() != state.dim() or _without(t, dim) != _without(state, dim) for t in rest):
        return NotImplemented  # torch.cat says what is wrong
    if any(isinstance(t, SparkTensor) or t.dtype != state.dtype for t in rest):
        return NotImplemented
    for new in rest:
        state = state.appended(new)
    return state


def _dimension(state: SparkTensor, dim: int) -> int:
    """A dimension counted from the front.

    Raises:
        IndexError: there is none of that number.
    """
    return range(state.dim())[dim]


def _without(tensor: Tensor, dim: int) -> list[int]:
    """The sizes of all dimensions but one."""
    sizes = list(tensor.shape)
    del sizes[dim]
    return sizes


def _zero_(state: SparkTensor) -> SparkTensor:
    """Zeros of the same length, dense ones; a static state has no tokens then."""
    if state.static:
        state.head.zero_()
        return state
    length = state.form.own(state.tokens)
    rows = max(int(state.spec.tail_rows(length)), length)
    store = allocate(state.head, state.spec, state.SIDE, 1, rows)
    counters(store.head)[..., LENGTH] = length
    state.replace_storage(store.pages, store.head)
    return state


def _index_copy_(state: SparkTensor, dim: int, index: Tensor, source: Tensor) -> Any:
    dim = _dimension(state, dim)
    rows = list(state.shape)
    rows[dim] = index.numel()
    if not state.static or dim != state.form.tokens_dim or list(source.shape) != rows:
        return NotImplemented
    return _write(state, index, source)


def _index_put_(
    state: SparkTensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False
) -> Any:
    dim = state.form.tokens_dim
    given = [number for number, index in enumerate(indices) if index is not None]
    if not state.static or accumulate or given != [dim]:
        return NotImplemented
    position = indices[dim]
    assert position is not None
    rows = list(state.shape)
    rows[dim] = position.numel()
    return _write(state, position, values.expand(rows))


def write_slice(state: SparkTensor, index: Any, rows: Any) -> None:
    """``state[..., start:stop, ...] = rows`` along the sequence of a static state.

    Raises:
        TypeError: another part of the state is to be written.
    """
    given = index if isinstance(index, tuple) else (index,)
    dim, index = state.form.tokens_dim, list(given)
    left = [slice(None)] * (state.dim() - len(index) + index.count(Ellipsis))
    at = index.index(Ellipsis) if Ellipsis in index else len(index)
    index[at : at + 1] = left
    others = [part for number, part in enumerate(index) if number != dim]
    if others.count(slice(None)) < len(others) or not isinstance(index[dim], slice):
        raise TypeError(f"only whole tokens can be written into a compressed cache, not {given}")
    positions = torch.arange(state.tokens, device=state.device)[index[dim]]
    expected = list(state.shape)
    expected[dim] = len(positions)
    _write(state, positions, torch.as_tensor(rows, dtype=state.dtype).expand(expected))


def _write(state: SparkTensor, position: Tensor, rows: Tensor) -> Any:
    """Tokens, in the state's layout, written into a static state at consecutive positions.

    Raises:
        IndexError: they lie beyond its capacity.
        ValueError: they are not consecutive or leave a gap; nothing is written.
    """
    if rows.dtype != state.dtype:
        return NotImplemented
    rows = state.form.rows(rows, state.head.shape[1])
    store = Store(state.pages, state.head, state.spec, state.SIDE)
    first = position_of(position, store.tokens, store.first)
    if first + rows.shape[2] > state.tokens:
        raise IndexError(f"position {first + rows.shape[2] - 1} is beyond {state.tokens} tokens")
    stored = store.index_of(first)
    store.due(rows.shape[2], stored)  # before anything is written
    if stored < store.length:
        store.crop(stored)
    store.append(rows, ALL)
    return state


def _copy_(state: Tensor, source: Any, non_blocking: bool = False) -> Any:
    """All tokens anew, as a rolling window of the model's eager code writes them."""
    if (
        not isinstance(state, SparkTensor)
        or not isinstance(source, Tensor)
        or source.dim() > state.dim()
    ):
        return NotImplemented
    dense = source.dense() if isinstance(source, SparkTensor) else source
    rows = dense.to(state.head.device, state.dtype).expand(state.shape)
    if state.static:
        return _write(state, torch.arange(state.tokens), rows)
    rows = state.form.taken(state.form.rows(rows, state.head.shape[1]), 0)
    pages, tail_rows = map(int, state.spec.room(rows.shape[2]))
    store = allocate(rows, state.spec, state.SIDE, pages, tail_rows)
    store.append(rows, ALL)
    state.replace_storage(store.pages, store.head)
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
    _aten.copy_.default: _copy_,
    _aten.index_copy_.default: _index_copy_,
    _aten.index_put_.default: _index_put_,
}
_WRITES = {
    _aten.zero_.default, _aten.index_copy_.default, _aten.index_put_.default, _aten.copy_.default,
}  # fmt: skip
"""Operators by which a model may write into its cache in a graph."""


def _is_traced(args: tuple[Any, ...]) -> bool:
    """Whether a state among the arguments is being traced, not computed."""
    return any(is_fake(state.head) for state in _states(args))


def _states(tree: object) -> Iterator[SparkTensor]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, SparkTensor):
            yield leaf


def _on_dense(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on the recovered dense tensors.

    Raises:
        TypeError: it writes into a state.
        SparkError: a state was made under ``strict=True``.
    """
    given = dict(zip((schema.name for schema in func._schema.arguments), args, strict=False))
    given.update(kwargs)
    for schema in func._schema.arguments:
        if schema.is_write and any(True for _ in _states(given.get(schema.name))):
            raise TypeError(
                f"{func} writes into a compressed cache tensor in a way that it does not know; "
                "call .dense() for a copy"
            )
    if not _is_traced(args):
        reason = f"{func} does not work on a compressed cache"
        if any(state.form.strict for state in _states((args, kwargs))):
            raise SparkError(f"{reason}; call .dense() for a dense copy")
        warn_once(f"{reason}: it gets the recovered dense tensor", stacklevel=4)
    args, kwargs = tree_map_only(SparkTensor, lambda state: state.dense(), (args, kwargs))
    return func(*args, **kwargs)
