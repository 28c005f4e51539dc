"""Putting the shares of :mod:`.attend` together, by log-sum-exp."""

# mypy: disable-error-code="import-untyped, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from .codes import rotated
from .parts import part_gain

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _merged(
    part_output: tl.tensor, part_top: tl.tensor, part_total: tl.tensor, row: tl.tensor,
    first: tl.tensor, end: tl.tensor, splits: tl.tensor, value_dim: tl.tensor, top: tl.tensor,
    total: tl.tensor, output: tl.tensor, BLOCK_SPLITS: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Add the shares ``first`` to ``end`` of a row to what is there."""
    channel = tl.arange(0, output.shape[0])
    for start in range(first, end, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        part = row * splits + split
        tops = tl.load(part_top + part, mask=split < end, other=-float("inf"))
        totals = tl.load(part_total + part, mask=split < end, other=0)
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
    return top, total, output


@triton.jit(do_not_specialize=["splits", "packed_splits", "rows", "queries"])
def merge_splits(
    part_output: tl.tensor, part_top: tl.tensor, part_total: tl.tensor, sinks: tl.tensor,
    result: tl.tensor, lse: tl.tensor, splits: tl.tensor, packed_splits: tl.tensor,
    query_heads: tl.tensor, group: tl.tensor, queries: tl.tensor, value_dim: tl.tensor,
    head: tl.tensor, head_b: tl.tensor, head_h: tl.tensor, SINKS: tl.constexpr,
    PARTIAL: tl.constexpr, BLOCK_SPLITS: tl.constexpr, DIM: tl.constexpr,
    QUANTIZED: tl.constexpr, ROTATED: tl.constexpr, GAIN: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """The output [B, Hq, L, Dv] from the shares of each row.

    PARTIAL: these are shares themselves, of which the log-sum-exp [B, Hq, L] is needed too.

    QUANTIZED: sums of levels become sums of values, once for all packed tokens.
    """
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    query_head = row // queries % query_heads
    top = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    output = tl.zeros((BLOCK,), tl.float32)
    top, total, output = _merged(
        part_output, part_top, part_total, row, 0, packed_splits, splits, value_dim, top, total,
        output, BLOCK_SPLITS,
    )  # fmt: skip
    if QUANTIZED:
        head += row // (queries * query_heads) * head_b + query_head // group * head_h
        output *= part_gain(head, 0, GAIN)
        if ROTATED:
            output = tl.reshape(rotated(tl.reshape(output, (1, BLOCK)), DIM), (BLOCK,))
    top, total, output = _merged(
        part_output, part_top, part_total, row, packed_splits, splits, splits, value_dim, top,
        total, output, 4,
    )  # fmt: skip
    if SINKS:
        logit = tl.load(sinks + query_head).to(tl.float32) * _LOG2E
        higher = tl.maximum(top, logit)
        base = tl.where(higher == -float("inf"), 0.0, higher)
        output *= tl.exp2(top - base)
        total = total * tl.exp2(top - base) + tl.exp2(logit - base)
        top = higher
    merged = (output / tl.where(total > 0, total, 1.0)).to(result.dtype.element_ty)
    tl.store(result + row * value_dim + channel, merged, mask=channel < value_dim)
    if PARTIAL:
        tl.store(lse + row, tl.where(total == 0, -float("inf"), (top + tl.log2(total)) / _LOG2E))
