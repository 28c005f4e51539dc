"""Encoding the pages that are due, of one side of a cache (``kernels/formats``)."""

# mypy: disable-error-code="import-untyped, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from .bits import store_plane
from .fields import as_type, dense_rows, floored_power, load_counters, pages_due, pages_of, rounded
from .quantize import encode_parts


@triton.jit
def _keep_top(order: tl.tensor, count: tl.constexpr) -> tl.tensor:
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


@triton.jit
def _select(
    row: tl.tensor, head: tl.tensor, step: tl.tensor, DIM: tl.constexpr, COUNT: tl.constexpr,
    LARGEST: tl.constexpr, SPARK: tl.constexpr, SQUARED: tl.constexpr, CONSTANT: tl.constexpr,
    STATS: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Which channels of float32 rows [N, BLOCK] are kept, and the amount [N] for the others."""
    channel = tl.arange(0, BLOCK)
    inside = channel < DIM
    magnitude = tl.abs(row)
    constant = tl.load(as_type(head + CONSTANT, tl.float32) + channel, mask=inside, other=0)
    if SPARK:
        stats = as_type(head + STATS, tl.float32) + (1 - step) * DIM
        norms = tl.sqrt_rn(tl.load(stats + channel, mask=inside, other=0))
        salient = magnitude * floored_power(norms, inside, DIM, SQUARED)[None, :]
        amount = magnitude * floored_power(constant, inside, DIM, SQUARED)[None, :]
        amount = amount * amount if SQUARED else amount
    else:
        salient = magnitude + constant[None, :]
        amount = row
    # Floats that are not negative sort as their bits do.
    keep = _keep_top(tl.where(inside[None, :], salient.to(tl.int32, bitcast=True), -1), COUNT)
    mean = tl.sum(tl.where(keep, 0.0, amount), axis=1) / (DIM - COUNT if DIM > COUNT else 1)
    if SPARK:
        mean = tl.minimum(tl.sqrt_rn(mean) if SQUARED else mean, LARGEST)
    return keep, mean


@triton.jit
def _quantized(row: tl.tensor, keep: tl.tensor, DTYPE: tl.constexpr) -> tl.tuple:
    """int8 levels [N, BLOCK] of float32 rows and their steps [N] over the kept channels."""
    step = tl.div_rn(tl.max(tl.where(keep, tl.abs(row), 0.0), axis=1), 127.0).to(DTYPE)
    divisor = tl.where(step.to(tl.float32) > 0, step.to(tl.float32), 1.0)
    level = tl.div_rn(row, tl.broadcast_to(divisor[:, None], row.shape))
    level = tl.minimum(tl.maximum(level, -127.0), 127.0)
    return rounded(level).to(tl.int8), step


@triton.jit(do_not_specialize=["new_tokens"])
def pack_rows(
    heads: tl.tensor, new_tokens: tl.tensor, sink_tokens: tl.tensor, recent: tl.tensor,
    min_tokens: tl.tensor, pages: tl.tensor, head: tl.tensor, new: tl.tensor, slots: tl.tensor,
    rows: tl.tensor, pages_b: tl.tensor, pages_h: tl.tensor, head_b: tl.tensor, head_h: tl.tensor,
    new_b: tl.tensor, new_h: tl.tensor, new_s: tl.tensor, P: tl.constexpr, LARGEST: tl.constexpr,
    DIM: tl.constexpr, COUNT: tl.constexpr, PAGE: tl.constexpr, QUANTIZED: tl.constexpr,
    PARTS: tl.constexpr, PART_COUNT: tl.constexpr, CODE_BYTES: tl.constexpr, SCALED: tl.constexpr,
    ROTATED: tl.constexpr, SPARK: tl.constexpr, PRUNED: tl.constexpr, INT8: tl.constexpr,
    SQUARED: tl.constexpr, AMOUNT: tl.constexpr, STEP: tl.constexpr, CHANNELS: tl.constexpr,
    KEEP: tl.constexpr, NEGATIVE: tl.constexpr, PLANE: tl.constexpr, CONSTANT: tl.constexpr,
    STATS: tl.constexpr, GAIN: tl.constexpr, CENTER: tl.constexpr, FACTOR: tl.constexpr,
    ORDER: tl.constexpr, TAIL: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Encode BLOCK_S of the tokens of the pages that are due; none where none is."""
    DTYPE: tl.constexpr = new.dtype.element_ty
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    head += b * head_b + h * head_h
    length, packed, first, step = load_counters(head)
    due = pages_due(length + new_tokens, first, packed, sink_tokens, recent, min_tokens, P)
    filled = tl.minimum(length - packed, rows)
    end = tl.minimum(due * P, filled + new_tokens - sink_tokens)
    start = tl.program_id(0) * BLOCK_S
    if start >= end:
        return
    index = start + tl.arange(0, BLOCK_S)
    channel = tl.arange(0, BLOCK)
    valid = index < end
    inside = valid[:, None] & (channel < DIM)[None, :]
    tail = as_type(head + TAIL, DTYPE)
    source = dense_rows(tail, new + b * new_b + h * new_h, sink_tokens + index, filled, new_s, DIM)
    token = packed + index
    pages += b * pages_b + h * pages_h
    page, place = pages_of(pages, token // P % slots, 0, slots, PAGE), token % P
    if QUANTIZED:
        encode_parts(
            source, valid, page, place, head, DIM, PARTS, PART_COUNT, SCALED, ROTATED, AMOUNT,
            CHANNELS, CODE_BYTES, GAIN, CENTER, FACTOR, ORDER,
        )  # fmt: skip
    else:
        row = tl.load(source[:, None] + channel[None, :], mask=inside, other=0)
        keep, rank = inside, channel[None, :]
        if PRUNED:
            keep, mean = _select(
                row.to(tl.float32), head, step, DIM, COUNT, LARGEST, SPARK, SQUARED, CONSTANT,
                STATS, BLOCK,
            )  # fmt: skip
            tl.store(as_type(page + AMOUNT, DTYPE) + place, mean.to(DTYPE), mask=valid)
            store_plane(page + KEEP + place * PLANE, valid, keep, PLANE)
            if SPARK:
                negative = row.to(tl.float32) < 0
                store_plane(page + NEGATIVE + place * PLANE, valid, negative, PLANE)
            rank = tl.cumsum(keep.to(tl.int32), axis=1) - 1
        if INT8:
            row, scale = _quantized(row.to(tl.float32), keep, DTYPE)
            tl.store(as_type(page + STEP, DTYPE) + place, scale, mask=valid)
        target = as_type(page + CHANNELS, tl.int8 if INT8 else DTYPE) + place * COUNT
        tl.store(target[:, None] + rank, row, mask=inside & keep & (rank < COUNT))
