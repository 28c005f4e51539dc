"""Split-K attention over packed keys and the dense tail (``kernels/reference/attend``).

    q.k^ = sum_kept q_j k_j + sum_pruned q_j sign_j a w_j        w = floored(norms)^-p

The keys k^ of a block are put together in registers, in the model's dtype, and go through one
matrix product: two of them (+-1 with the queries times w) hold twice the operands.

A program reads one share of the tokens of one key head for the rows of that head's queries, row
``g * L + l`` being query l of the group's head g; ``merge_splits`` puts the shares together. As in
FlashDecoding (Dao et al. 2023) and FlashAttention (arXiv 2205.14135), scores are in base 2.
"""

# mypy: disable-error-code="import-untyped, untyped-decorator"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .bits import flags, ranks

_LOG2E = tl.constexpr(1.4426950408889634)
_FLOOR = tl.constexpr(1e-3)  # of kernels/reference/prune.floored


@triton.jit
def _int64(number: tl.tensor) -> Any:
    """A scalar in 64 bits; a loop's counter is a plain int to Triton's interpreter."""
    return tl.full((), 0, tl.int64) + number


@triton.jit
def _weight(norms: tl.tensor, channel: tl.tensor, dim: tl.tensor, SQUARED: tl.constexpr) -> Any:
    """floored(norms)^-p of one head, 0 past its channels."""
    norm = tl.load(norms + channel, mask=channel < dim, other=0)
    floor = tl.maximum(tl.sum(norm, axis=0) / dim * _FLOOR, 1e-12)
    norm = tl.maximum(norm, floor)
    return tl.where(channel < dim, 1.0 / (tl.sqrt(norm) if SQUARED else norm), 0.0)


@triton.jit
def _packed_keys(
    kept: tl.tensor, bits: tl.tensor, scale: tl.tensor, weight: tl.tensor, row: tl.tensor,
    kept_s: tl.tensor, bits_s: tl.tensor, scale_s: tl.tensor, count: tl.tensor, DTYPE: tl.constexpr,
    LARGEST: tl.constexpr, QUANTIZED: tl.constexpr, SIGNS: tl.constexpr, WORDS: tl.constexpr,
    BITS: tl.constexpr, BLOCK_D: tl.constexpr,
) -> Any:  # fmt: skip
    """Recovered keys [N, BLOCK_D] of the rows ``row`` [N] behind the pointers.

    No load is masked: a predicate for each takes more registers than the loads do on AMD. A channel
    that is not kept reads its neighbour's number.
    """
    keep, rank = ranks(bits, row * bits_s, WORDS, BITS, BLOCK_D)
    key = tl.load(kept + ((row * kept_s)[:, None] + tl.minimum(rank, count - 1))).to(tl.float32)
    if QUANTIZED:
        key *= tl.load(scale + row * scale_s + 1).to(tl.float32)[:, None]
    if SIGNS:
        negative = flags(bits + WORDS, row * bits_s, WORDS, BITS, BLOCK_D)
        amplitude = tl.load(scale + row * scale_s).to(tl.float32)
        recovered = tl.minimum(amplitude[:, None] * weight[None, :], LARGEST)
        recovered = tl.where(negative, -recovered, recovered)
    else:
        recovered = 0.0
    return tl.where(keep, key, recovered).to(DTYPE)


@triton.jit
def _value_block(
    values: tl.tensor, value_bits: tl.tensor, value_scale: tl.tensor, row: tl.tensor,
    values_s: tl.tensor, vbits_s: tl.tensor, vscale_s: tl.tensor, value_dim: tl.tensor,
    value_count: tl.tensor, DTYPE: tl.constexpr, PRUNED: tl.constexpr, QUANTIZED: tl.constexpr,
    WORDS: tl.constexpr, BITS: tl.constexpr, BLOCK_V: tl.constexpr,
) -> Any:  # fmt: skip
    """Values [N, BLOCK_V] of the rows ``row`` [N] behind the pointers, in the model's dtype."""
    if PRUNED:
        keep, rank = ranks(value_bits, row * vbits_s, WORDS, BITS, BLOCK_V)
        value = tl.load(values + ((row * values_s)[:, None] + tl.minimum(rank, value_count - 1)))
    else:
        channel = tl.minimum(tl.arange(0, BLOCK_V), value_dim - 1)
        value = tl.load(values + ((row * values_s)[:, None] + channel[None, :]))
    if QUANTIZED:
        step = tl.load(value_scale + row * vscale_s + (1 if PRUNED else 0)).to(tl.float32)
        value = value.to(tl.float32) * step[:, None]
    value = value.to(DTYPE)
    if PRUNED:
        mean = tl.load(value_scale + row * vscale_s).to(DTYPE)
        value = tl.where(keep, value, mean[:, None])
    return value


@triton.jit
def _visible(
    scores: tl.tensor, token: tl.tensor, valid: tl.tensor, real: tl.tensor, mask: tl.tensor,
    mask_row: tl.tensor, mask_s: tl.tensor, latest: tl.tensor, attn_scale: tl.tensor,
    softcap: tl.tensor, CAUSAL: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
) -> Any:  # fmt: skip
    """Scores [M, N] in base 2, capped and masked; the mask's rows begin at ``mask_row`` [M]."""
    scores *= attn_scale
    if SOFTCAP:
        # tanh by one exponential; its overflow to inf gives 1.
        scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * _LOG2E) / softcap) + 1.0))
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


@triton.jit(do_not_specialize=["packed_length", "length", "latest_offset", "queries"])
def attend_split(
    query: tl.tensor, kept: tl.tensor, bits: tl.tensor, scale: tl.tensor, norms: tl.tensor,
    packed_length: tl.tensor, tail: tl.tensor, values: tl.tensor, value_bits: tl.tensor,
    value_scale: tl.tensor, mask: tl.tensor, part_output: tl.tensor, part_top: tl.tensor,
    part_total: tl.tensor, length: tl.tensor, latest_offset: tl.tensor, sink_tokens: tl.tensor,
    attn_scale: tl.tensor, softcap: tl.tensor, heads: tl.tensor, group: tl.tensor,
    queries: tl.tensor, packed_rows: tl.tensor, tail_rows: tl.tensor, value_rows: tl.tensor,
    dim: tl.tensor, count: tl.tensor, value_dim: tl.tensor, value_count: tl.tensor,
    query_b: tl.tensor, query_h: tl.tensor, query_s: tl.tensor, kept_b: tl.tensor,
    kept_h: tl.tensor, kept_s: tl.tensor, bits_b: tl.tensor, bits_h: tl.tensor, bits_s: tl.tensor,
    scale_b: tl.tensor, scale_h: tl.tensor, scale_s: tl.tensor, tail_b: tl.tensor,
    tail_h: tl.tensor, tail_s: tl.tensor, values_b: tl.tensor, values_h: tl.tensor,
    values_s: tl.tensor, vbits_b: tl.tensor, vbits_h: tl.tensor, vbits_s: tl.tensor,
    vscale_b: tl.tensor, vscale_h: tl.tensor, vscale_s: tl.tensor, mask_b: tl.tensor,
    mask_h: tl.tensor, mask_l: tl.tensor, mask_s: tl.tensor, LOADED: tl.constexpr,
    SIGNS: tl.constexpr, SQUARED: tl.constexpr, KEY_INT8: tl.constexpr, LARGEST: tl.constexpr,
    VALUE_INT8: tl.constexpr, VALUE_PRUNED: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, KEY_WORDS: tl.constexpr, KEY_BITS: tl.constexpr,
    VALUE_WORDS: tl.constexpr, VALUE_BITS: tl.constexpr,
) -> None:  # fmt: skip
    """Partial attention of one share of the tokens; see :mod:`.launch` for the arguments.

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
    channel, value_channel = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    inside = real[:, None] & (channel < dim)[None, :]
    query_at = b * query_b + query_head * query_h + position * query_s
    rows = tl.load(query + query_at[:, None] + channel[None, :], mask=inside, other=0)
    mask_row = b * mask_b + query_head * mask_h + position * mask_l
    latest = position + latest_offset

    # Whatever the caller claims, no row past the buffers is read.
    packed = (tl.load(packed_length) if LOADED else packed_length).to(tl.int32)
    filled = tl.minimum(length, value_rows).to(tl.int32)
    packed = tl.maximum(tl.minimum(tl.minimum(packed, packed_rows), filled), 0)
    dense = tl.maximum(tl.minimum(filled - packed, tail_rows), 0)
    sinks = tl.minimum(sink_tokens, dense)

    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    output = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    values += b * values_b + h * values_h
    value_bits += b * vbits_b + h * vbits_h
    value_scale += b * vscale_b + h * vscale_h
    splits = tl.num_programs(1)
    column = tl.arange(0, BLOCK_N)

    weight = _weight(norms + head * dim, channel, dim, SQUARED)
    kept += b * kept_b + h * kept_h
    bits += b * bits_b + h * bits_h
    scale += b * scale_b + h * scale_h
    share = tl.cdiv(tl.cdiv(packed, splits), BLOCK_N) * BLOCK_N
    end = tl.minimum((split + 1) * share, packed)
    for first in range(split * share, end, BLOCK_N):
        token = first + sinks + column
        # Behind the last row stands the last row again; ``valid`` leaves it out.
        row = tl.minimum(column, end - 1 - first)
        at = _int64(first)
        value = _value_block(
            values + (at + sinks) * values_s, value_bits + (at + sinks) * vbits_s,
            value_scale + (at + sinks) * vscale_s, row,
            values_s, vbits_s, vscale_s, value_dim, value_count,
            DTYPE, VALUE_PRUNED, VALUE_INT8, VALUE_WORDS, VALUE_BITS, BLOCK_V,
        )  # fmt: skip
        key = _packed_keys(
            kept + at * kept_s, bits + at * bits_s, scale + at * scale_s, weight, row,
            kept_s, bits_s, scale_s, count,
            DTYPE, LARGEST, KEY_INT8, SIGNS, KEY_WORDS, KEY_BITS, BLOCK_D,
        )  # fmt: skip
        scores = tl.dot(rows, tl.trans(key), input_precision=PRECISION)
        scores = _visible(
            scores, token, column < end - first, real, mask, mask_row, mask_s, latest, attn_scale,
            softcap, CAUSAL, MASK, SOFTCAP,
        )  # fmt: skip
        top, total, output = _softmax_step(scores, value, top, total, output, PRECISION)

    # The tail is shared out from the last program down: those have the fewest packed rows.
    tail += b * tail_b + h * tail_h
    share = tl.cdiv(tl.cdiv(dense, splits), BLOCK_N) * BLOCK_N
    split_down = splits - 1 - split
    end = tl.minimum((split_down + 1) * share, dense)
    for first in range(split_down * share, end, BLOCK_N):
        row = tl.minimum(column, end - 1 - first)
        at = _int64(first)
        value = _value_block(
            values, value_bits, value_scale,
            (first + row + tl.where(first + row < sinks, 0, packed)).to(tl.int64),
            values_s, vbits_s, vscale_s, value_dim, value_count,
            DTYPE, VALUE_PRUNED, VALUE_INT8, VALUE_WORDS, VALUE_BITS, BLOCK_V,
        )  # fmt: skip
        place = (row * tail_s)[:, None] + tl.minimum(channel, dim - 1)[None, :]
        key = tl.load(tail + at * tail_s + place)
        scores = tl.dot(rows, tl.trans(key), input_precision=PRECISION)
        token = first + column + tl.where(first + column < sinks, 0, packed)
        scores = _visible(
            scores, token, column < end - first, real, mask, mask_row, mask_s, latest, attn_scale,
            softcap, CAUSAL, MASK, SOFTCAP,
        )  # fmt: skip
        top, total, output = _softmax_step(scores, value, top, total, output, PRECISION)

    part = (head.to(tl.int64) * group * queries + m) * splits + split
    tl.store(part_top + part, top, mask=real)
    tl.store(part_total + part, total, mask=real)
    filled_columns = (real & (total > 0))[:, None] & (value_channel < value_dim)[None, :]
    target = part_output + part[:, None] * value_dim + value_channel[None, :]
    tl.store(target, output, mask=filled_columns)


@triton.jit(do_not_specialize=["splits", "rows"])
def merge_splits(
    part_output: tl.tensor, part_top: tl.tensor, part_total: tl.tensor, sinks: tl.tensor,
    result: tl.tensor, lse: tl.tensor, splits: tl.tensor, rows: tl.tensor, query_heads: tl.tensor,
    queries: tl.tensor, value_dim: tl.tensor, SINKS: tl.constexpr, LSE: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, BLOCK_V: tl.constexpr,
) -> None:  # fmt: skip
    """The output [B, Hq, L, Dv] and its log-sum-exp [B, Hq, L] from the shares of each row."""
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
    seen = tl.where(total > 0, total, 1.0)
    merged = (output / seen).to(result.dtype.element_ty)
    tl.store(result + row * value_dim + channel, merged, mask=channel < value_dim)
    if LSE:
        logarithm = tl.where(total > 0, (top + tl.log2(seen)) / _LOG2E, -float("inf"))
        tl.store(lse + row, logarithm)
