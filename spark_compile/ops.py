"""The one place for operator schemas, fake implementations and dispatch (``torch.ops.spark``).

Each operator's default implementation is the reference in ``kernels/reference``; a faster one for
a device is added with ``<operator>.register_kernel(device_type)`` and nothing else changes.

Arguments that several operators share, besides those explained in ``kernels/layout``:

- ``packed_length``: int64 scalar on the CPU, the number of packed rows that are filled. A tensor,
  so that a growing store changes no shape, no guard and no argument of a compiled graph.
- ``tail`` [B, Hkv, C, D]: dense keys, first those of the ``sink_tokens`` first tokens, then the
  tokens behind the packed ones; ``values`` [B, Hkv, C', Dv]: one row per token. Rows past the
  filled ones are never read.
- ``length``: number of tokens in the cache, before an append the tokens of the past alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .kernels.layout import plane_bytes, scale_entries
from .kernels.reference import attend as reference_attend
from .kernels.reference import prune as reference_prune

_STORE = (
    "Tensor kept, Tensor bits, Tensor scale, Tensor norms, Tensor packed_length, "
    "Tensor{tail} tail, Tensor{values} values, SymInt length"
)
_HOW = (
    "Tensor? attn_mask, SymInt? causal_offset, float attn_scale, float softcap, Tensor? sinks, "
    "int sink_tokens, str recovery, str saliency, bool return_lse=False"
)


@torch.library.custom_op(
    "spark::attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, SymInt? causal_offset, "
    "float attn_scale, float softcap, Tensor? sinks) -> Tensor",
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


@attention.register_fake
def _(query, key, value, *_args):  # type: ignore[no-untyped-def]
    return value.new_empty((*query.shape[:3], value.shape[3]))


@torch.library.custom_op(
    "spark::kv_append", mutates_args=(), schema="(Tensor? past, Tensor new) -> Tensor"
)
def kv_append(past: Tensor | None, new: Tensor) -> Tensor:
    """The canonical append, [B, H, S, D] and [B, H, L, D] to [B, H, S + L, D]."""
    return new.clone() if past is None else torch.cat((past, new), dim=2)


@kv_append.register_fake
def _(past, new):  # type: ignore[no-untyped-def]
    return torch.empty_like(new) if past is None else torch.cat((past, new), dim=2)


@torch.library.custom_op(
    "spark::query_stats",
    mutates_args=(),
    schema="(Tensor query, int kv_heads, int window) -> Tensor",
)
def query_stats(query: Tensor, kv_heads: int, window: int) -> Tensor:
    """Squared query norms of the last ``window`` queries; see the reference of the same name."""
    return reference_prune.query_stats(query, kv_heads, window)


@query_stats.register_fake
def _(query, kv_heads, window):  # type: ignore[no-untyped-def]
    return query.new_empty((query.shape[0], kv_heads, query.shape[3]), dtype=torch.float32)


@torch.library.custom_op(
    "spark::prune",
    mutates_args=(),
    schema="(Tensor key, Tensor select_norms, Tensor recovery_norms, int kept_channels, "
    "str recovery, str saliency) -> (Tensor, Tensor, Tensor)",
)
def prune(
    key: Tensor,
    select_norms: Tensor,
    recovery_norms: Tensor,
    kept_channels: int,
    recovery: str,
    saliency: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Prune keys [B, Hkv, S, D] to ``kept``, ``bits`` and ``scale``."""
    if not 1 <= kept_channels <= key.shape[3]:
        raise ValueError(f"kept_channels is {kept_channels}: allowed is 1 to {key.shape[3]}")
    return reference_prune.prune(
        key, select_norms, recovery_norms, kept_channels, recovery, saliency
    )


@prune.register_fake
def _(key, select_norms, recovery_norms, kept_channels, recovery, saliency):  # type: ignore[no-untyped-def]
    rows = key.shape[:3]
    kept = key.new_empty((*rows, kept_channels))
    bits = key.new_empty((*rows, 2, plane_bytes(key.shape[3])), dtype=torch.uint8)
    return kept, bits, key.new_empty((*rows, scale_entries(recovery)))


@torch.library.custom_op(
    "spark::append",
    mutates_args=("rows",),
    schema="(Tensor(a!) rows, Tensor new, SymInt start, Tensor? packed_length=None) -> ()",
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
    if (*new.shape[:2], new.shape[3]) != (*rows.shape[:2], rows.shape[3]):
        raise ValueError(f"tokens {tuple(new.shape)} do not fit into rows {tuple(rows.shape)}")
    return first, last


@append.register_fake
def _(rows, new, start, packed_length=None):  # type: ignore[no-untyped-def]
    return None


def _fake_attended(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; ``args`` are those of ``attend`` behind the query."""
    values, return_lse = args[6], len(args) > 16 and args[16]
    output = values.new_empty((*query.shape[:3], values.shape[3]))
    lse_shape = query.shape[:3] if return_lse else (0,)
    return output, query.new_empty(lse_shape, dtype=torch.float32)


@torch.library.custom_op(
    "spark::attend",
    mutates_args=(),
    schema="(Tensor query, "
    + _STORE.format(tail="", values="")
    + ", "
    + _HOW
    + ") -> (Tensor, Tensor)",
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
) -> tuple[Tensor, Tensor]:
    """Attend over packed keys and the dense tail, ``length`` tokens in all.

    Masks, offsets and the output are those of the reference ``attention``; the order of the
    ``length`` keys is the order of the tokens.

    Returns:
        The output [B, Hq, L, Dv] in the values' dtype and the log-sum-exp [B, Hq, L] in float32,
        or an empty tensor in its place unless ``return_lse``.
    """
    key = reference_attend.logical_keys(
        kept, bits, scale, norms, packed_length, tail, length, sink_tokens, recovery, saliency
    )
    value = values[:, :, :length]
    output, lse = reference_attend.attention(
        query, key, value, attn_mask, causal_offset, attn_scale, softcap, sinks
    )
    return output.to(values.dtype), lse if return_lse else lse.new_empty(0)


@attend.register_fake
def _(query, *args):  # type: ignore[no-untyped-def]
    return _fake_attended(query, *args)


@torch.library.custom_op(
    "spark::append_attend",
    mutates_args=("tail", "values"),
    schema="(Tensor query, Tensor new_key, Tensor new_value, "
    + _STORE.format(tail="(a!)", values="(b!)")
    + ", "
    + _HOW
    + ") -> (Tensor, Tensor)",
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
) -> tuple[Tensor, Tensor]:
    """Append L new tokens in place behind ``length`` cached ones, then attend over all of them.

    ``new_key`` [B, Hkv, L, D], ``new_value`` [B, Hkv, L, Dv]; otherwise as ``attend``, whose
    ``length`` is ``length + L``.

    Raises:
        ValueError: the buffers have no room for the new tokens.
    """
    _checked_rows(values, new_value, length, None)  # before the tail is written
    append(tail, new_key, length, packed_length)
    append(values, new_value, length)
    output, lse = attend(
        query, kept, bits, scale, norms, packed_length, tail, values, length + new_key.shape[2],
        attn_mask, causal_offset, attn_scale, softcap, sinks, sink_tokens, recovery, saliency,
        return_lse,
    )  # fmt: skip
    return output, lse


@append_attend.register_fake
def _(query, new_key, new_value, *args):  # type: ignore[no-untyped-def]
    return _fake_attended(query, *args)


@torch.library.custom_op(
    "spark::recover",
    mutates_args=(),
    schema="(Tensor kept, Tensor bits, Tensor scale, Tensor norms, Tensor packed_length, "
    "Tensor tail, SymInt length, int sink_tokens, str recovery, str saliency) -> Tensor",
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
) -> Tensor:
    """Dense keys [B, Hkv, length, D] in the dtype of ``tail``, for whatever cannot read packed."""
    key = reference_attend.logical_keys(
        kept, bits, scale, norms, packed_length, tail, length, sink_tokens, recovery, saliency
    )
    return key.to(tail.dtype)


@recover.register_fake
def _(kept, bits, scale, norms, packed_length, tail, length, *_args):  # type: ignore[no-untyped-def]
    return tail.new_empty((*tail.shape[:2], length, tail.shape[3]))


@torch.library.custom_op(
    "spark::first_rows", mutates_args=(), schema="(Tensor rows, SymInt length) -> Tensor"
)
def first_rows(rows: Tensor, length: int) -> Tensor:
    """A copy of the first ``length`` rows of a buffer [B, H, C, D].

    An operator of its own because comparing the strides of a slice with those of its buffer, as
    tracing ``clone`` does, would guard on how the buffer grows.
    """
    return rows[:, :, :length].clone(memory_format=torch.contiguous_format)


@first_rows.register_fake
def _(rows, length):  # type: ignore[no-untyped-def]
    return rows.new_empty((*rows.shape[:2], length, rows.shape[3]))
