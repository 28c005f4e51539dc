"""Split-K attention over packed pages and dense rows (``kernels/reference/attend``).

The keys of a block are put together in registers, in the model's dtype, and go through one matrix
product: separate products of kept and recovered channels hold twice the operands.

A program reads one share of the tokens of one key head for the rows of that head's queries, row
``g * L + l`` being query l of the group's head g; ``merge_splits`` puts the shares together. As in
FlashDecoding (Dao et al. 2023) and FlashAttention (arXiv 2205.14135), scores are in base 2.
"""

# mypy: disable-error-code="import-untyped, untyped-decorator"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .records import as_type, columns, decoded, dense_rows, load_counters, records, weights

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _visible(
    scores: tl.tensor, token: tl.tensor, valid: tl.tensor, real: tl.tensor, mask: tl.tensor,
    mask_row: tl.tensor, mask_s: tl.tensor, mask_tokens: tl.tensor, latest: tl.tensor,
    attn_scale: tl.tensor, softcap: tl.tensor, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
) -> Any:  # fmt: skip
    """Scores [M, N] in base 2, capped and masked; the mask's rows begin at ``mask_row`` [M]."""
    scores *= attn_scale
    if SOFTCAP:
        # tanh by one exponential; its overflow to inf gives 1.
        scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * _LOG2E) / softcap) + 1.0))
    if MASK != "none":
        valid = valid & (token < mask_tokens)
    seen = valid[None, :] & real[:, None]
    if CAUSAL:
        seen = seen & (token.to(tl.int64)[None, :] <= latest[:, None])
    if MASK != "none":
        at = mask + mask_row[:, None] + token.to(tl.int64)[None, :] * mask_s
        if MASK == "bool":
            seen = seen & (tl.load(at, mask=seen, other=0) != 0)
        else:
            scores += tl.load(at, mask=seen, other=0).to(tl.float32)
    return tl.where(seen, scores * _LOG2E, -float("inf"))


@triton.jit
def _softmax_step(
    scores: tl.tensor,
    value: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    output: tl.tensor,
    PRECISION: tl.constexpr,
) -> Any:
    """One step of the running softmax: maximum [M], sum [M] and weighted values [M, BLOCK_V]."""
    higher = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, axis=1)
    output = output * shrink[:, None]
    output = tl.dot(weights.to(value.dtype), value, output, input_precision=PRECISION)
    return higher, total, output


@triton.jit(do_not_specialize=["latest_offset", "queries", "new_tokens", "mask_tokens"])
def attend_split(
    query: tl.tensor, mask: tl.tensor, part_output: tl.tensor, part_top: tl.tensor,
    part_total: tl.tensor, latest_offset: tl.tensor, new_tokens: tl.tensor, mask_tokens: tl.tensor,
    heads: tl.tensor, group: tl.tensor, queries: tl.tensor, query_b: tl.tensor, query_h: tl.tensor,
    query_s: tl.tensor, mask_b: tl.tensor, mask_h: tl.tensor, mask_l: tl.tensor, mask_s: tl.tensor,
    attn_scale: tl.tensor, softcap: tl.tensor, sink_tokens: tl.tensor, key_pages: tl.tensor,
    key_head: tl.tensor, key_new: tl.tensor, key_slots: tl.tensor, key_rows: tl.tensor,
    key_pages_b: tl.tensor, key_pages_h: tl.tensor, key_head_b: tl.tensor, key_head_h: tl.tensor,
    key_new_b: tl.tensor, key_new_h: tl.tensor, key_new_s: tl.tensor, value_pages: tl.tensor,
    value_head: tl.tensor, value_new: tl.tensor, value_slots: tl.tensor, value_rows: tl.tensor,
    value_pages_b: tl.tensor, value_pages_h: tl.tensor, value_head_b: tl.tensor,
    value_head_h: tl.tensor, value_new_b: tl.tensor, value_new_h: tl.tensor, value_new_s: tl.tensor,
    P: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, LARGEST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KEY_DIM: tl.constexpr, KEY_COUNT: tl.constexpr, KEY_PAGE: tl.constexpr,
    KEY_RECORD: tl.constexpr, KEY_PRUNED: tl.constexpr, KEY_INT8: tl.constexpr,
    KEY_RECOVERY: tl.constexpr, KEY_SQUARED: tl.constexpr, KEY_AMOUNT: tl.constexpr,
    KEY_STEP: tl.constexpr, KEY_CHANNELS: tl.constexpr, KEY_KEEP: tl.constexpr,
    KEY_NEGATIVE: tl.constexpr, KEY_UNITS: tl.constexpr, KEY_UNIT: tl.constexpr,
    KEY_CONSTANT: tl.constexpr, KEY_TAIL: tl.constexpr, KEY_BLOCK: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_COUNT: tl.constexpr, VALUE_PAGE: tl.constexpr,
    VALUE_RECORD: tl.constexpr, VALUE_PRUNED: tl.constexpr, VALUE_INT8: tl.constexpr,
    VALUE_RECOVERY: tl.constexpr, VALUE_SQUARED: tl.constexpr, VALUE_AMOUNT: tl.constexpr,
    VALUE_STEP: tl.constexpr, VALUE_CHANNELS: tl.constexpr, VALUE_KEEP: tl.constexpr,
    VALUE_NEGATIVE: tl.constexpr, VALUE_UNITS: tl.constexpr, VALUE_UNIT: tl.constexpr,
    VALUE_CONSTANT: tl.constexpr, VALUE_TAIL: tl.constexpr, VALUE_BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Partial attention of one share of the tokens; see :mod:`.sides` for the arguments.

    Writes, for every row, the weighted values [.., Dv], the maximum and the sum of its share, to
    [B * Hkv, G * L, splits]; the first only where the sum is not 0.
    """
    DTYPE: tl.constexpr = query.dtype.element_ty
    row_blocks = tl.cdiv(group * queries, BLOCK_M)
    head, split = tl.program_id(0) // row_blocks, tl.program_id(1)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    m = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    real = m < group * queries
    query_head, position = h * group + m // queries, (m % queries).to(tl.int64)
    channel, value_channel = tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK)
    inside = real[:, None] & (channel < KEY_DIM)[None, :]
    query_at = b * query_b + query_head * query_h + position * query_s
    rows = tl.load(query + query_at[:, None] + channel[None, :], mask=inside, other=0)
    mask_row = b * mask_b + query_head * mask_h + position * mask_l
    latest = position + latest_offset

    key_pages += b * key_pages_b + h * key_pages_h
    key_head += b * key_head_b + h * key_head_h
    key_new += b * key_new_b + h * key_new_h
    value_pages += b * value_pages_b + h * value_pages_h
    value_head += b * value_head_b + h * value_head_h
    value_new += b * value_new_b + h * value_new_h
    length, packed, evicted, _ = load_counters(key_head)
    filled = tl.minimum(length - packed, tl.minimum(key_rows, value_rows)).to(tl.int32)
    packed, evicted = packed.to(tl.int32), evicted.to(tl.int32)
    stale = tl.maximum(tl.minimum(evicted, packed), packed - key_slots * P)
    begin, end_dense = evicted - stale, filled + new_tokens
    dense = tl.maximum(end_dense - begin, 0)

    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    output = tl.zeros((BLOCK_M, VALUE_BLOCK), tl.float32)
    key_weight, value_weight = 0.0, 0.0
    if KEY_RECOVERY == "signs":
        key_weight = weights(key_head, KEY_DIM, KEY_CONSTANT, KEY_SQUARED, KEY_BLOCK)
    if VALUE_RECOVERY == "signs":
        value_weight = weights(value_head, VALUE_DIM, VALUE_CONSTANT, VALUE_SQUARED, VALUE_BLOCK)
    splits = tl.num_programs(1)
    column = tl.arange(0, BLOCK_N)

    share = tl.cdiv(tl.cdiv(packed - stale, splits), BLOCK_N) * BLOCK_N
    end = tl.minimum(stale + (split + 1) * share, packed)
    for start in range(stale + split * share, end, BLOCK_N):
        # After the last token stands the last token again; ``valid`` leaves it out.
        token = tl.minimum(start + column, end - 1)
        value = decoded(
            records(value_pages, token, value_slots, P, VALUE_PAGE, VALUE_RECORD), value_weight,
            VALUE_DIM, VALUE_COUNT, DTYPE, LARGEST, VALUE_PRUNED, VALUE_INT8, VALUE_RECOVERY,
            VALUE_AMOUNT, VALUE_STEP, VALUE_CHANNELS, VALUE_KEEP, VALUE_NEGATIVE, VALUE_UNITS,
            VALUE_UNIT, VALUE_BLOCK,
        )  # fmt: skip
        key = decoded(
            records(key_pages, token, key_slots, P, KEY_PAGE, KEY_RECORD), key_weight,
            KEY_DIM, KEY_COUNT, DTYPE, LARGEST, KEY_PRUNED, KEY_INT8, KEY_RECOVERY,
            KEY_AMOUNT, KEY_STEP, KEY_CHANNELS, KEY_KEEP, KEY_NEGATIVE, KEY_UNITS, KEY_UNIT,
            KEY_BLOCK,
        )  # fmt: skip
        scores = tl.dot(rows, tl.trans(key), input_precision=PRECISION)
        scores = _visible(
            scores, start + column + sink_tokens - evicted, column < end - start,
            real, mask, mask_row, mask_s, mask_tokens, latest, attn_scale, softcap,
            CAUSAL, MASK, SOFTCAP,
        )  # fmt: skip
        top, total, output = _softmax_step(scores, value, top, total, output, PRECISION)

    # The dense rows are shared out from the last program down: those have the fewest packed ones.
    key_tail = as_type(key_head + KEY_TAIL, DTYPE)
    value_tail = as_type(value_head + VALUE_TAIL, DTYPE)
    share = tl.cdiv(tl.cdiv(dense, splits), BLOCK_N) * BLOCK_N
    split_down = splits - 1 - split
    end = tl.minimum(begin + (split_down + 1) * share, end_dense)
    for start in range(begin + split_down * share, end, BLOCK_N):
        row = tl.minimum(start + column, end - 1)
        value_row = dense_rows(value_tail, value_new, row, filled, value_new_s, VALUE_DIM)
        value = tl.load(value_row[:, None] + columns(VALUE_DIM, VALUE_BLOCK))
        key_row = dense_rows(key_tail, key_new, row, filled, key_new_s, KEY_DIM)
        key = tl.load(key_row[:, None] + columns(KEY_DIM, KEY_BLOCK))
        scores = tl.dot(rows, tl.trans(key), input_precision=PRECISION)
        token = start + column + tl.where(start + column < sink_tokens, 0, packed)
        scores = _visible(
            scores, token - evicted, column < end - start, real, mask, mask_row, mask_s,
            mask_tokens, latest, attn_scale, softcap, CAUSAL, MASK, SOFTCAP,
        )  # fmt: skip
        top, total, output = _softmax_step(scores, value, top, total, output, PRECISION)

    part = (head.to(tl.int64) * group * queries + m) * splits + split
    tl.store(part_top + part, top, mask=real)
    tl.store(part_total + part, total, mask=real)
    filled_columns = (real & (total > 0))[:, None] & (value_channel < VALUE_DIM)[None, :]
    target = part_output + part[:, None] * VALUE_DIM + value_channel[None, :]
    tl.store(target, output, mask=filled_columns)


@triton.jit(do_not_specialize=["splits", "rows", "queries"])
def merge_splits(
    part_output: tl.tensor, part_top: tl.tensor, part_total: tl.tensor, sinks: tl.tensor,
    result: tl.tensor, splits: tl.tensor, query_heads: tl.tensor, queries: tl.tensor,
    value_dim: tl.tensor, SINKS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_V: tl.constexpr,
) -> None:  # fmt: skip
    """The output [B, Hq, L, Dv] from the shares of each row."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_V)
    top = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    output = tl.zeros((BLOCK_V,), tl.float32)
    if SINKS:
        head = row // queries % query_heads
        top = tl.load(sinks + head).to(tl.float32) * _LOG2E
        total = tl.where(top == -float("inf"), 0.0, 1.0)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        part = row * splits + split
        tops = tl.load(part_top + part, mask=split < splits, other=-float("inf"))
        totals = tl.load(part_total + part, mask=split < splits, other=0)
        higher = tl.maximum(top, tl.max(tops, axis=0))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(tops - base)
        shrink = tl.exp2(top - base)
        inside = (totals > 0)[:, None] & (channel < value_dim)[None, :]
        place = part[:, None] * value_dim + channel[None, :]
        parts = tl.load(part_output + place, mask=inside, other=0)
        output = output * shrink + tl.sum(parts * weights[:, None], axis=0)
        total = total * shrink + tl.sum(totals * weights, axis=0)
        top = higher
    merged = (output / tl.where(total > 0, total, 1.0)).to(result.dtype.element_ty)
    tl.store(result + row * value_dim + channel, merged, mask=channel < value_dim)
