"""Checking the arguments of the kernels and starting them.

Everything here is traceable: no tensor is read, and sizes that grow are compared only where they
are plain numbers, because a comparison of symbols would become a guard of the graph. There, the
bounds in the kernels are what keeps every access inside its buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import wrap_triton

from ..layout import plane_bytes, scale_entries, value_head_dim
from ..reference import prune as reference_prune
from . import blocks
from .append import append_rows
from .attend import attend_split, merge_splits
from .checks import (
    DTYPES,
    SALIENCIES,
    check_attend,
    check_filled,
    check_room,
    one_of,
    shaped,
    within,
)
from .pack import pack_rows


def prune(
    key: Tensor,
    select_norms: Tensor,
    recovery_norms: Tensor,
    kept_channels: int,
    saliency: str,
    quantized: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``kept``, ``bits`` and ``scale`` of keys [B, Hkv, S, D], as ``spark::prune``."""
    dim = key.shape[3]
    one_of("key.dtype", key.dtype, DTYPES)
    one_of("saliency", saliency, SALIENCIES)
    within("kept_channels", kept_channels, 1, dim)
    shaped("select_norms", select_norms, (*key.shape[:2], dim))
    shaped("recovery_norms", recovery_norms, (*key.shape[:2], dim))
    rows, power = key.shape[:3], reference_prune.exponent(saliency)
    kept = key.new_empty((*rows, kept_channels), dtype=torch.int8 if quantized else key.dtype)
    bits = key.new_empty((*rows, 2, plane_bytes(dim)), dtype=torch.uint8)
    scale = key.new_empty((*rows, scale_entries("degenerate") + quantized))
    select, recover = (
        reference_prune.floored(norms).pow(power) for norms in (select_norms, recovery_norms)
    )
    squared = saliency == "squared"
    _pack(key, select, recover, kept, bits, scale, 0, keys=True, squared=squared)
    return kept, bits, scale


def pack_values(
    value: Tensor, bias: Tensor | None, kept_channels: int, quantized: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``rows``, ``value_bits`` and ``value_scale`` of values, as ``spark::pack_values``."""
    dim, pruned = value.shape[3], bias is not None
    one_of("value.dtype", value.dtype, DTYPES)
    within("kept_channels", kept_channels, 1 if pruned else dim, dim)
    tokens = value.shape[:3]
    rows = value.new_empty((*tokens, kept_channels), dtype=torch.int8 if quantized else value.dtype)
    bits = value.new_empty((*tokens, plane_bytes(dim) if pruned else 0), dtype=torch.uint8)
    scale = value.new_empty((*tokens, pruned + quantized))
    _pack_values_into(value, bias, rows, bits, scale, 0)
    return rows, bits, scale


def _pack_values_into(
    value: Tensor, bias: Tensor | None, rows: Tensor, bits: Tensor, scale: Tensor, start: int
) -> None:
    if bias is not None:
        shaped("value_bias", bias, (*value.shape[:2], value.shape[3]))
    _pack(value, bias, None, rows, bits, scale, start, keys=False, squared=False)


def _pack(
    source: Tensor, select: Tensor | None, recover: Tensor | None,
    kept: Tensor, bits: Tensor, scale: Tensor, start: int, *, keys: bool, squared: bool,
) -> None:  # fmt: skip
    """Start ``pack_rows``."""
    batch, heads, tokens, dim = source.shape
    source = by_channel(source)
    block_s, block_d = blocks.pack_blocks(dim)
    unused = source
    wrap_triton(pack_rows)[(batch * heads, _ceil(tokens, block_s))](
        source,
        unused if select is None else select.contiguous(),
        unused if recover is None else recover.contiguous(),
        kept, bits, scale,
        tokens, start, kept.shape[2], heads, dim, kept.shape[3], plane_bytes(dim),
        *source.stride()[:3], *kept.stride()[:3], *bits.stride()[:3],
        bits.stride(3) if keys else 0, *scale.stride()[:3],
        LARGEST=torch.finfo(scale.dtype).max, KEYS=keys, SQUARED=squared,
        PRUNED=select is not None, QUANTIZED=kept.dtype == torch.int8,
        BLOCK_S=block_s, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip


def append(rows: Tensor, new: Tensor, start: int, packed: int | Tensor) -> None:
    """Write ``new`` [B, H, L, D] into ``rows`` [B, H, C, D], as ``spark::append``.

    ``packed`` is a number, or on the device where it must not be read here.
    """
    batch, heads, tokens, dim = new.shape
    if rows.dtype != new.dtype:
        raise ValueError(f"new.dtype is {new.dtype}: allowed is that of the rows, {rows.dtype}")
    shaped("new", new, (*rows.shape[:2], tokens, rows.shape[3]))
    check_room(rows, start, packed, tokens)
    block_s, block_d = blocks.pack_blocks(dim)
    wrap_triton(append_rows)[(batch * heads, _ceil(tokens, block_s))](
        rows, new, packed, tokens, start, rows.shape[2], heads, dim, *rows.stride(), *new.stride(),
        LOADED=isinstance(packed, Tensor), BLOCK_S=block_s, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip


def append_values(
    values: Tensor, value_bits: Tensor | None, value_scale: Tensor | None,
    value_bias: Tensor | None, new: Tensor, start: int,
) -> None:  # fmt: skip
    """Store the dense values ``new`` behind the first ``start`` rows, as the operator does."""
    if value_scale is None:
        append(values, new, start, 0)
        return
    one_of("new.dtype", new.dtype, (value_scale.dtype,))
    for buffer in (values, value_bits, value_scale):
        if buffer is not None:
            shaped("new", new, (*buffer.shape[:2], new.shape[2], new.shape[3]))
            check_room(buffer, start, 0, new.shape[2])
    unused = values.new_empty((1, 1, 1, 0), dtype=torch.uint8)
    bits = unused if value_bits is None else value_bits
    if all(map(is_by_channel, (values, bits, value_scale))):
        _pack_values_into(new, value_bias, values, bits, value_scale, start)
        return
    stored = pack_values(new, value_bias, values.shape[3], values.dtype == torch.int8)
    for buffer, packed in zip((values, value_bits, value_scale), stored, strict=True):
        if buffer is not None:
            append(buffer, packed, start, 0)


def attend(
    query: Tensor, kept: Tensor, bits: Tensor, scale: Tensor, norms: Tensor, packed: int | Tensor,
    tail: Tensor, values: Tensor, length: int, attn_mask: Tensor | None, causal_offset: int | None,
    attn_scale: float, softcap: float, sinks: Tensor | None, sink_tokens: int, recovery: str,
    saliency: str, return_lse: bool, value_bits: Tensor | None, value_scale: Tensor | None,
    value_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp as ``spark::attend`` with "degenerate" or "none" recovery.

    ``packed`` is a number, or on the device where it must not be read here.
    """
    batch, query_heads, queries, dim = query.shape
    heads = kept.shape[1]
    group = query_heads // heads
    value_dim = value_head_dim(values, value_bias)
    dtype = values.dtype if value_scale is None else value_scale.dtype
    check_attend(
        query, kept, bits, scale, norms, tail, values, value_bits, value_scale, value_dim, dtype,
        recovery, saliency, sinks,
    )  # fmt: skip
    check_filled(kept, tail, values, packed, length, sink_tokens)
    query, kept, scale, tail, values = map(by_channel, (query, kept, scale, tail, values))
    bits, key_bits = _words(bits.flatten(3), 2)
    vbits, value_word_bits = (bits, 8) if value_bits is None else _words(value_bits, 1)
    vscale = scale if value_scale is None else by_channel(value_scale)
    mask, mask_kind, mask_strides = query, "none", (0, 0, 0, 0)
    if attn_mask is not None:
        mask = attn_mask.expand(batch, query_heads, queries, length)
        mask_kind = "bool" if mask.dtype == torch.bool else "added"
        mask_strides = mask.stride()  # type: ignore[assignment]

    block = blocks.attend_blocks(
        dim, value_dim, dtype, group, queries == 1, torch.version.hip is not None
    )
    row_blocks = _ceil(group * queries, block.rows)
    programs = batch * heads * row_blocks
    splits = blocks.splits(programs, length, block.tokens)
    rows = batch * query_heads * queries
    part_output = query.new_empty((rows, splits, value_dim), dtype=torch.float32)
    part_top = query.new_empty((rows, splits), dtype=torch.float32)
    part_total = torch.empty_like(part_top)
    wrap_triton(attend_split)[(programs, splits)](
        query, kept, bits, scale, norms.contiguous(), packed, tail, values, vbits, vscale, mask,
        part_output, part_top, part_total,
        length, 0 if causal_offset is None else causal_offset, sink_tokens, attn_scale, softcap,
        heads, group, queries, kept.shape[2], tail.shape[2], values.shape[2],
        dim, kept.shape[3], value_dim, values.shape[3],
        *query.stride()[:3], *kept.stride()[:3], *bits.stride()[:3], *scale.stride()[:3],
        *tail.stride()[:3], *values.stride()[:3], *vbits.stride()[:3], *vscale.stride()[:3],
        *mask_strides,
        LOADED=isinstance(packed, Tensor), SIGNS=recovery != "none", SQUARED=saliency == "squared",
        KEY_INT8=kept.dtype == torch.int8, LARGEST=torch.finfo(dtype).max,
        VALUE_INT8=values.dtype == torch.int8,
        VALUE_PRUNED=value_bits is not None, CAUSAL=causal_offset is not None, MASK=mask_kind,
        SOFTCAP=softcap != 0.0, PRECISION=precision(), BLOCK_M=block.rows, BLOCK_N=block.tokens,
        BLOCK_D=block.dim, BLOCK_V=block.value_dim, KEY_WORDS=bits.shape[3] // 2, KEY_BITS=key_bits,
        VALUE_WORDS=vbits.shape[3], VALUE_BITS=value_word_bits,
        num_warps=block.warps, num_stages=block.stages,
    )  # fmt: skip
    output = query.new_empty((batch, query_heads, queries, value_dim), dtype=dtype)
    lse = query.new_empty(query.shape[:3] if return_lse else (0,), dtype=torch.float32)
    wrap_triton(merge_splits)[(rows,)](
        part_output, part_top, part_total, part_top if sinks is None else sinks.contiguous(),
        output, lse, splits, rows, query_heads, queries, value_dim,
        SINKS=sinks is not None, LSE=return_lse, BLOCK_SPLITS=16, BLOCK_V=block.value_dim,
        num_warps=4,
    )  # fmt: skip
    return output, lse


def _words(planes: Tensor, count: int) -> tuple[Tensor, int]:
    """``count`` bit planes uint8 [B, H, S, bytes] as the largest words of one; the words' bits."""
    planes = by_channel(planes)
    places = (planes.shape[3] // count, planes.storage_offset(), *planes.stride()[:3])
    for dtype in (torch.int32, torch.int16):
        if all(place % dtype.itemsize == 0 for place in places):
            return planes.view(dtype), 8 * dtype.itemsize
    return planes, 8


def precision() -> str:
    """How float32 products are made: on NVIDIA's tensor cores of three parts each."""
    return "ieee" if torch.version.hip else "tf32x3"


def is_by_channel(tensor: Tensor) -> bool:
    """Whether a tensor's channels lie side by side."""
    return tensor.stride(-1) == 1 or tensor.shape[-1] == 1


def by_channel(tensor: Tensor) -> Tensor:
    """The tensor with its channels side by side, a copy only if they are not."""
    return tensor if is_by_channel(tensor) else tensor.contiguous()


def _ceil(number: int, block: int) -> int:
    return -(-number // block)
