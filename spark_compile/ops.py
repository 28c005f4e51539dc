"""The one place for operator schemas, fake implementations and dispatch (``torch.ops.spark``).

Each operator's default implementation is the reference in ``kernels/reference``; the first call on
a device looks for faster ones (``kernels/cpu``, ``kernels/triton``), which take over from then on.

A cache side is two stored tensors, ``pages`` and ``head`` (``kernels/layout.py``), and ``spec`` the
text that says what is in them (``kernels/spec.py``): a new format changes no schema.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .kernels import cpu, triton
from .kernels.reference import store as reference
from .kernels.reference.attend import attention as reference_attention
from .kernels.reference.store import Store
from .kernels.spec import SIDES, Side, Spec, parse_spec
from .report import warn_once

_library = torch.library.Library("spark", "FRAGMENT")
_reference = torch.library.Library("spark_reference", "FRAGMENT")


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Define ``spark::<function's name>``, with the function as its reference.

    ``spark_reference::<name>`` is the function itself, for native kernels that meet something they
    cannot do. Not ``torch.library.custom_op``: that puts two layers of Python around every call,
    more than a native kernel takes for a short context.
    """

    def define(function: Callable[..., Any]) -> Any:
        name = function.__name__

        def first_call(*args: Any) -> Any:
            device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
            if _accelerated(device) and operator.has_kernel_for_dispatch_key(device.upper()):
                return operator(*args)
            return function(*args)

        def asked_for(*args: Any) -> Any:
            _warn_slow(name, args)
            return function(*args)

        for library, implementation in ((_library, first_call), (_reference, asked_for)):
            library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
            library.impl(name, implementation, "CompositeExplicitAutograd")
            torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
        operator = getattr(torch.ops.spark, name).default
        operator.__doc__ = function.__doc__
        return operator

    return define


@functools.cache
def _accelerated(device: str) -> bool:
    """Register the native kernels of a device, once; False, which a warning says, if none do."""
    if device == "cpu":
        return cpu.load()
    if not (loaded := device == "cuda" and triton.load()):
        why = "Triton cannot be imported" if device == "cuda" else "there are some for CPU and CUDA"
        warn_once(f"no native kernels on {device} ({why}): the slow reference runs instead")
    return loaded


def _warn_slow(name: str, args: tuple[Any, ...]) -> None:
    """Say once per spec that a native kernel has handed an operator to its reference."""
    text = next((arg for arg in args if isinstance(arg, str)), None)
    if text is None:
        return
    spec = parse_spec(text)
    formats = dict.fromkeys(spec.format(side) for side in SIDES)
    what = " and ".join(f"{each.text} of {each.head_dim} {each.dtype} channels" for each in formats)
    warn_once(f"no native kernel does this {name} with {what}: the slow reference runs instead")


def _like_value(query, key, value, *_args):  # type: ignore[no-untyped-def]
    return value.new_empty((*query.shape[:3], value.shape[3]))


@_operator(
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, SymInt? causal_offset, "
    "float attn_scale, float softcap, Tensor? sinks) -> Tensor",
    _like_value,
)
def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None,
    causal_offset: int | None, attn_scale: float, softcap: float, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """The canonical dense attention that ``find_attention`` makes of every way to write one."""
    output, _ = reference_attention(
        query, key, value, attn_mask, causal_offset, attn_scale, softcap, sinks
    )
    return output.to(value.dtype)


def _joined(past, new, position, dim):  # type: ignore[no-untyped-def]
    if past is None:
        return torch.empty_like(new)
    shape = list(past.shape)
    if position is None:
        shape[dim] += new.shape[dim]
    return new.new_empty(shape, dtype=torch.promote_types(past.dtype, new.dtype))


@_operator("(Tensor? past, Tensor new, Tensor? position, int dim) -> Tensor", _joined)
def kv_append(past: Tensor | None, new: Tensor, position: Tensor | None, dim: int) -> Tensor:
    """The canonical append of L tokens to S cached ones along dimension ``dim``.

    At ``position`` (int64, the first of L consecutive ones) of a buffer, or after the last token.
    """
    if past is None:
        return new.clone()
    if position is None:
        return torch.cat((past, new), dim=dim)
    positions = torch.arange(new.shape[dim], device=new.device) + position.flatten()[0]
    return past.index_copy(dim, positions, new)


def _fake_build(key, value, queries, spec, capacity):  # type: ignore[no-untyped-def]
    parsed, stored = parse_spec(spec), []
    tokens = key.shape[2]
    for side, rows in zip(SIDES, (key, value), strict=True):
        pages = parsed.page_room(tokens, capacity)
        shapes = (
            (*rows.shape[:2], pages, parsed.pages(side).page_bytes),
            (*rows.shape[:2], parsed.head(side).head_bytes(parsed.tail_rows(tokens, capacity))),
        )
        stored += [rows.new_empty(shape, dtype=torch.uint8) for shape in shapes]
    return tuple(stored)


@_operator(
    "(Tensor key, Tensor value, Tensor[] queries, str spec, SymInt? capacity) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _fake_build,
)
def build(
    key: Tensor, value: Tensor, queries: list[Tensor], spec: str, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Store the tokens of a prefill.

    Args:
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        queries: [B, Hq, L, D] of every attention that reads this cache.
        spec: what to store and when to pack it.
        capacity: number of tokens that the cache will ever have; None lets it grow.

    Returns:
        ``pages`` and ``head`` of the keys, then of the values.
    """
    keys, values = reference.build(key, value, queries, parse_spec(spec), capacity)
    return keys.pages, keys.head, values.pages, values.head


def _fake_step(query, new_key, new_value, *_args):  # type: ignore[no-untyped-def]
    return new_value.new_empty((*query.shape[:3], new_value.shape[3]))


@_operator(
    "(Tensor query, Tensor new_key, Tensor new_value, Tensor(a!) key_pages, Tensor(b!) key_head, "
    "Tensor(c!) value_pages, Tensor(d!) value_head, Tensor? attn_mask, Tensor? sinks, "
    "SymInt? causal_offset, SymInt? keep, Tensor? position, str spec) -> Tensor",
    _fake_step,
)
def step(
    query: Tensor, new_key: Tensor, new_value: Tensor, key_pages: Tensor, key_head: Tensor,
    value_pages: Tensor, value_head: Tensor, attn_mask: Tensor | None, sinks: Tensor | None,
    causal_offset: int | None, keep: int | None, position: Tensor | None, spec: str,
) -> Tensor:  # fmt: skip
    """Attend over S cached and L new tokens, append those, pack the pages that are full, evict.

    The new tokens are attended to as they come, before they can be packed.

    Args:
        query: [B, Hq, L', D].
        new_key: [B, Hkv, L, D].
        new_value: [B, Hkv, L, Dv].
        key_pages, key_head, value_pages, value_head: the cache, changed in place.
        attn_mask: broadcast to [B, Hq, L', S + L], bool (True: visible) or additive; may be longer
            where the cache has a capacity.
        sinks: [Hq], a logit per head that takes part in the softmax and has no value.
        causal_offset: query i sees tokens j <= i + causal_offset; None sees all.
        keep: number of latest tokens that stay in the cache; None appends nothing (another
            attention of this step will) and only notes the queries.
        position: int64 of at least one element, where the first new token is written: tokens from
            there on are forgotten before. None appends after the last token.
        spec: what is stored, when it is packed, and the scale and softcap of the attention.

    Returns:
        [B, Hq, L', Dv].

    Raises:
        ValueError: operands do not fit the spec, or there is no room; nothing is written.
    """
    parsed = parse_spec(spec)
    keys = _store(key_pages, key_head, parsed, "key")
    values = _store(value_pages, value_head, parsed, "value")
    _check_new(query, new_key, new_value, keys, values)
    _check_mask(attn_mask, query, new_key, keys, position)
    if sinks is not None:
        _check("sinks", sinks, sinks.dtype, query.shape[1:2])
    return reference.step(
        query, new_key, new_value, keys, values, attn_mask, sinks, causal_offset, keep, position
    )


def _fake_recover(pages, head, spec, is_key, length):  # type: ignore[no-untyped-def]
    format = parse_spec(spec).format("key" if is_key else "value")
    return pages.new_empty((*pages.shape[:2], length, format.head_dim), dtype=format.dtype)


@_operator(
    "(Tensor pages, Tensor head, str spec, bool is_key, SymInt length) -> Tensor", _fake_recover
)
def recover(pages: Tensor, head: Tensor, spec: str, is_key: bool, length: int) -> Tensor:
    """The dense tokens [B, Hkv, length, D] that a cache side is worth, in the model's dtype.

    Rows after the tokens that are there (a capacity is not filled yet) are zero.

    Raises:
        ValueError: the stored tensors do not fit the spec, or hold more tokens than ``length``.
    """
    store = _store(pages, head, parse_spec(spec), "key" if is_key else "value")
    if store.visible > length:
        raise ValueError(f"length is {length}: the cache has {store.visible} tokens")
    rows = store.rows()
    dense = torch.zeros(
        (*rows.shape[:2], length, rows.shape[3]), dtype=store.format.dtype, device=rows.device
    )
    dense[:, :, : store.visible] = rows
    return dense


def _store(pages: Tensor, head: Tensor, spec: Spec, side: Side) -> Store:
    """A side whose stored tensors fit the spec.

    Raises:
        ValueError: they do not.
    """
    page_bytes, least = spec.pages(side).page_bytes, int(spec.head(side).head_bytes(0))
    heads = pages.shape[:2]
    _check(f"{side}_pages", pages, torch.uint8, (*heads, pages.shape[2:3].numel(), page_bytes))
    _check(f"{side}_head", head, torch.uint8, (*heads, max(head.shape[-1], least) // 8 * 8))
    return Store(pages, head, spec, side)


def _check_new(
    query: Tensor, new_key: Tensor, new_value: Tensor, keys: Store, values: Store
) -> None:
    """Raise ValueError unless the new tokens and queries go with the cache."""
    batch, heads = keys.head.shape[:2]
    if values.head.shape[:2] != keys.head.shape[:2] or values.length != keys.length:
        raise ValueError("keys and values are of other heads, batch entries or lengths")
    for name, new, store in (("new_key", new_key, keys), ("new_value", new_value, values)):
        tokens = new_key.shape[2:3].numel()
        _check(name, new, store.format.dtype, (batch, heads, tokens, store.format.head_dim))
    groups = query.shape[1:2].numel() // max(heads, 1)
    shape = (batch, groups * heads, query.shape[2:3].numel(), keys.format.head_dim)
    _check("query", query, query.dtype, shape)


def _check_mask(
    mask: Tensor | None, query: Tensor, new_key: Tensor, keys: Store, position: Tensor | None
) -> None:
    """Raise ValueError unless a mask covers the cache, as it is after a rewind, and new tokens."""
    if mask is None:
        return
    start = (
        keys.length
        if position is None
        else reference.position_of(position, keys.length, keys.first)
    )
    tokens = max(start - keys.first, 0) + new_key.shape[2]
    covered = tokens if mask.shape[-1:] in ((), (1,)) else mask.shape[-1]
    scores = (*query.shape[:3], covered)
    broadcasts = mask.dim() <= 4 and all(
        own in (1, other) for own, other in zip(mask.shape[::-1], scores[::-1], strict=False)
    )
    if not broadcasts or covered < tokens:
        allowed = [*query.shape[:3], tokens]
        raise ValueError(
            f"attn_mask is {list(mask.shape)}: allowed is what broadcasts to {allowed}"
        )


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a tensor has a dtype and a shape."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} is {tensor.dtype}{list(tensor.shape)}: allowed is {dtype}{list(shape)}"
        )
