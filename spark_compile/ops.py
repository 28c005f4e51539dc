"""The one place for operator schemas, fake implementations and dispatch (``torch.ops.spark``).

Each operator's default implementation is the reference in ``kernels/reference``; the first call on
a device looks for faster ones (``kernels/cpu``, ``kernels/triton``), which take over from then on.

Arguments that several operators share, besides those explained in ``kernels/layout``:

- ``packed_length``: int64 scalar on the CPU, the number of packed rows that are filled. A tensor,
  so that a growing store changes no shape, no guard and no argument of a compiled graph.
- ``tail`` [B, Hkv, C, D]: dense keys, first those of the ``sink_tokens`` first tokens, then the
  tokens behind the packed ones; ``values`` [B, Hkv, C', Tv]: one row per token. Rows past the
  filled ones are never read.
- ``value_bits``, ``value_scale``, ``value_bias``: None where the values are stored whole.
- ``length``: number of tokens in the cache, before an append the tokens of the past alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .kernels import cpu, triton
from .kernels.layout import plane_bytes, scale_entries, value_head_dim
from .kernels.reference import attend as reference_attend
from .kernels.reference import prune as reference_prune
from .kernels.reference import values as reference_values

_library = torch.library.Library("spark", "FRAGMENT")
_reference = torch.library.Library("spark_reference", "FRAGMENT")

_STORE = (
    "Tensor kept, Tensor bits, Tensor scale, Tensor norms, Tensor packed_length, "
    "Tensor{tail} tail, Tensor{values} values, SymInt length"
)
_HOW = (
    "Tensor? attn_mask, SymInt? causal_offset, float attn_scale, float softcap, Tensor? sinks, "
    "int sink_tokens, str recovery, str saliency, bool return_lse=False, "
    "Tensor{bits}? value_bits=None, Tensor{scale}? value_scale=None, Tensor? value_bias=None"
)


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Define ``spark::<function's name>``, with the function as its reference.

    ``spark_reference::<name>`` is the function itself, for native kernels that meet something they
    cannot do. Not ``torch.library.custom_op``: that puts two layers of Python around every call,
    more than a native kernel takes for a short context.
    """

    def define(reference: Callable[..., Any]) -> Any:
        name = reference.__name__

        def first_call(*args: Any) -> Any:
            device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
            key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
            if key and _accelerated(device) and operator.has_kernel_for_dispatch_key(key):
                return operator(*args)
            return reference(*args)

        for library, function in ((_library, first_call), (_reference, reference)):
            library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
            library.impl(name, function, "CompositeExplicitAutograd")
            torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
        operator = getattr(torch.ops.spark, name).default
        operator.__doc__ = reference.__doc__
        return operator

    return define


@functools.cache
def _accelerated(device: str) -> bool:
    """Register the native kernels of a device, once; False if there are none."""
    if device == "cpu":
        return cpu.load()
    return triton.load()


def _like_value(query, key, value, *_args):  # type: ignore[no-untyped-def]
    return value.new_empty((*query.shape[:3], value.shape[3]))


@_operator(
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, SymInt? causal_offset, "
    "float attn_scale, float softcap, Tensor? sinks) -> Tensor",
    _like_value,
)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    causal_offset: int | None,
    attn_scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """The canonical dense attention that ``find_attention`` makes of every way to write one."""
    output, _ = reference_attend.attention(
        query, key, value, attn_mask, causal_offset, attn_scale, softcap, sinks
    )
    return output.to(value.dtype)


def _joined(past, new):  # type: ignore[no-untyped-def]
    if past is None:
        return torch.empty_like(new)
    shape = (*new.shape[:2], past.shape[2] + new.shape[2], new.shape[3])
    return new.new_empty(shape, dtype=torch.promote_types(past.dtype, new.dtype))


@_operator("(Tensor? past, Tensor new) -> Tensor", _joined)
def kv_append(past: Tensor | None, new: Tensor) -> Tensor:
    """The canonical append, [B, H, S, D] and [B, H, L, D] to [B, H, S + L, D]."""
    return new.clone() if past is None else torch.cat((past, new), dim=2)


def _per_channel(query, kv_heads, window):  # type: ignore[no-untyped-def]
    return query.new_empty((query.shape[0], kv_heads, query.shape[3]), dtype=torch.float32)


@_operator("(Tensor query, int kv_heads, int window) -> Tensor", _per_channel)
def query_stats(query: Tensor, kv_heads: int, window: int) -> Tensor:
    """Squared query norms of the last ``window`` queries; see the reference of the same name."""
    return reference_prune.query_stats(query, kv_heads, window)


def _fake_prune(key, select, recover, kept_channels, recovery, saliency, quantized=False):  # type: ignore[no-untyped-def]
    rows = key.shape[:3]
    kept = key.new_empty((*rows, kept_channels), dtype=torch.int8 if quantized else key.dtype)
    bits = key.new_empty((*rows, 2, plane_bytes(key.shape[3])), dtype=torch.uint8)
    return kept, bits, key.new_empty((*rows, scale_entries(recovery) + quantized))


@_operator(
    "(Tensor key, Tensor select_norms, Tensor recovery_norms, int kept_channels, "
    "str recovery, str saliency, bool quantized=False) -> (Tensor, Tensor, Tensor)",
    _fake_prune,
)
def prune(
    key: Tensor,
    select_norms: Tensor,
    recovery_norms: Tensor,
    kept_channels: int,
    recovery: str,
    saliency: str,
    quantized: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Prune keys [B, Hkv, S, D] to ``kept``, ``bits`` and ``scale``."""
    _check_kept(kept_channels, key.shape[3])
    return reference_prune.prune(
        key, select_norms, recovery_norms, kept_channels, recovery, saliency, quantized
    )


def _check_kept(count: int, head_dim: int) -> None:
    if not 1 <= count <= head_dim:
        raise ValueError(f"kept_channels is {count}: allowed is 1 to {head_dim}")


def _fake_pack_values(value, bias, kept_channels, quantized):  # type: ignore[no-untyped-def]
    rows, pruned = value.shape[:3], bias is not None
    kept = value.new_empty((*rows, kept_channels), dtype=torch.int8 if quantized else value.dtype)
    plane = plane_bytes(value.shape[3]) if pruned else 0
    bits = value.new_empty((*rows, plane), dtype=torch.uint8)
    return kept, bits, value.new_empty((*rows, pruned + quantized))


@_operator(
    "(Tensor value, Tensor? bias, int kept_channels, bool quantized) -> (Tensor, Tensor, Tensor)",
    _fake_pack_values,
)
def pack_values(
    value: Tensor, bias: Tensor | None, kept_channels: int, quantized: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Prune and quantize values [B, Hkv, S, Dv]; see the reference of the same name."""
    _check_kept(kept_channels, value.shape[3])
    if bias is None and kept_channels != value.shape[3]:
        raise ValueError(f"kept_channels is {kept_channels}: without a bias all are kept")
    return reference_values.pack_values(value, bias, kept_channels, quantized)


def _nothing(*_args):  # type: ignore[no-untyped-def]
    return None


@_operator(
    "(Tensor(a!) rows, Tensor new, SymInt start, Tensor? packed_length=None) -> ()", _nothing
)
def append(rows: Tensor, new: Tensor, start: int, packed_length: Tensor | None = None) -> None:
    """Write ``new`` [B, H, L, D] into ``rows`` [B, H, C, D] behind the filled ones.

    ``start`` tokens are in the cache, ``packed_length`` of them not in ``rows``.

    Raises:
        ValueError: the rows do not fit.
    """
    first, last = _checked_rows(rows, new, start, packed_length)
    rows[:, :, first:last] = new


def _checked_rows(
    rows: Tensor, new: Tensor, start: int, packed_length: Tensor | None
) -> tuple[int, int]:
    """The first and last row that ``append`` will write."""
    first = start - (0 if packed_length is None else int(packed_length))
    last = first + new.shape[2]
    if first < 0 or last > rows.shape[2]:
        raise ValueError(f"rows {first} to {last} do not fit into a buffer of {rows.shape[2]}")
    if (*new.shape[:2], *new.shape[3:]) != (*rows.shape[:2], *rows.shape[3:]):
        raise ValueError(f"tokens {tuple(new.shape)} do not fit into rows {tuple(rows.shape)}")
    return first, last


@_operator(
    "(Tensor(a!) values, Tensor(b!)? value_bits, Tensor(c!)? value_scale, Tensor? value_bias, "
    "Tensor new, SymInt start) -> ()",
    _nothing,
)
def append_values(
    values: Tensor,
    value_bits: Tensor | None,
    value_scale: Tensor | None,
    value_bias: Tensor | None,
    new: Tensor,
    start: int,
) -> None:
    """Store the dense values ``new`` [B, Hkv, L, Dv] behind the first ``start`` rows.

    Raises:
        ValueError: the rows do not fit; nothing is written.
    """
    stored: tuple[Tensor, ...] = (new,)
    if value_scale is not None:
        quantized = values.dtype == torch.int8
        stored = reference_values.pack_values(new, value_bias, values.shape[3], quantized)
    buffers = (values, value_bits, value_scale)
    pairs = [(b, t) for b, t in zip(buffers, stored, strict=False) if b is not None]
    for buffer, rows in pairs:
        _checked_rows(buffer, rows, start, None)
    for buffer, rows in pairs:
        buffer[:, :, start : start + new.shape[2]] = rows


def _fake_attended(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; ``args`` are those of ``attend`` behind the query."""
    given = dict(enumerate(args))
    values, return_lse, value_scale, value_bias = (
        given[6],
        given.get(16),
        given.get(18),
        given.get(19),
    )
    like = values if value_scale is None else value_scale
    value_dim = value_head_dim(values, value_bias)
    lse_shape = query.shape[:3] if return_lse else (0,)
    return (
        like.new_empty((*query.shape[:3], value_dim)),
        query.new_empty(lse_shape, dtype=torch.float32),
    )


@_operator(
    "(Tensor query, "
    + _STORE.format(tail="", values="")
    + ", "
    + _HOW.format(bits="", scale="")
    + ") -> (Tensor, Tensor)",
    _fake_attended,
)
def attend(
    query: Tensor,
    kept: Tensor,
    bits: Tensor,
    scale: Tensor,
    norms: Tensor,
    packed_length: Tensor,
    tail: Tensor,
    values: Tensor,
    length: int,
    attn_mask: Tensor | None,
    causal_offset: int | None,
    attn_scale: float,
    softcap: float,
    sinks: Tensor | None,
    sink_tokens: int,
    recovery: str,
    saliency: str,
    return_lse: bool = False,
    value_bits: Tensor | None = None,
    value_scale: Tensor | None = None,
    value_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend over packed keys and the dense tail, ``length`` tokens in all.

    Masks, offsets and the output are those of the reference ``attention``; the order of the
    ``length`` keys is the order of the tokens.

    Returns:
        The output [B, Hq, L, Dv] in the model's dtype and the log-sum-exp [B, Hq, L] in float32,
        or an empty tensor in its place unless ``return_lse``.
    """
    key = reference_attend.logical_keys(
        kept, bits, scale, norms, packed_length, tail, length, sink_tokens, recovery, saliency
    )
    value_dim = value_head_dim(values, value_bias)
    value = reference_attend.logical_values(values, value_bits, value_scale, value_dim, length)
    output, lse = reference_attend.attention(
        query, key, value, attn_mask, causal_offset, attn_scale, softcap, sinks
    )
    dtype = values.dtype if value_scale is None else value_scale.dtype
    return output.to(dtype), lse if return_lse else lse.new_empty(0)


def _fake_append_attended(query: Tensor, new_key: Tensor, new_value: Tensor, *args: Any) -> Any:
    return _fake_attended(query, *args)


@_operator(
    "(Tensor query, Tensor new_key, Tensor new_value, "
    + _STORE.format(tail="(a!)", values="(b!)")
    + ", "
    + _HOW.format(bits="(c!)", scale="(d!)")
    + ") -> (Tensor, Tensor)",
    _fake_append_attended,
)
def append_attend(
    query: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    kept: Tensor,
    bits: Tensor,
    scale: Tensor,
    norms: Tensor,
    packed_length: Tensor,
    tail: Tensor,
    values: Tensor,
    length: int,
    attn_mask: Tensor | None,
    causal_offset: int | None,
    attn_scale: float,
    softcap: float,
    sinks: Tensor | None,
    sink_tokens: int,
    recovery: str,
    saliency: str,
    return_lse: bool = False,
    value_bits: Tensor | None = None,
    value_scale: Tensor | None = None,
    value_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Append L new tokens in place behind ``length`` cached ones, then attend over all of them.

    ``new_key`` [B, Hkv, L, D], ``new_value`` [B, Hkv, L, Dv]; otherwise as ``attend``, whose
    ``length`` is ``length + L``.

    Raises:
        ValueError: the buffers have no room for the new tokens; nothing is written.
    """
    _checked_rows(tail, new_key, length, packed_length)  # before the values are written
    append_values(values, value_bits, value_scale, value_bias, new_value, length)
    append(tail, new_key, length, packed_length)
    output, lse = attend(
        query, kept, bits, scale, norms, packed_length, tail, values, length + new_key.shape[2],
        attn_mask, causal_offset, attn_scale, softcap, sinks, sink_tokens, recovery, saliency,
        return_lse, value_bits, value_scale, value_bias,
    )  # fmt: skip
    return output, lse


def _fake_sliding_append_attended(query: Tensor, *args: Any) -> Any:
    return _fake_attended(query, *args[4:])


@_operator(
    "(Tensor query, Tensor key_first, Tensor value_first, Tensor new_key, Tensor new_value, "
    + _STORE.format(tail="(a!)", values="(b!)")
    + ", "
    + _HOW.format(bits="(c!)", scale="(d!)")
    + ") -> (Tensor, Tensor)",
    _fake_sliding_append_attended,
)
def sliding_append_attend(
    query: Tensor,
    key_first: Tensor,
    value_first: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    kept: Tensor,
    bits: Tensor,
    scale: Tensor,
    norms: Tensor,
    packed_length: Tensor,
    tail: Tensor,
    values: Tensor,
    length: int,
    attn_mask: Tensor | None,
    causal_offset: int | None,
    attn_scale: float,
    softcap: float,
    sinks: Tensor | None,
    sink_tokens: int,
    recovery: str,
    saliency: str,
    return_lse: bool = False,
    value_bits: Tensor | None = None,
    value_scale: Tensor | None = None,
    value_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``append_attend`` for a cache whose first tokens are no longer part of it.

    ``key_first`` and ``value_first``, int64 scalars on the CPU, are the numbers of stored keys and
    values in front of the ``length`` tokens of the past; there are no sink tokens among those.
    """
    first, values_first = int(key_first), int(value_first)
    stale = min(first, int(packed_length))
    kept, bits, scale = (buffer[:, :, stale:] for buffer in (kept, bits, scale))
    value_bits, value_scale = (
        buffer if buffer is None else buffer[:, :, values_first:]
        for buffer in (value_bits, value_scale)
    )
    pair: tuple[Tensor, Tensor] = torch.ops.spark.append_attend.default(
        query, new_key, new_value, kept, bits, scale, norms, packed_length - stale,
        tail[:, :, first - stale :], values[:, :, values_first:], length,
        attn_mask, causal_offset, attn_scale, softcap, sinks, sink_tokens, recovery, saliency,
        return_lse, value_bits, value_scale, value_bias,
    )  # fmt: skip
    return pair


def _fake_recover(kept, bits, scale, norms, packed_length, tail, length, *_args):  # type: ignore[no-untyped-def]
    return tail.new_empty((*tail.shape[:2], length, tail.shape[3]))


@_operator(
    "(Tensor kept, Tensor bits, Tensor scale, Tensor norms, Tensor packed_length, "
    "Tensor tail, SymInt length, int sink_tokens, str recovery, str saliency, "
    "Tensor? first=None) -> Tensor",
    _fake_recover,
)
def recover(
    kept: Tensor,
    bits: Tensor,
    scale: Tensor,
    norms: Tensor,
    packed_length: Tensor,
    tail: Tensor,
    length: int,
    sink_tokens: int,
    recovery: str,
    saliency: str,
    first: Tensor | None = None,
) -> Tensor:
    """Dense keys [B, Hkv, length, D] in the dtype of ``tail``, for whatever cannot read packed.

    ``first`` is the number of stored tokens in front of them, as ``sliding_append_attend`` has it.
    """
    stale = 0 if first is None else int(first)
    key = reference_attend.logical_keys(
        kept, bits, scale, norms, packed_length, tail, stale + length, sink_tokens, recovery,
        saliency,
    )  # fmt: skip
    return key[:, :, stale:].to(tail.dtype)


def _fake_first_rows(rows, length, bits=None, scale=None, bias=None, first=None):  # type: ignore[no-untyped-def]
    like = rows if scale is None else scale
    head_dim = value_head_dim(rows, bias)
    return like.new_empty((*rows.shape[:2], length, head_dim))


@_operator(
    "(Tensor values, SymInt length, Tensor? value_bits=None, Tensor? value_scale=None, "
    "Tensor? value_bias=None, Tensor? first=None) -> Tensor",
    _fake_first_rows,
)
def first_rows(
    values: Tensor,
    length: int,
    value_bits: Tensor | None = None,
    value_scale: Tensor | None = None,
    value_bias: Tensor | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """A dense copy [B, Hkv, length, Dv] of the ``length`` values behind the ``first`` ones.

    An operator of its own because comparing the strides of a slice with those of its buffer, as
    tracing ``clone`` does, would guard on how the buffer grows.
    """
    stale = 0 if first is None else int(first)
    values = values[:, :, stale:]
    value_bits, value_scale = (
        buffer if buffer is None else buffer[:, :, stale:] for buffer in (value_bits, value_scale)
    )
    if value_scale is None:
        return values[:, :, :length].clone(memory_format=torch.contiguous_format)
    value_dim = value_head_dim(values, value_bias)
    dense = reference_attend.logical_values(values, value_bits, value_scale, value_dim, length)
    return dense.to(value_scale.dtype)
