"""Cache sides of every format for tests of the kernels: garbage in unused bytes, and comparing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from quantized_stores import assert_same_tokens, same_constants
from torch import Tensor

from spark_compile.kernels import layout
from spark_compile.kernels.formats import Dense, Format, Int8, Pruned, Quantized, Spark
from spark_compile.kernels.layout import FIRST, LENGTH, PACKED, STEP
from spark_compile.kernels.spec import Side, Spec

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest error relative to the largest number, by dtype."""

ROUNDED = ("amplitude", "fill")
"""Fields of a token whose last bit depends on the order of a sum."""


def format_of(name: str, head_dim: int, dtype: torch.dtype, kept: int = 5) -> Format:
    """A format with ``kept`` of the channels, or all there are: dense, int8, spark, spark-int8,
    spark-absolute, spark-none, pruned, pruned-int8, or quantized with its bits: quantized-4,
    quantized-scaled-4-2-2-1, quantized-plain-2 (not rotated)."""
    kept, (name, _, option) = min(kept, head_dim), name.partition("-")
    if name == "quantized":
        kind, _, bits = option.partition("-") if option[0].isalpha() else ("", "", option)
        words = bits.split("-")
        bits = bits if head_dim % len(words) == 0 else words[0]
        return Quantized(head_dim, dtype, bits, kind == "scaled", kind != "plain")
    if name in ("dense", "int8"):
        return {"dense": Dense, "int8": Int8}[name](head_dim, dtype)
    stored = "int8" if option == "int8" else "model"
    if name == "pruned":
        return Pruned(head_dim, dtype, kept, stored)
    saliency = "absolute" if option == "absolute" else "squared"
    recovery = "none" if option == "none" else "degenerate"
    return Spark(head_dim, dtype, kept, stored, recovery, saliency)


@dataclass(frozen=True)
class Cache:
    """``pages`` and ``head`` of the keys, then of the values, and what is in them."""

    spec: Spec
    key_pages: Tensor
    key_head: Tensor
    value_pages: Tensor
    value_head: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.key_pages, self.key_head, self.value_pages, self.value_head

    def clone(self) -> Cache:
        return Cache(self.spec, *(tensor.clone() for tensor in self.tensors))

    def copy_(self, other: Cache) -> None:
        """Take over what is stored in another one of the same shapes."""
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine.copy_(theirs)

    def count(self, counter: int) -> int:
        return int(layout.counters(self.key_head)[0, 0, counter])

    @property
    def visible(self) -> int:
        return self.count(LENGTH) - self.count(FIRST)

    def sides(self) -> Iterator[tuple[Side, Tensor, Tensor]]:
        yield "key", self.key_pages, self.key_head
        yield "value", self.value_pages, self.value_head

    def live_slots(self, slots: int) -> list[int]:
        """Slots of the pages that have visible tokens, the oldest first."""
        window, packed = self.spec.window, self.count(PACKED)
        first = min(self.count(FIRST), packed) // window
        return [page % slots for page in range(first, packed // window)]

    def poison(self, byte: int = 255) -> None:
        """Fill all bytes that mean nothing; 255 makes NaN of them."""
        dense, step = self.count(LENGTH) - self.count(PACKED), self.count(STEP)
        for side, pages, head in self.sides():
            live = torch.zeros(pages.shape[2], dtype=torch.bool)
            live[self.live_slots(pages.shape[2])] = True
            pages[:, :, ~live] = byte
            pages[..., ~_used(self.spec, side)] = byte
            of_head = self.spec.head(side)
            of_head.tail(head)[:, :, dense:].view(torch.uint8).fill_(byte)
            stats = of_head.stats(head)
            if stats is not None:
                stats[:, :, (step + 1) % 2].view(torch.uint8).fill_(byte)


def _used(spec: Spec, side: Side) -> Tensor:
    """Which bytes of a page belong to a field."""
    page_bytes = spec.pages(side).page_bytes
    page = torch.zeros(1, 1, 1, page_bytes, dtype=torch.uint8)
    for field in spec.pages(side).views(page).values():
        field.view(torch.uint8).fill_(1)
    return page.flatten().bool()


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Raise unless two tensors agree to the precision of a dtype."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return
    assert torch.equal(actual.isfinite(), expected.isfinite())
    actual, expected = (t.float().nan_to_num(0, 0, 0) for t in (actual, expected))
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert error <= TOLERANCE[dtype], f"error {error:.2e}, allowed {TOLERANCE[dtype]:.0e}"


def assert_same(actual: Cache, expected: Cache) -> None:
    """Raise unless two caches hold the same: equal bytes, but for the rounding of sums.

    Norms and biases that differ in their last bit may choose another channel where two are equally
    salient: one token in 500 may.
    """
    for (side, pages, head), (_, other_pages, other_head) in zip(
        actual.sides(), expected.sides(), strict=True
    ):
        spec = expected.spec
        assert torch.equal(layout.counters(head), layout.counters(other_head))
        dense = expected.count(LENGTH) - expected.count(PACKED)
        tails = (spec.head(side).tail(h)[:, :, :dense] for h in (head, other_head))
        torch.testing.assert_close(*tails, rtol=0, atol=0)
        same = _same_heads(spec, side, head, other_head, expected)
        slots = expected.live_slots(other_pages.shape[2])
        of_pages, format = spec.pages(side), spec.format(side)
        fields, others = of_pages.views(pages), of_pages.views(other_pages)
        if isinstance(format, Quantized):
            live, other_live = (
                {name: field[:, :, slots] for name, field in f.items()} for f in (fields, others)
            )
            assert_same_tokens(format, live, other_live, same)
            continue
        differ = torch.zeros(*pages.shape[:2], len(slots), spec.window, dtype=torch.bool)
        for name, field in fields.items():
            mine, theirs = field[:, :, slots], others[name][:, :, slots]
            if name not in ROUNDED:
                differ |= (mine != theirs).any(-1)
        assert differ.sum() <= max(1, differ.numel() // 500) * bool(differ.numel())
        for name in ROUNDED:
            if name in fields:
                mine, theirs = (f[name][:, :, slots][~differ] for f in (fields, others))
                torch.testing.assert_close(mine, theirs)


def _same_heads(spec: Spec, side: Side, head: Tensor, other: Tensor, expected: Cache) -> Tensor:
    """Which heads [B, Hkv] have equal constants, but for the last bits of float32; raises where
    constants or statistics differ by more than rounding."""
    of_head, same = spec.head(side), torch.ones(head.shape[:2], dtype=torch.bool)
    stats, other_stats = of_head.stats(head), of_head.stats(other)
    if stats is not None and other_stats is not None:
        torch.testing.assert_close(stats, other_stats, equal_nan=True)
    constants, others = of_head.constants(head), of_head.constants(other)
    if not expected.count(PACKED) or not constants:
        return same
    if isinstance(spec.format(side), Quantized):
        return same_constants(constants, others)
    for name, constant in constants.items():
        torch.testing.assert_close(constant, others[name])
    return same


def with_room(rows: Tensor, room: int, poison: float) -> Tensor:
    """Rows [B, H, S, ...] with ``room`` more, full of ``poison`` (the largest integer for NaN)."""
    unused = rows.new_empty((*rows.shape[:2], room, *rows.shape[3:]))
    unused.fill_(poison if rows.is_floating_point() else torch.iinfo(rows.dtype).max)
    return torch.cat((rows, unused), dim=2)
