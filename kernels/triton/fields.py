"""Reading what ``kernels/layout`` describes: counters, heads, fields, and what those are worth.

Pages and heads come as bytes. Where a field lies is a constant of the kernel, so that a format is a
set of constants: CODED (each channel is a level in units of an amplitude of the token, see
:mod:`.parts`), or else PRUNED (kept channels and the plane ``keep``) or all channels; INT8 or the
model's dtype; and RECOVERY of pruned channels, by "signs" (an amplitude per token, a weight per
channel and the plane ``negative``), by "fill" (an amount per token) or "none". :mod:`.sides` makes
them.
"""

# mypy: disable-error-code="import-untyped, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from .bits import flags, ranks

_FLOOR = tl.constexpr(1e-3)  # of kernels/formats/spark.floored


@triton.jit
def as_type(pointer: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Pointers to bytes as pointers to a dtype."""
    return pointer.to(tl.pointer_type(DTYPE), bitcast=True)


@triton.jit
def load_counters(head: tl.tensor) -> tl.tuple:
    """LENGTH, PACKED, FIRST and STEP % 2 of one head, int64.

    Whatever they say, they are bounded so that no address made of them leaves its buffer.
    """
    at, most = as_type(head, tl.int64), tl.full((), 1 << 30, tl.int64)
    length = tl.maximum(tl.minimum(tl.load(at), most), 0)
    packed = tl.maximum(tl.minimum(tl.load(at + 1), length), 0)
    first = tl.maximum(tl.minimum(tl.load(at + 2), length), 0)
    return length, packed, first, tl.load(at + 3) & 1


@triton.jit
def pages_due(
    total: tl.tensor, first: tl.tensor, packed: tl.tensor, sinks: tl.tensor, recent: tl.tensor,
    min_tokens: tl.tensor, P: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """``Spec.pages_due`` of ``total`` tokens, new ones included."""
    due = tl.maximum(total - packed - sinks - recent, 0) // P
    return tl.where(total - first >= min_tokens, due, 0)


@triton.jit
def rounded(numbers: tl.tensor) -> tl.tensor:
    """The nearest whole numbers, of two as near the even one, as torch rounds: float32.

    1.5 * 2^23 has no fraction bits: adding it rounds.
    """
    return (numbers + 12582912.0) - 12582912.0


@triton.jit
def floored(
    numbers: tl.tensor, inside: tl.tensor, COUNT: tl.constexpr, SHARE: tl.constexpr
) -> tl.tensor:
    """``kernels/formats/spark.floored`` of COUNT numbers, those that are ``inside`` [BLOCK]."""
    floor = tl.sum(tl.where(inside, numbers, 0.0), axis=0) / COUNT * SHARE
    return tl.maximum(numbers, tl.maximum(floor, 1e-12))


@triton.jit
def floored_power(
    norms: tl.tensor, inside: tl.tensor, DIM: tl.constexpr, SQUARED: tl.constexpr
) -> tl.tensor:
    """floored(norms)^p [BLOCK] of one head."""
    norms = floored(norms, inside, DIM, _FLOOR)
    return tl.sqrt_rn(norms) if SQUARED else norms


@triton.jit
def weights(
    head: tl.tensor, DIM: tl.constexpr, CONSTANT: tl.constexpr, SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """floored(norms)^-p [BLOCK] of one head, what an amplitude is multiplied with."""
    channel = tl.arange(0, BLOCK)
    inside = channel < DIM
    norms = tl.load(as_type(head + CONSTANT, tl.float32) + channel, mask=inside, other=0)
    return tl.where(inside, 1.0 / floored_power(norms, inside, DIM, SQUARED), 0.0)


@triton.jit
def pages_of(
    pages: tl.tensor, slot: tl.tensor, after: tl.tensor, slots: tl.tensor, PAGE: tl.constexpr
) -> tl.tensor:
    """Pointers to pages [N] that come ``after`` that in a slot, at most ``slots`` of them."""
    slot += after
    return pages + tl.where(slot >= slots, slot - slots, slot).to(tl.int64) * PAGE


@triton.jit
def dense_rows(
    tail: tl.tensor, new: tl.tensor, row: tl.tensor, filled: tl.tensor, new_s: tl.tensor,
    DIM: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Pointers to rows [N] of the tail, and from row ``filled`` on of the new tokens."""
    row = row.to(tl.int64)
    return tl.where(row < filled, tail + row * DIM, new + (row - filled) * new_s)


@triton.jit
def dense_numbers(
    tail: tl.tensor, new: tl.tensor, row: tl.tensor, filled: tl.tensor, new_s: tl.tensor,
    DIM: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Rows [N] as ``dense_rows`` has them, [N, BLOCK]: two loads, each of whole vectors."""
    is_old, row = (row < filled)[:, None], row.to(tl.int64)[:, None]
    column = columns(DIM, BLOCK)
    old = tl.load(tail + row * DIM + column, mask=is_old, other=0)
    fresh = tl.load(new + (row - filled) * new_s + column, mask=~is_old, other=0)
    return tl.where(is_old, old, fresh)


@triton.jit
def columns(DIM: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """The channels [1, BLOCK] to load without a mask: after the last one it stands again."""
    channel = tl.arange(0, BLOCK)[None, :]
    return channel if DIM == BLOCK else tl.minimum(channel, DIM - 1)


@triton.jit
def decoded(
    page: tl.tensor, row: tl.tensor, weight: tl.tensor, DIM: tl.constexpr, COUNT: tl.constexpr,
    DTYPE: tl.constexpr, LARGEST: tl.constexpr, PRUNED: tl.constexpr, INT8: tl.constexpr,
    RECOVERY: tl.constexpr, AMOUNT: tl.constexpr, STEP: tl.constexpr, CHANNELS: tl.constexpr,
    KEEP: tl.constexpr, NEGATIVE: tl.constexpr, PLANE: tl.constexpr, UNITS: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """What rows [N] of pages [N] are worth, [N, BLOCK] in the model's dtype.

    No load is masked: a predicate for each takes more registers than the loads do on AMD. A channel
    that is not kept, or is not there, reads its neighbour's number.
    """
    STORED: tl.constexpr = tl.int8 if INT8 else DTYPE
    WORD: tl.constexpr = tl.uint32 if UNIT == 32 else (tl.uint16 if UNIT == 16 else tl.uint8)
    channels = (as_type(page + CHANNELS, STORED) + row * COUNT)[:, None]
    if PRUNED:
        keep, rank = ranks(as_type(page + KEEP + row * PLANE, WORD), UNITS, UNIT, BLOCK)
        numbers = tl.load(channels + tl.minimum(rank, COUNT - 1))
    else:
        numbers = tl.load(channels + columns(DIM, BLOCK))
    if INT8:
        step = tl.load(as_type(page + STEP, DTYPE) + row).to(tl.float32)
        numbers = (numbers.to(tl.float32) * step[:, None]).to(DTYPE)
    if PRUNED:
        if RECOVERY == "signs":
            amplitude = tl.load(as_type(page + AMOUNT, DTYPE) + row).to(tl.float32)
            negative = flags(as_type(page + NEGATIVE + row * PLANE, WORD), UNITS, UNIT, BLOCK)
            recovered = tl.minimum(amplitude[:, None] * weight[None, :], LARGEST)
            recovered = tl.where(negative, -recovered, recovered).to(DTYPE)
        elif RECOVERY == "fill":
            recovered = tl.load(as_type(page + AMOUNT, DTYPE) + row)[:, None]
        else:
            recovered = tl.zeros((1, 1), DTYPE)
        numbers = tl.where(keep, numbers, recovered)
    return numbers
