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
from .kernels.layout import Count
from .kernels.operands import check_build, check_evict, check_side
from .kernels.reference import operators as reference
from .kernels.reference.attend import attention as reference_attention
from .kernels.reference.evict import kept_positions
from .kernels.reference.store import Store
from .kernels.spec import SIDES, Side, Spec, parse_spec
from .report import SparkError, warn_once

# Kernels take operands however they lie. Inductor, told otherwise, makes a copy of the strides that
# eager code has for each operator: of a mask that all layers share, it computes one per layer.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_library = torch.library.Library("spark", "FRAGMENT")
_reference = torch.library.Library("spark_reference", "FRAGMENT")


def operator_of(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
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
            result = function(*args)
            _warn_slow(name, args)  # not where it raises: then nothing was slow
            return result

        for library, implementation in ((_library, first_call), (_reference, asked_for)):
            library.define(name + schema, tags=_TAGS)
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


@operator_of(
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


@operator_of("(Tensor? past, Tensor new, Tensor? position, int dim) -> Tensor", _joined)
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


def _fake_evict(key, queries, attn_mask, causal_offset, spec):  # type: ignore[no-untyped-def]
    stay = parse_spec(spec).stored_tokens(key.shape[2])
    return key.new_empty((*key.shape[:2], stay), dtype=torch.int64)


@operator_of(
    "(Tensor key, Tensor[] queries, Tensor? attn_mask, SymInt? causal_offset, str spec) -> Tensor",
    _fake_evict,
)
def evict(
    key: Tensor, queries: list[Tensor], attn_mask: Tensor | None, causal_offset: int | None,
    spec: str,
) -> Tensor:  # fmt: skip
    """Which tokens of a prompt stay, by the scorer of the spec.

    Args:
        key: [B, Hkv, S, D].
        queries: [B, Hq, L, D] of the L latest tokens, of every attention that reads this cache.
        attn_mask: of the first of them, broadcast to [B, Hq, L, S] or more columns; tokens that the
            latest query does not see (padding) are the first to go.
        causal_offset: query i sees tokens j <= i + causal_offset; None sees all.
        spec: with the scorer, and with scale and softcap of the first attention.

    Returns:
        Their positions [B, Hkv, S'] int64, ascending; S' is ``Spec.stored_tokens(S)``.

    Raises:
        ValueError: operands do not fit the spec or each other.
    """
    parsed = parse_spec(spec)
    check_evict(key, queries, attn_mask, parsed)
    return kept_positions(key, queries, attn_mask, causal_offset, parsed)


def empty_cache(
    key: Tensor, value: Tensor, spec: Spec, tokens: Count, capacity: Count | None = None
) -> tuple[Tensor, ...]:
    """Tensors as ``spark::build`` makes them, with room for ``tokens`` tokens or a capacity."""
    room, stored = spec.room(tokens, capacity), list[Tensor]()
    for side, rows in zip(SIDES, (key, value), strict=True):
        shapes = spec.stored_shapes(side, rows.shape[:2], *room)
        stored += [rows.new_empty(shape, dtype=torch.uint8) for shape in shapes]
    return tuple(stored)


def _fake_build(key, value, queries, spec, capacity, positions=None):  # type: ignore[no-untyped-def]
    return empty_cache(key, value, parse_spec(spec), key.shape[2], capacity)


@operator_of(
    "(Tensor key, Tensor value, Tensor[] queries, str spec, SymInt? capacity, "
    "Tensor? positions=None) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_build,
)
def build(
    key: Tensor, value: Tensor, queries: list[Tensor], spec: str, capacity: int | None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Store the tokens of a prefill.

    Args:
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        queries: [B, Hq, L, D] of every attention that reads this cache.
        spec: what to store and when to pack it.
        capacity: number of tokens that the cache will ever have; None lets it grow.
        positions: what ``spark::evict`` returned, if these are the tokens that it chose.

    Returns:
        ``pages`` and ``head`` of the keys, then of the values.

    Raises:
        ValueError: operands do not fit the spec or each other.
    """
    parsed = parse_spec(spec)
    check_build(key, value, queries, parsed, capacity, positions)
    keys, values = reference.build(key, value, queries, parsed, capacity, positions)
    return keys.pages, keys.head, values.pages, values.head


def _fake_step(query, new_key, new_value, *_args):  # type: ignore[no-untyped-def]
    return new_value.new_empty((*query.shape[:3], new_value.shape[3]))


STEP_OPERANDS = (
    "(Tensor query, Tensor new_key, Tensor new_value, Tensor(a!) key_pages, Tensor(b!) key_head, "
    "Tensor(c!) value_pages, Tensor(d!) value_head, Tensor? attn_mask, Tensor? sinks, "
    "SymInt? causal_offset, SymInt? keep, Tensor? position, str spec)"
)


@operator_of(f"{STEP_OPERANDS} -> Tensor", _fake_step)
def step(
    query: Tensor, new_key: Tensor, new_value: Tensor, key_pages: Tensor, key_head: Tensor,
    value_pages: Tensor, value_head: Tensor, attn_mask: Tensor | None, sinks: Tensor | None,
    causal_offset: int | None, keep: int | None, position: Tensor | None, spec: str,
) -> Tensor:  # fmt: skip
    """Attend over S cached and L new tokens, append those, pack the pages that are full, evict.

    The new tokens are attended to as they come, before they can be packed. In an empty cache they
    are a prompt, of which tokens are evicted as ``spark::evict`` has it, by these queries. S, mask,
    causal offset and position count evicted tokens of a prompt too.

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
        ValueError: operands do not fit the spec or each other, the cache is damaged, or there is no
            room; nothing is written.
    """
    return reference.step(*reference.checked(
        query, new_key, new_value, key_pages, key_head, value_pages, value_head, attn_mask, sinks,
        causal_offset, keep, position, spec,
    ))  # fmt: skip


def _fake_recover(pages, head, spec, is_key, length):  # type: ignore[no-untyped-def]
    format = parse_spec(spec).format("key" if is_key else "value")
    return pages.new_empty((*pages.shape[:2], length, format.head_dim), dtype=format.dtype)


@operator_of(
    "(Tensor pages, Tensor head, str spec, bool is_key, SymInt length) -> Tensor", _fake_recover
)
def recover(pages: Tensor, head: Tensor, spec: str, is_key: bool, length: int) -> Tensor:
    """The dense tokens [B, Hkv, length, D] that a cache side is worth, in the model's dtype.

    Rows after the tokens that are there (a capacity is not filled yet) are zero.

    Raises:
        ValueError: the stored tensors do not fit the spec, are damaged, or hold more tokens than
            ``length``.
        SparkError: tokens of the prompt have been evicted.
    """
    side: Side = "key" if is_key else "value"
    check_side(pages, head, parsed := parse_spec(spec), side)
    store = Store(pages, head, parsed, side)
    store.check()
    if store.dropped:
        raise SparkError(
            f"{store.dropped} of the {store.tokens} tokens of a cache are evicted: evicted tokens "
            "cannot be recovered, so that there is no dense tensor of it"
        )
    if store.visible > length:
        raise ValueError(f"length is {length}: the cache has {store.visible} tokens")
    rows = store.rows()
    dense = torch.zeros(
        (*rows.shape[:2], length, rows.shape[3]), dtype=store.format.dtype, device=rows.device
    )
    dense[:, :, : store.visible] = rows
    return dense
