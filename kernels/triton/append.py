"""Writing new dense rows behind the filled ones."""

# mypy: disable-error-code="import-untyped, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "start", "packed_length"])
def append_rows(
    rows: tl.tensor, new: tl.tensor, packed_length: tl.tensor, tokens: tl.tensor, start: tl.tensor,
    capacity: tl.tensor, heads: tl.tensor, dim: tl.tensor, rows_b: tl.tensor, rows_h: tl.tensor,
    rows_s: tl.tensor, rows_d: tl.tensor, new_b: tl.tensor, new_h: tl.tensor, new_s: tl.tensor,
    new_d: tl.tensor, LOADED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """Write ``new`` [B, H, tokens, dim] into ``rows`` [B, H, capacity, dim] from row
    ``start - packed_length`` on, a pointer to it if LOADED; rows outside are left out."""
    head = tl.program_id(0)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    packed = tl.load(packed_length) if LOADED else packed_length
    token = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = tl.arange(0, BLOCK_D)
    row = start + token.to(tl.int64) - packed
    inside = ((token < tokens) & (row >= 0) & (row < capacity))[:, None] & (channel < dim)[None, :]
    source = new + b * new_b + h * new_h + token.to(tl.int64)[:, None] * new_s
    target = rows + b * rows_b + h * rows_h + row[:, None] * rows_s
    columns = channel.to(tl.int64)[None, :]
    tl.store(target + columns * rows_d, tl.load(source + columns * new_d, mask=inside), mask=inside)
