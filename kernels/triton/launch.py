"""Starting the kernels.

Everything here is traceable: no tensor is read, and sizes that grow are compared only where they
are plain numbers, because a comparison of symbols would become a guard of the graph. The bounds in
the kernels are what keeps every access inside its buffer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

from ..spec import Spec
from . import blocks
from .attend import attend_split
from .head import prepare_head, rewind_head, update_head
from .merge import merge_splits
from .pack import pack_rows
from .parts import turn_queries
from .sides import Operand


def attend(
    query: Tensor, keys: Operand, values: Operand, attn_mask: Tensor | None,
    sinks: Tensor | None, causal_offset: int | None, spec: Spec, partial: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention over the stored and the new tokens, [B, Hq, L, Dv].

    Args:
        partial: asks for the log-sum-exp [B, Hq, L] too.
    """
    query = by_channel(query)
    batch, query_heads, queries, dim = query.shape
    new, slots = keys.arguments[2:4]
    heads, value_dim = new.shape[1], spec.value.head_dim
    group = query_heads // heads
    mask, kind, mask_tokens, strides = query, "none", 0, (0, 0, 0, 0)
    packed, dense = slots * spec.window, keys.rows + new.shape[2]
    if attn_mask is not None:
        # A mask of one column is the same for all tokens, however many there are.
        mask_tokens = packed + dense if attn_mask.shape[-1] == 1 else attn_mask.shape[-1]
        mask = attn_mask.expand(batch, query_heads, queries, mask_tokens)
        kind = "bool" if mask.dtype == torch.bool else "added"
        strides = mask.stride()  # type: ignore[assignment]
    block = blocks.attend_blocks(
        dim, value_dim, query.dtype, group, queries == 1, torch.version.hip is not None,
        keys.constants["PRUNED"] or values.constants["PRUNED"],
        keys.constants["FINE"] or values.constants["FINE"],
    )  # fmt: skip
    programs = batch * heads * ceil(group * queries, block.rows)
    of_packed, of_dense = blocks.splits(programs, packed, dense, block.tokens)
    splits, rows = of_packed + of_dense, batch * query_heads * queries
    part_output = query.new_empty((rows, splits, value_dim), dtype=torch.float32)
    part_top = query.new_empty((rows, splits), dtype=torch.float32)
    part_total = torch.empty_like(part_top)
    turned, bias = query, part_top
    if keys.constants["QUANTIZED"]:
        turned, bias = turn(query, keys)
    wrap_triton(attend_split)[(programs, splits)](
        query, turned, bias, mask, part_output, part_top, part_total, of_packed,
        0 if causal_offset is None else causal_offset, new.shape[2], mask_tokens, heads, group,
        queries, *query.stride()[:3], *strides, spec.scale, spec.softcap, spec.sinks,
        *keys.arguments, *values.arguments, P=spec.window,
        CAUSAL=causal_offset is not None, MASK=kind, SOFTCAP=spec.softcap != 0.0,
        PRECISION=precision(), LARGEST=torch.finfo(query.dtype).max, BLOCK_M=block.rows,
        BLOCK_N=block.tokens, **keys.named("KEY_", attend_split),
        **values.named("VALUE_", attend_split), num_warps=block.warps, num_stages=block.stages,
    )  # fmt: skip
    output = query.new_empty((batch, query_heads, queries, value_dim))
    lse = query.new_empty((batch, query_heads, queries), dtype=torch.float32) if partial else None
    head = values.arguments[1]
    wrap_triton(merge_splits)[(rows,)](
        part_output, part_top, part_total, part_top if sinks is None else sinks.contiguous(),
        output, part_top if lse is None else lse, splits, of_packed, query_heads, group, queries,
        value_dim, head, *head.stride()[:2], SINKS=sinks is not None, PARTIAL=partial,
        BLOCK_SPLITS=32, **values.of(merge_splits), num_warps=4,
    )  # fmt: skip
    return output, lse


def turn(query: Tensor, keys: Operand) -> tuple[Tensor, Tensor]:
    """The queries in the space of the keys' codes, and what centers add to scores."""
    batch, query_heads, queries, dim = query.shape
    heads, head = keys.arguments[2].shape[1], keys.arguments[1]
    turned = query.new_empty((batch, query_heads * queries, dim))
    bias = query.new_empty((batch, query_heads * queries), dtype=torch.float32)
    rows = 4 if queries == 1 else 16
    group = query_heads // heads
    wrap_triton(turn_queries)[(batch * heads * ceil(group * queries, rows),)](
        query, turned, bias, heads, group, queries, *query.stride()[:3], head, *head.stride()[:2],
        **keys.of(turn_queries), BLOCK_M=rows, num_warps=4,
    )  # fmt: skip
    return turned, bias


def append(
    query: Tensor | None, side: Operand, keep: int, spec: Spec, constants_are_known: bool = False
) -> None:
    """Append the new tokens of a side, pack the pages that are full, evict old tokens.

    Args:
        query: to note; None notes none.
        constants_are_known: leaves those that are fixed with the first page as they are.
    """
    new, slots = side.arguments[2:4]
    batch, heads, tokens, dim = new.shape
    rhythm = (tokens, spec.sinks, spec.recent, spec.min_tokens)
    has_constants = side.constants["PRUNED"] or side.constants["QUANTIZED"]
    if not constants_are_known and has_constants:
        _prepare(query, side, spec, appends=True)
    block_s, _ = blocks.pack_blocks(dim)
    due = torch.sym_min((side.rows + tokens - spec.sinks) // spec.window, slots)
    if type(due) is not int or due > 0:
        # The first dimension of a grid is the one that may be long.
        wrap_triton(pack_rows)[(ceil(due * spec.window, block_s), batch * heads)](
            heads, *rhythm, *side.arguments, P=spec.window,
            LARGEST=torch.finfo(new.dtype).max, BLOCK_S=block_s, **side.of(pack_rows), num_warps=4,
        )  # fmt: skip
    wrap_triton(update_head)[(batch * heads,)](
        keep, heads, *rhythm, *side.arguments, P=spec.window, BLOCK_S=block_s,
        **side.of(update_head), num_warps=4,
    )  # fmt: skip


def observe(query: Tensor, side: Operand, spec: Spec) -> None:
    """Add queries to the statistics that the next append will find."""
    if side.constants["NOTES"]:
        _prepare(query, side, spec, appends=False)


def _prepare(query: Tensor | None, side: Operand, spec: Spec, appends: bool) -> None:
    new = side.arguments[2]
    batch, heads, tokens, dim = new.shape
    query = new[:, :, :0] if query is None else by_channel(query)
    queries = query.shape[2]
    wrap_triton(prepare_head)[(batch * heads,)](
        query, query.shape[1] // heads, queries, *query.stride()[:3], heads, tokens, spec.sinks,
        spec.recent, spec.min_tokens, *side.arguments, P=spec.window, APPENDS=appends,
        BLOCK_S=blocks.pack_blocks(dim)[0], BLOCK_L=1 if queries == 1 else 8,
        **side.of(prepare_head), num_warps=4,
    )  # fmt: skip


def rewind(position: Tensor, side: Operand, spec: Spec) -> None:
    """Forget the tokens of a side from a position on."""
    new = side.arguments[2]
    batch, heads = new.shape[:2]
    wrap_triton(rewind_head)[(batch * heads,)](
        position, heads, spec.sinks, *side.arguments, P=spec.window,
        LARGEST=torch.finfo(new.dtype).max, BLOCK_N=4, **side.of(rewind_head), num_warps=4,
    )  # fmt: skip


def precision() -> str:
    """How float32 products are made: on NVIDIA's tensor cores of three parts each."""
    return "ieee" if torch.version.hip else "tf32x3"


def by_channel(tensor: Tensor) -> Tensor:
    """The tensor with its channels side by side, a copy only if they are not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def ceil(number: Any, block: int) -> Any:
    return -(-number // block)
