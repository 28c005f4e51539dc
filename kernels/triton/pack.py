"""Choosing the channels of keys and values and packing them (``kernels/reference/prune``)."""

# mypy: disable-error-code="import-untyped, untyped-decorator"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .bits import store_plane


@triton.jit
def _keep_top(order: tl.tensor, count: tl.tensor) -> Any:
    """The ``count`` largest of each row of int32 [N, D], of equal ones the first; bool [N, D].

    Bisection over the bits: the largest threshold that at least ``count`` entries reach is built
    from its highest bit down. Entries below 0 are never kept.
    """
    threshold = tl.zeros((order.shape[0],), tl.int32)
    for step in range(31):
        candidate = threshold | (1 << (30 - step))
        reaching = tl.sum((order >= candidate[:, None]).to(tl.int32), axis=1)
        threshold = tl.where(reaching >= count, candidate, threshold)
    above = order > threshold[:, None]
    equal = order == threshold[:, None]
    missing = count - tl.sum(above.to(tl.int32), axis=1)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), axis=1) <= missing[:, None]))


@triton.jit(do_not_specialize=["tokens", "start"])
def pack_rows(
    source: tl.tensor, select: tl.tensor, recover: tl.tensor, kept: tl.tensor, bits: tl.tensor,
    scale: tl.tensor, tokens: tl.tensor, start: tl.tensor, capacity: tl.tensor, heads: tl.tensor,
    dim: tl.tensor, count: tl.tensor, plane_bytes: tl.tensor, source_b: tl.tensor,
    source_h: tl.tensor, source_s: tl.tensor, kept_b: tl.tensor, kept_h: tl.tensor,
    kept_s: tl.tensor, bits_b: tl.tensor, bits_h: tl.tensor, bits_s: tl.tensor,
    bits_plane: tl.tensor, scale_b: tl.tensor, scale_h: tl.tensor, scale_s: tl.tensor,
    LARGEST: tl.constexpr, KEYS: tl.constexpr, SQUARED: tl.constexpr, PRUNED: tl.constexpr,
    QUANTIZED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """Pack rows ``source`` [B, H, tokens, dim] into buffers from row ``start`` on.

    ``select`` [B, H, dim] float32 multiplies the magnitude of keys and is added to that of values;
    ``recover`` [B, H, dim] float32 multiplies the magnitudes whose mean a key's scale is. LARGEST
    is the largest number of the scale's dtype.
    """
    head = tl.program_id(0)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    token = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = tl.arange(0, BLOCK_D)
    row = start + token.to(tl.int64)
    valid = (token < tokens) & (row >= 0) & (row < capacity)
    real = (channel < dim)[None, :]
    inside = valid[:, None] & real
    offsets = b * source_b + h * source_h + token.to(tl.int64) * source_s
    value = tl.load(source + offsets[:, None] + channel[None, :], mask=inside, other=0)
    wide = value.to(tl.float32)
    magnitude = tl.abs(wide)
    scale += b * scale_b + h * scale_h
    entry = 0
    keep = inside
    if PRUNED:
        weight = tl.load(select + head * dim + channel, mask=channel < dim, other=0)[None, :]
        salient = magnitude * weight if KEYS else magnitude + weight
        # Floats that are not negative sort as their bits do.
        keep = _keep_top(tl.where(real, salient.to(tl.int32, bitcast=True), -1), count)
        pruned = tl.maximum(dim - count, 1).to(tl.float32)
        if KEYS:
            restore = tl.load(recover + head * dim + channel, mask=channel < dim, other=0)
            amount = magnitude * restore[None, :]
            amount = amount * amount if SQUARED else amount
        else:
            amount = wide
        mean = tl.sum(tl.where(keep, 0.0, amount), axis=1) / pruned
        if KEYS:
            mean = tl.sqrt(mean) if SQUARED else mean
            mean = tl.minimum(mean, LARGEST)
        tl.store(scale + row * scale_s, mean.to(scale.dtype.element_ty), mask=valid)
        entry = 1
        bits += b * bits_b + h * bits_h
        store_plane(bits, row, bits_s, valid, keep, plane_bytes)
        if KEYS:
            store_plane(bits + bits_plane, row, bits_s, valid, wide < 0, plane_bytes)
    if QUANTIZED:
        largest = tl.max(tl.where(keep, magnitude, 0.0), axis=1)
        step = tl.div_rn(largest, 127.0).to(scale.dtype.element_ty)
        tl.store(scale + row * scale_s + entry, step, mask=valid)
        divisor = tl.where(step.to(tl.float32) > 0, step.to(tl.float32), 1.0)
        level = tl.div_rn(wide, tl.broadcast_to(divisor[:, None], wide.shape))
        level = tl.minimum(tl.maximum(level, -127.0), 127.0)
        # 1.5 * 2^23 has no fraction bits: adding it rounds to the nearest even, as torch does.
        value = ((level + 12582912.0) - 12582912.0).to(tl.int8)
    rank = tl.cumsum(keep.to(tl.int32), axis=1) - 1 if PRUNED else channel[None, :]
    target = kept + b * kept_b + h * kept_h + row[:, None] * kept_s + rank
    tl.store(target, value, mask=inside & keep & (rank < count))
