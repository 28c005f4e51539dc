"""Operators of the Triton kernels, and their place behind ``torch.ops.spark``.

``torch.ops.spark_triton.<name>`` takes what ``torch.ops.spark.<name>`` does. As a
``torch.library.triton_op`` it is decomposed by functionalization, so that Inductor sees the kernels
(export keeps it whole). Called eagerly, ``torch.ops.spark.<name>`` starts the same kernels without
the layers of Python that a custom operator has.

Nothing is read from the device: the counters of a cache stay there, so that a step can be captured
in a graph. What then cannot be raised is bounded: tokens without room are dropped, positions are
taken to be consecutive, one after the last token appends, and a mask hides what it does not cover.

What the kernels cannot do, a random recovery, a format that they do not know, specs with a scorer,
several dtypes or heads too large for the registers, the reference does
(``torch.ops.spark_reference``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from ..layout import FIRST, LENGTH, counters
from ..operands import check_build, check_step, check_strides
from ..reference.store import ALL, query_stats
from ..spec import SIDES, Side, Spec, parse_spec
from . import launch, sides


@triton_op("spark_triton::build", mutates_args=())
def build(
    key: Tensor, value: Tensor, queries: list[Tensor], spec: str, capacity: int | None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``spark::build``."""
    return _build(key, value, queries, spec, capacity, positions)


@triton_op(
    "spark_triton::step", mutates_args=("key_pages", "key_head", "value_pages", "value_head")
)
def step(
    query: Tensor, new_key: Tensor, new_value: Tensor, key_pages: Tensor, key_head: Tensor,
    value_pages: Tensor, value_head: Tensor, attn_mask: Tensor | None, sinks: Tensor | None,
    causal_offset: int | None, keep: int | None, position: Tensor | None, spec: str,
) -> Tensor:  # fmt: skip
    """``spark::step``."""
    return _step(
        query, new_key, new_value, key_pages, key_head, value_pages, value_head, attn_mask, sinks,
        causal_offset, keep, position, spec,
    )  # fmt: skip


@triton_op(
    "spark_triton::step_partial",
    mutates_args=("key_pages", "key_head", "value_pages", "value_head"),
)
def step_partial(
    query: Tensor, new_key: Tensor, new_value: Tensor, key_pages: Tensor, key_head: Tensor,
    value_pages: Tensor, value_head: Tensor, attn_mask: Tensor | None, sinks: Tensor | None,
    causal_offset: int | None, keep: int | None, position: Tensor | None, spec: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``spark::step_partial``."""
    return _step_partial(
        query, new_key, new_value, key_pages, key_head, value_pages, value_head, attn_mask, sinks,
        causal_offset, keep, position, spec,
    )  # fmt: skip


def _build(
    key: Tensor, value: Tensor, queries: list[Tensor], spec: str, capacity: int | None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    parsed = parse_spec(spec)
    if not sides.can(parsed):
        built: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.spark_reference.build(
            key, value, queries, spec, capacity, positions
        )
        return built
    check_build(key, value, queries, parsed, capacity, positions)
    stored: list[Tensor] = []
    for side, rows in zip(SIDES, (key, value), strict=True):
        stored += _build_side(rows, queries, parsed, side, capacity)
    return stored[0], stored[1], stored[2], stored[3]


def _build_side(
    rows: Tensor, queries: list[Tensor], spec: Spec, side: Side, capacity: int | None
) -> tuple[Tensor, Tensor]:
    """pages and head of one side, whose statistics and constants are plain PyTorch."""
    batch, heads, tokens, _ = rows.shape
    layout, format = spec.head(side), spec.format(side)
    shapes = spec.stored_shapes(side, (batch, heads), *spec.room(tokens, capacity))
    pages = rows.new_zeros(shapes[0], dtype=torch.uint8)
    # Views of a whole head would be guards on the tokens, of which its tail has room for.
    head = rows.new_zeros((batch, heads, layout.offsets["tail"]), dtype=torch.uint8)
    tail = rows.new_zeros((batch, heads, shapes[1][2] - head.shape[2]), dtype=torch.uint8)
    stats, norms = layout.stats(head), None
    if stats is not None:
        each = format.EACH_QUERY
        noted = sum(query_stats(query, heads, spec.window, each=each) for query in queries)
        stats += noted.unsqueeze(2) if isinstance(noted, Tensor) else 0  # both slots: STEP is 0
    if type(tokens) is not int or spec.pages_due(tokens, tokens):
        if stats is not None:
            norms = stats[:, :, 0].sqrt()
        for name, constant in format.constants(rows[:, :, spec.sinks :], norms).items():
            layout.constants(head)[name].copy_(constant)
    head = torch.cat((head, tail), dim=2)
    sides.check_room(pages, rows, spec, side)
    operand = sides.operand(pages, head, launch.by_channel(rows), spec, side)
    launch.append(None, operand, ALL, spec, constants_are_known=True)
    return pages, head


def _step(*given: Any) -> Tensor:
    return _stepped(torch.ops.spark_reference.step, False, *given)  # type: ignore[no-any-return]


def _step_partial(*given: Any) -> tuple[Tensor, Tensor]:
    return _stepped(torch.ops.spark_reference.step_partial, True, *given)  # type: ignore[no-any-return]


def _stepped(
    reference: Callable[..., Any], partial: bool, query: Tensor, new_key: Tensor,
    new_value: Tensor, key_pages: Tensor, key_head: Tensor, value_pages: Tensor,
    value_head: Tensor, attn_mask: Tensor | None, sinks: Tensor | None, causal_offset: int | None,
    keep: int | None, position: Tensor | None, spec: str,
) -> Any:  # fmt: skip
    """The output; ``partial``: and the log-sum-exp."""
    parsed = parse_spec(spec)
    if not sides.can(parsed) or query.dtype != parsed.key.dtype:
        return reference(
            query, new_key, new_value, key_pages, key_head, value_pages, value_head, attn_mask,
            sinks, causal_offset, keep, position, spec,
        )  # fmt: skip
    stored = key_pages, key_head, value_pages, value_head
    check_step(query, new_key, new_value, *stored, attn_mask, sinks, keep, position, parsed)
    keys = _operand(key_pages, key_head, new_key, parsed, "key")
    values = _operand(value_pages, value_head, new_value, parsed, "value")
    if position is not None and position.numel():
        for operand in (keys, values):
            launch.rewind(position.to(query.device), operand, parsed)
    if parsed.rolls:
        for head in (key_head, value_head):
            counted = counters(head)
            evicted = torch.maximum(counted[..., FIRST], counted[..., LENGTH] - parsed.rolls)
            counted[..., FIRST].copy_(evicted)
    output, lse = launch.attend(
        query, keys, values, attn_mask, sinks, causal_offset, parsed, partial
    )
    for operand in (keys, values):
        if keep is None:
            launch.observe(query, operand, parsed)
        else:
            launch.append(query, operand, keep, parsed)
    return (output, lse) if partial else output


def _operand(pages: Tensor, head: Tensor, new: Tensor, spec: Spec, side: Side) -> sides.Operand:
    check_strides(pages, head, side)
    sides.check_room(pages, new, spec, side)
    return sides.operand(pages, head, launch.by_channel(new), spec, side)


EAGER: dict[str, Callable[..., Any]] = {
    "build": _build, "step": _step, "step_partial": _step_partial,
}  # fmt: skip
"""What ``torch.ops.spark.<name>`` calls on a GPU."""


@functools.cache
def register() -> torch.library.Library:
    """Put the kernels behind ``torch.ops.spark`` for CUDA tensors."""
    library = torch.library.Library("spark", "IMPL")
    for name, function in EAGER.items():
        library.impl(name, _on_its_device(function), "CUDA")
    return library


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton starts kernels on the current device; a tensor may be on another."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with torch.cuda.device(args[0].device):
            return function(*args)

    return call
