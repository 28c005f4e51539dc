"""The head of one side of a cache: its counters, statistics, constants and tail.

One program has a whole head: what it overwrites it has read before, which a barrier says where
other threads of the program may still read. An append takes two kernels, ``prepare_head`` before
the pages are encoded, which wants statistics and constants, and ``update_head`` after, which
overwrites the rows that are encoded.
"""

# mypy: disable-error-code="import-untyped, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from .fields import (
    as_type,
    decoded,
    dense_rows,
    load_counters,
    pages_due,
    pages_of,
    weights,
)
from .parts import part_rows, ranked_channels
from .quantize import quantized_constants


@triton.jit
def _query_stats(
    query: tl.tensor, group: tl.tensor, queries: tl.tensor, query_h: tl.tensor, query_s: tl.tensor,
    DIM: tl.constexpr, P: tl.constexpr, EACH: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Sum over the last P queries of the squared mean query of one group, or with EACH of the mean
    squared query: [BLOCK]."""
    channel = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.maximum(queries - P, 0), queries, BLOCK_L):
        position = start + tl.arange(0, BLOCK_L)
        inside = (position < queries)[:, None] & (channel < DIM)[None, :]
        place = query + (position * query_s)[:, None] + channel[None, :]
        mean = tl.zeros((BLOCK_L, BLOCK), tl.float32)
        for member in range(group):
            one = tl.load(place + member * query_h, mask=inside, other=0).to(tl.float32)
            mean += one * one if EACH else one
        mean /= group
        total += tl.sum(mean if EACH else mean * mean, axis=0)
    return total


@triton.jit
def _bias(
    tail: tl.tensor, new: tl.tensor, filled: tl.tensor, first: tl.tensor, end: tl.tensor,
    new_s: tl.tensor, DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """``Pruned.constants`` of one head, of its tokens from ``first`` to ``end``: [BLOCK]."""
    index, channel = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK)
    real = (channel < DIM)[None, :]
    mean = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, end, BLOCK_S):
        source = dense_rows(tail, new, start + index, filled, new_s, DIM)
        inside = (start + index < end)[:, None] & real
        row = tl.load(source[:, None] + channel[None, :], mask=inside, other=0)
        mean += tl.sum(row.to(tl.float32), axis=0)
    mean /= end - first
    over_tokens, over_channels = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK_S,), tl.float32)
    for start in range(first, end, BLOCK_S):
        source = dense_rows(tail, new, start + index, filled, new_s, DIM)
        inside = (start + index < end)[:, None] & real
        row = tl.load(source[:, None] + channel[None, :], mask=inside, other=0).to(tl.float32)
        centered = tl.where(inside, row - mean[None, :], 0.0)
        over_tokens += tl.sum(centered * centered, axis=0)
        centered = tl.where(inside, row - (tl.sum(row, axis=1) / DIM)[:, None], 0.0)
        over_channels = tl.maximum(over_channels, tl.sum(centered * centered, axis=1))
    over_tokens /= tl.maximum(end - first - 1, 1)
    largest = tl.max(over_tokens, axis=0) + tl.max(over_channels, axis=0) / (
        DIM - 1 if DIM > 1 else 1
    )
    return (0.3 / 0.7) * over_tokens / (largest + 2e-8)


@triton.jit(do_not_specialize=["new_tokens", "queries"])
def prepare_head(
    query: tl.tensor, group: tl.tensor, queries: tl.tensor, query_b: tl.tensor, query_h: tl.tensor,
    query_s: tl.tensor, heads: tl.tensor, new_tokens: tl.tensor, sink_tokens: tl.tensor,
    recent: tl.tensor, min_tokens: tl.tensor, pages: tl.tensor, head: tl.tensor, new: tl.tensor,
    slots: tl.tensor, rows: tl.tensor, pages_b: tl.tensor, pages_h: tl.tensor, head_b: tl.tensor,
    head_h: tl.tensor, new_b: tl.tensor, new_h: tl.tensor, new_s: tl.tensor, P: tl.constexpr,
    APPENDS: tl.constexpr, DIM: tl.constexpr, SPARK: tl.constexpr, NOTES: tl.constexpr,
    EACH: tl.constexpr, QUANTIZED: tl.constexpr, PARTS: tl.constexpr, PART_COUNT: tl.constexpr,
    SCALED: tl.constexpr, CONSTANT: tl.constexpr, STATS: tl.constexpr, GAIN: tl.constexpr,
    CENTER: tl.constexpr, FACTOR: tl.constexpr, ORDER: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Note the queries; fix the constants if the first page is due.

    APPENDS: the statistics go to the slot of the next step; otherwise they stay in this one's.
    """
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    head += b * head_b + h * head_h
    length, packed, first, step = load_counters(head)
    channel = tl.arange(0, BLOCK)
    inside = channel < DIM
    constant = as_type(head + CONSTANT, tl.float32) + channel
    due = pages_due(length + new_tokens, first, packed, sink_tokens, recent, min_tokens, P)
    is_first = (due > 0) & (packed == 0)
    noted = tl.zeros((BLOCK,), tl.float32)
    if NOTES:
        query += b * query_b + h * group * query_h
        noted = _query_stats(query, group, queries, query_h, query_s, DIM, P, EACH, BLOCK_L, BLOCK)
        stats = as_type(head + STATS, tl.float32) + channel
        noted += tl.load(stats + step * DIM, mask=inside, other=0)
        tl.store(stats + (1 - step if APPENDS else step) * DIM, noted, mask=inside)
    if APPENDS and is_first:
        filled = tl.minimum(length, rows)
        tail = as_type(head + TAIL, new.dtype.element_ty)
        new += b * new_b + h * new_h
        end = filled + new_tokens
        if SPARK:
            tl.store(constant, tl.sqrt_rn(noted), mask=inside)
        elif QUANTIZED:
            quantized_constants(
                head, tail, new, filled, sink_tokens, end, new_s, noted, DIM, PARTS, PART_COUNT,
                SCALED, GAIN, CENTER, FACTOR, ORDER, BLOCK_S, BLOCK,
            )  # fmt: skip
        else:
            bias = _bias(tail, new, filled, sink_tokens, end, new_s, DIM, BLOCK_S, BLOCK)
            tl.store(constant, bias, mask=inside)


@triton.jit(do_not_specialize=["new_tokens", "keep"])
def update_head(
    keep: tl.tensor, heads: tl.tensor, new_tokens: tl.tensor, sink_tokens: tl.tensor,
    recent: tl.tensor, min_tokens: tl.tensor, pages: tl.tensor, head: tl.tensor, new: tl.tensor,
    slots: tl.tensor, rows: tl.tensor, pages_b: tl.tensor, pages_h: tl.tensor, head_b: tl.tensor,
    head_h: tl.tensor, new_b: tl.tensor, new_h: tl.tensor, new_s: tl.tensor, P: tl.constexpr,
    DIM: tl.constexpr, NOTES: tl.constexpr, STATS: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Make a tail of the rows that are not encoded, forget used statistics, count the tokens."""
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    head += b * head_b + h * head_h
    length, packed, first, step = load_counters(head)
    total = length + new_tokens
    encoded = P * pages_due(total, first, packed, sink_tokens, recent, min_tokens, P)
    index, channel = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK)
    filled = tl.minimum(length - packed, rows)
    tail = as_type(head + TAIL, new.dtype.element_ty)
    new += b * new_b + h * new_h
    begin = tl.where(encoded > 0, tl.minimum(sink_tokens, filled), filled)
    end = tl.minimum(filled + new_tokens - encoded, rows)
    for start in range(begin, end, BLOCK_S):
        row = start + index
        source = row + tl.where(row < sink_tokens, 0, encoded)
        inside = (row < end)[:, None] & (channel < DIM)[None, :]
        source = dense_rows(tail, new, source, filled, new_s, DIM)
        moved = tl.load(source[:, None] + channel[None, :], mask=inside)
        tl.debug_barrier()
        tl.store(tail + row[:, None] * DIM + channel[None, :], moved, mask=inside)
        tl.debug_barrier()
    if NOTES and encoded > 0:
        stats = as_type(head + STATS, tl.float32) + (1 - step) * DIM + channel
        tl.store(stats, tl.zeros((BLOCK,), tl.float32), mask=channel < DIM)
    tl.debug_barrier()
    counters = as_type(head, tl.int64)
    tl.store(counters, total)
    tl.store(counters + 1, packed + encoded)
    tl.store(counters + 2, tl.maximum(first, total - keep))
    tl.store(counters + 3, tl.load(counters + 3) + 1)


@triton.jit
def rewind_head(
    position: tl.tensor, heads: tl.tensor, sink_tokens: tl.tensor, pages: tl.tensor,
    head: tl.tensor, new: tl.tensor, slots: tl.tensor, rows: tl.tensor, pages_b: tl.tensor,
    pages_h: tl.tensor, head_b: tl.tensor, head_h: tl.tensor, new_b: tl.tensor, new_h: tl.tensor,
    new_s: tl.tensor, P: tl.constexpr, LARGEST: tl.constexpr, DIM: tl.constexpr,
    COUNT: tl.constexpr, PAGE: tl.constexpr, QUANTIZED: tl.constexpr, PARTS: tl.constexpr,
    PART_COUNT: tl.constexpr, CODE_BYTES: tl.constexpr, SCALED: tl.constexpr,
    ROTATED: tl.constexpr, PRUNED: tl.constexpr, INT8: tl.constexpr, RECOVERY: tl.constexpr,
    SQUARED: tl.constexpr, AMOUNT: tl.constexpr, STEP: tl.constexpr, CHANNELS: tl.constexpr,
    KEEP: tl.constexpr, NEGATIVE: tl.constexpr, PLANE: tl.constexpr, UNITS: tl.constexpr,
    UNIT: tl.constexpr, CONSTANT: tl.constexpr, GAIN: tl.constexpr, CENTER: tl.constexpr,
    FACTOR: tl.constexpr, ORDER: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Forget the tokens from ``position`` on (``Store.crop``); a cut page becomes dense rows."""
    DTYPE: tl.constexpr = new.dtype.element_ty
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    head += b * head_b + h * head_h
    length, packed, first, _ = load_counters(head)
    cut = tl.minimum(tl.maximum(tl.load(position), 0), length)
    left = tl.minimum(tl.maximum(cut - sink_tokens, 0) // P * P, packed)
    if left < packed:
        weight = 0.0
        if RECOVERY == "signs":
            weight = weights(head, DIM, CONSTANT, SQUARED, BLOCK)
        channel = tl.arange(0, BLOCK)
        pages += b * pages_b + h * pages_h
        for start in range(0, tl.minimum(cut - left, rows) - sink_tokens, BLOCK_N):
            index = start + tl.arange(0, BLOCK_N)
            there = (index < cut - left - sink_tokens) & (sink_tokens + index < rows)
            token = tl.minimum(left + index, packed - 1)
            page, row = pages_of(pages, token // P % slots, 0, slots, PAGE), token % P
            target = (as_type(head + TAIL, DTYPE) + (sink_tokens + index) * DIM)[:, None]
            if QUANTIZED:
                for part in tl.static_range(PART_COUNT):
                    numbers = part_rows(
                        page, row, head, part, PARTS, PART_COUNT, CHANNELS, CODE_BYTES, AMOUNT,
                        ROTATED, GAIN,
                    )  # fmt: skip
                    own, inside, center, factor = ranked_channels(
                        head, part, PARTS, DIM, SCALED, CENTER, FACTOR, ORDER
                    )
                    numbers = numbers / factor[None, :] + center[None, :]
                    inside = there[:, None] & inside[None, :]
                    tl.store(target + own[None, :], numbers.to(DTYPE), mask=inside)
            else:
                numbers = decoded(
                    page, row, weight, DIM, COUNT, DTYPE, LARGEST, PRUNED, INT8, RECOVERY, AMOUNT,
                    STEP, CHANNELS, KEEP, NEGATIVE, PLANE, UNITS, UNIT, BLOCK,
                )  # fmt: skip
                inside = there[:, None] & (channel < DIM)[None, :]
                tl.store(target + channel[None, :], numbers, mask=inside)
    tl.debug_barrier()
    counters = as_type(head, tl.int64)
    tl.store(counters, cut)
    tl.store(counters + 1, left)
    tl.store(counters + 2, tl.minimum(first, cut))
