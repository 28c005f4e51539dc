"""Split-K attention over packed pages and dense rows (``kernels/reference/attend``).

The keys of a block are put together in registers, in the model's dtype, and go through one matrix
product: separate products of kept and recovered channels hold twice the operands.

A program reads one share of the tokens of one key head for the rows of that head's queries, row
``g * L + l`` being query l of the group's head g; :mod:`.merge` puts the shares together. As in
FlashDecoding (Dao et al. 2023) and FlashAttention (arXiv 2205.14135), scores are in base 2.
"""

# mypy: disable-error-code="import-untyped, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from .codes import tile_channels
from .fields import as_type, decoded, dense_numbers, load_counters, pages_of, weights
from .parts import part_amplitudes, part_levels, part_numbers, part_query

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _visible(
    scores: tl.tensor, token: tl.tensor, valid: tl.tensor, real: tl.tensor, mask: tl.tensor,
    mask_row: tl.tensor, mask_s: tl.tensor, mask_tokens: tl.tensor, latest: tl.tensor,
    attn_scale: tl.tensor, softcap: tl.tensor, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
) -> tl.tensor:  # fmt: skip
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
def query_rows(
    query: tl.tensor, real: tl.tensor, DIM: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """The queries [M, BLOCK] that pointers [M] begin."""
    channel = tl.arange(0, BLOCK)
    inside = real[:, None] & (channel < DIM)[None, :]
    return tl.load(query[:, None] + channel[None, :], mask=inside, other=0)


@triton.jit
def _softmax_step(
    scores: tl.tensor, value: tl.tensor, amplitude: tl.tensor, top: tl.tensor, total: tl.tensor,
    output: tl.tensor, factors: tl.tensor, CODED: tl.constexpr, PRECISION: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """One step of the running softmax: maximum [M], sum [M] and weighted values [M, BLOCK_V].

    CODED: the values are in units of ``amplitude`` [N]; ``factors`` [M] sums what they were
    multiplied with.
    """
    higher = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, axis=1)
    if CODED:
        weights = (weights * amplitude[None, :]).to(value.dtype)
        factors = factors * shrink + tl.sum(weights.to(tl.float32), axis=1)
    output = output * shrink[:, None]
    output = tl.dot(weights.to(value.dtype), value, output, input_precision=PRECISION)
    return higher, total, output, factors


@triton.jit(do_not_specialize=["latest_offset", "queries", "new_tokens", "mask_tokens"])
def attend_split(
    query: tl.tensor, turned: tl.tensor, bias: tl.tensor, mask: tl.tensor, part_output: tl.tensor,
    part_top: tl.tensor, part_total: tl.tensor, packed_splits: tl.tensor, latest_offset: tl.tensor,
    new_tokens: tl.tensor, mask_tokens: tl.tensor, heads: tl.tensor, group: tl.tensor,
    queries: tl.tensor, query_b: tl.tensor, query_h: tl.tensor, query_s: tl.tensor,
    mask_b: tl.tensor, mask_h: tl.tensor, mask_l: tl.tensor, mask_s: tl.tensor,
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
    KEY_PART_COUNT: tl.constexpr,
    KEY_CODED: tl.constexpr, KEY_QUANTIZED: tl.constexpr, KEY_PARTS: tl.constexpr,
    KEY_CODE_BYTES: tl.constexpr, KEY_WORDS: tl.constexpr, KEY_PTX: tl.constexpr,
    KEY_PRUNED: tl.constexpr, KEY_INT8: tl.constexpr, KEY_RECOVERY: tl.constexpr,
    KEY_SQUARED: tl.constexpr, KEY_AMOUNT: tl.constexpr, KEY_STEP: tl.constexpr,
    KEY_CHANNELS: tl.constexpr, KEY_KEEP: tl.constexpr, KEY_NEGATIVE: tl.constexpr,
    KEY_PLANE: tl.constexpr, KEY_UNITS: tl.constexpr, KEY_UNIT: tl.constexpr,
    KEY_CONSTANT: tl.constexpr, KEY_TAIL: tl.constexpr, KEY_BLOCK: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_COUNT: tl.constexpr, VALUE_PAGE: tl.constexpr,
    VALUE_PART_COUNT: tl.constexpr,
    VALUE_CODED: tl.constexpr, VALUE_QUANTIZED: tl.constexpr, VALUE_PARTS: tl.constexpr,
    VALUE_CODE_BYTES: tl.constexpr, VALUE_WORDS: tl.constexpr, VALUE_PTX: tl.constexpr,
    VALUE_PRUNED: tl.constexpr, VALUE_INT8: tl.constexpr, VALUE_RECOVERY: tl.constexpr,
    VALUE_SQUARED: tl.constexpr, VALUE_AMOUNT: tl.constexpr, VALUE_STEP: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr, VALUE_KEEP: tl.constexpr, VALUE_NEGATIVE: tl.constexpr,
    VALUE_PLANE: tl.constexpr, VALUE_UNITS: tl.constexpr, VALUE_UNIT: tl.constexpr,
    VALUE_CONSTANT: tl.constexpr, VALUE_TAIL: tl.constexpr, VALUE_BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Partial attention of one share of the tokens; see :mod:`.sides` for the arguments.

    The first ``packed_splits`` programs of a head share its packed tokens, the others its dense
    ones.
    Writes, for every row, the weighted values [.., Dv], the maximum and the sum of its share, to
    [B * Hkv, G * L, splits]; the first only where the sum is not 0. Those of packed ``quantized``
    values are sums of levels.
    """
    DTYPE: tl.constexpr = query.dtype.element_ty
    row_blocks = tl.cdiv(group * queries, BLOCK_M)
    head, split = tl.program_id(0) // row_blocks, tl.program_id(1)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    m = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    real = m < group * queries
    query_head, position = h * group + m // queries, (m % queries).to(tl.int64)
    query_row = head.to(tl.int64) * group * queries + m
    query_at = query + b * query_b + query_head * query_h + position * query_s
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

    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    factors = tl.zeros((BLOCK_M,), tl.float32)
    output = tl.zeros((BLOCK_M, VALUE_BLOCK), tl.float32)
    column = tl.arange(0, BLOCK_N)
    amplitude = tl.zeros((BLOCK_N,), tl.float32)
    value_channel = tl.arange(0, VALUE_BLOCK)
    if split < packed_splits:
        key_weight, value_weight = 0.0, 0.0
        if KEY_RECOVERY == "signs":
            key_weight = weights(key_head, KEY_DIM, KEY_CONSTANT, KEY_SQUARED, KEY_BLOCK)
        if VALUE_RECOVERY == "signs":
            value_weight = weights(
                value_head, VALUE_DIM, VALUE_CONSTANT, VALUE_SQUARED, VALUE_BLOCK
            )
        biases = tl.zeros((BLOCK_M,), tl.float32)
        parts: tl.tuple = ()
        sums: tl.tuple = ()
        if KEY_CODED:
            coded = query_at
            if KEY_QUANTIZED:
                coded = turned + query_row * KEY_DIM
                biases = tl.load(bias + query_row, mask=real, other=0)
            for part in tl.static_range(KEY_PART_COUNT):
                own = part_query(coded, real, part, KEY_PARTS, KEY_WORDS)
                parts += (own,)
                sums += (tl.sum(own.to(tl.float32), axis=1),)
        else:
            parts += (query_rows(query_at, real, KEY_DIM, KEY_BLOCK),)
        share = tl.cdiv(tl.cdiv(packed - stale, packed_splits), BLOCK_N) * BLOCK_N
        first, end = stale + split * share, tl.minimum(stale + (split + 1) * share, packed)
        key_slot, value_slot = first // P % key_slots, first // P % value_slots
        for start in range(first, end, BLOCK_N):
            # After the last token stands the last token again; ``valid`` leaves it out.
            token = tl.minimum(start + column, end - 1)
            row, after = token % P, token // P - first // P
            page = pages_of(key_pages, key_slot, after, key_slots, KEY_PAGE)
            if KEY_CODED:
                scores = biases[:, None] + tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                for part in tl.static_range(KEY_PART_COUNT):
                    numbers = part_numbers(
                        page, row, part, KEY_PARTS, KEY_CHANNELS, KEY_CODE_BYTES, KEY_WORDS,
                        KEY_PTX, DTYPE,
                    )  # fmt: skip
                    dots = tl.dot(parts[part], tl.trans(numbers), input_precision=PRECISION)
                    dots = part_levels(dots, sums[part], part, KEY_PARTS, KEY_PTX, DTYPE)
                    worth = part_amplitudes(
                        page, row, part, KEY_PART_COUNT, KEY_QUANTIZED, KEY_AMOUNT, KEY_STEP, DTYPE
                    )
                    scores += dots * worth[None, :]
            else:
                key = decoded(
                    page, row, key_weight, KEY_DIM, KEY_COUNT, DTYPE, LARGEST, KEY_PRUNED, KEY_INT8,
                    KEY_RECOVERY, KEY_AMOUNT, KEY_STEP, KEY_CHANNELS, KEY_KEEP, KEY_NEGATIVE,
                    KEY_PLANE, KEY_UNITS, KEY_UNIT, KEY_BLOCK,
                )  # fmt: skip
                scores = tl.dot(parts[0], tl.trans(key), input_precision=PRECISION)
            page = pages_of(value_pages, value_slot, after, value_slots, VALUE_PAGE)
            if VALUE_CODED:
                value = part_numbers(
                    page, row, 0, VALUE_PARTS, VALUE_CHANNELS, VALUE_CODE_BYTES, VALUE_WORDS,
                    VALUE_PTX, DTYPE,
                )  # fmt: skip
                amplitude = part_amplitudes(
                    page, row, 0, VALUE_PART_COUNT, VALUE_QUANTIZED, VALUE_AMOUNT, VALUE_STEP, DTYPE
                )
            else:
                value = decoded(
                    page, row, value_weight, VALUE_DIM, VALUE_COUNT, DTYPE, LARGEST, VALUE_PRUNED,
                    VALUE_INT8, VALUE_RECOVERY, VALUE_AMOUNT, VALUE_STEP, VALUE_CHANNELS,
                    VALUE_KEEP, VALUE_NEGATIVE, VALUE_PLANE, VALUE_UNITS, VALUE_UNIT, VALUE_BLOCK,
                )  # fmt: skip
            scores = _visible(
                scores, start + column + sink_tokens - evicted, column < end - start,
                real, mask, mask_row, mask_s, mask_tokens, latest, attn_scale, softcap,
                CAUSAL, MASK, SOFTCAP,
            )  # fmt: skip
            top, total, output, factors = _softmax_step(
                scores, value, amplitude, top, total, output, factors, VALUE_CODED, PRECISION
            )
        if VALUE_CODED:
            value_channel = tile_channels(
                VALUE_DIM, (VALUE_PARTS >> 12) & 15, VALUE_WORDS, VALUE_BLOCK
            )
            output = part_levels(output, factors, 0, VALUE_PARTS, VALUE_PTX, DTYPE)
    else:
        rows = query_rows(query_at, real, KEY_DIM, KEY_BLOCK)
        key_tail = as_type(key_head + KEY_TAIL, DTYPE)
        value_tail = as_type(value_head + VALUE_TAIL, DTYPE)
        begin, end_dense = evicted - stale, filled + new_tokens
        share = tl.cdiv(tl.maximum(end_dense - begin, 0), tl.num_programs(1) - packed_splits)
        begin += (split - packed_splits) * share
        end = tl.minimum(begin + share, end_dense)
        for start in tl.range(begin, end, BLOCK_N, num_stages=1):
            row = tl.minimum(start + column, end - 1)
            value = dense_numbers(
                value_tail, value_new, row, filled, value_new_s, VALUE_DIM, VALUE_BLOCK
            )
            key = dense_numbers(key_tail, key_new, row, filled, key_new_s, KEY_DIM, KEY_BLOCK)
            scores = tl.dot(rows, tl.trans(key), input_precision=PRECISION)
            token = start + column + tl.where(start + column < sink_tokens, 0, packed)
            scores = _visible(
                scores, token - evicted, column < end - start, real, mask, mask_row, mask_s,
                mask_tokens, latest, attn_scale, softcap, CAUSAL, MASK, SOFTCAP,
            )  # fmt: skip
            top, total, output, factors = _softmax_step(
                scores, value, amplitude, top, total, output, factors, False, PRECISION
            )

    part = query_row * tl.num_programs(1) + split
    tl.store(part_top + part, top, mask=real)
    tl.store(part_total + part, total, mask=real)
    filled_columns = (real & (total > 0))[:, None] & (value_channel < VALUE_DIM)[None, :]
    target = part_output + part[:, None] * VALUE_DIM + value_channel[None, :]
    tl.store(target, output, mask=filled_columns)
