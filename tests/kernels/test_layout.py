"""Where the fields lie: every byte has one owner, and the views are those bytes and no others."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spark_compile.kernels.formats import Field, Format, parse
from spark_compile.kernels.layout import (
    ALIGNMENT,
    COUNTERS,
    HeadLayout,
    PageLayout,
    counters,
    typed,
)

FIELD_DTYPES = (torch.uint8, torch.int8, torch.float16, torch.float32, torch.int64)


@dataclass(frozen=True)
class Declared(Format):
    """A format that is nothing but fields."""

    declared: tuple[Field, ...] = ()
    queries: bool = False

    NAME = "declared"

    @property
    def uses_queries(self) -> bool:
        return self.queries

    def fields(self) -> tuple[Field, ...]:
        return self.declared

    def encode(self, rows: Tensor, norms: Any, constants: Any) -> dict[str, Tensor]:
        raise NotImplementedError

    def decode(self, stored: Any, constants: Any, first: int = 0) -> Tensor:
        raise NotImplementedError


del Format.KNOWN["declared"]  # options shall not offer it

FIELDS = st.lists(
    st.tuples(
        st.sampled_from(FIELD_DTYPES),
        st.integers(1, 9),
        st.sampled_from(["token", "token", "page", "head"]),
    ),
    min_size=1,
    max_size=6,
)


def declared(fields: list[tuple[torch.dtype, int, Any]], *, queries: bool = False) -> Declared:
    named = (Field(f"f{i}", dtype, width, per) for i, (dtype, width, per) in enumerate(fields))
    return Declared(7, torch.float16, tuple(named), queries)


def claim(owners: Tensor, view: Tensor, name: str) -> None:
    """Note that a view's bytes are its own; fails if they have an owner."""
    offset, base = view.storage_offset() * view.element_size(), owners.flatten()
    assert offset % view.element_size() == 0
    strides = [stride * view.element_size() for stride in view.stride()]
    at = torch.tensor(offset)
    for size, stride in zip((*view.shape, view.element_size()), (*strides, 1), strict=True):
        at = at.unsqueeze(-1) + torch.arange(size) * stride
    at = at.flatten()
    assert not base[at].any(), f"{name} lies on another field"
    base[at] = 1


@given(FIELDS, st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_no_byte_of_a_page_has_two_owners(fields: Any, tokens: int) -> None:
    format = declared(fields)
    layout = PageLayout(format, tokens)
    pages = torch.zeros(2, 3, 4, layout.page_bytes, dtype=torch.uint8)
    owners, total = torch.zeros(pages.numel(), dtype=torch.uint8), 0
    views = layout.views(pages)
    stored = [field for field in format.declared if field.per != "head"]
    assert set(views) == {field.name for field in stored}
    for field in stored:
        view, per_token = views[field.name], field.per == "token"
        assert view.shape == (2, 3, 4, *((tokens,) if per_token else ()), field.width)
        assert view.dtype == field.dtype
        claim(owners, view, field.name)
        total += field.nbytes * (tokens if per_token else 1)
    assert owners.sum() == 2 * 3 * 4 * total
    padding = layout.page_bytes - total
    assert 0 <= padding < (len(stored) + 1) * ALIGNMENT
    assert layout.page_bytes % 8 == 0


@given(FIELDS, st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_every_field_is_found_at_its_offset(fields: Any, tokens: int) -> None:
    format = declared(fields)
    layout = PageLayout(format, tokens)
    pages = torch.randint(256, (1, 1, 2, layout.page_bytes), dtype=torch.uint8)
    views = layout.views(pages)
    for field in format.declared:
        if field.per == "head":
            continue
        size = field.nbytes * (tokens if field.per == "token" else 1)
        assert layout.offsets[field.name] % math.gcd(size, ALIGNMENT) == 0
        for page in range(2):
            for token in range(tokens if field.per == "token" else 1):
                first = layout.offsets[field.name] + token * field.nbytes
                raw = pages[0, 0, page, first : first + field.nbytes]
                view = views[field.name][0, 0, page]
                own = view[token] if field.per == "token" else view
                assert own.contiguous().view(torch.uint8).tolist() == raw.tolist()


@given(FIELDS, st.integers(0, 6), st.booleans())
@settings(max_examples=100, deadline=None)
def test_no_byte_of_a_head_has_two_owners(fields: Any, rows: int, queries: bool) -> None:
    format = declared(fields, queries=queries)
    layout = HeadLayout(format)
    size = int(layout.head_bytes(rows))
    head = torch.zeros(2, 3, size, dtype=torch.uint8)
    owners = torch.zeros(head.numel(), dtype=torch.uint8)
    assert counters(head).shape == (2, 3, COUNTERS)
    claim(owners, counters(head), "counters")
    constants, stats, tail = layout.constants(head), layout.stats(head), layout.tail(head)
    own = [field for field in format.declared if field.per == "head"]
    assert set(constants) == {field.name for field in own}
    for field in own:
        assert constants[field.name].shape == (2, 3, field.width)
        claim(owners, constants[field.name], field.name)
    assert (stats is not None) == queries
    if stats is not None:
        assert (stats.shape, stats.dtype) == ((2, 3, 2, 7), torch.float32)
        claim(owners, stats, "stats")
    assert tail.shape[2] == layout.tail_rows(head)
    assert rows <= tail.shape[2] <= rows + 7 // layout.row_bytes
    assert (tail.shape[3], tail.dtype) == (7, torch.float16)
    claim(owners, tail, "tail")
    declared_bytes = 8 * COUNTERS + sum(field.nbytes for field in own)
    declared_bytes += 2 * 7 * 4 if queries else 0
    assert owners.sum() == 2 * 3 * (declared_bytes + tail[0, 0].nbytes)
    assert (
        declared_bytes <= layout.offsets["tail"] < declared_bytes + 8 * (len(own) + 2) + ALIGNMENT
    )
    assert size % 8 == 0


EXPECTED = [
    ("dense", 8, {"rows": 0}, 16, 64),
    ("int8", 8, {"step": 0, "levels": 16}, 10, 48),
    ("quantized(bits=4-2-2-1,scaled=True)", 16, {"amplitude": 0, "codes": 12}, 8, 32),
    ("spark(kept=5)", 12, {"amplitude": 0, "channels": 8, "keep": 48, "negative": 56}, 16, 64),
    ("spark(kept=5,stored=int8,recovery=gaussian)", 12,
     {"amplitude": 0, "step": 16, "channels": 24, "keep": 48, "negative": 56}, 15, 64),
    ("pruned(kept=3)", 8, {"fill": 0, "channels": 8, "keep": 32}, 9, 40),
    ("pruned(kept=3,stored=int8)", 8, {"fill": 0, "step": 8, "channels": 16, "keep": 28}, 8, 32),
]  # fmt: skip


@pytest.mark.parametrize(("text", "dim", "offsets", "token_bytes", "page_bytes"), EXPECTED)
def test_the_layout_of_each_format(
    text: str, dim: int, offsets: dict[str, int], token_bytes: int, page_bytes: int
) -> None:
    """What files and native kernels rely on."""
    layout = PageLayout(parse(text, dim, torch.bfloat16), 4)
    assert layout.offsets == offsets
    assert (layout.token_bytes, layout.page_bytes) == (token_bytes, page_bytes)


def test_fields_per_page_follow_those_per_token() -> None:
    fields = [
        (torch.int8, 3, "token"), (torch.float32, 1, "page"), (torch.float16, 1, "token"),
        (torch.uint8, 1, "page"),
    ]  # fmt: skip
    layout = PageLayout(declared(fields), 3)
    assert layout.offsets == {"f0": 0, "f2": 10, "f1": 16, "f3": 20}
    assert (layout.token_bytes, layout.page_bytes) == (5, 24)


def test_the_head_has_counters_constants_statistics_and_the_tail() -> None:
    layout = HeadLayout(parse("spark(kept=5)", 10, torch.bfloat16))
    assert layout.offsets == {"norms": 40, "stats": 80, "tail": 160}
    assert layout.head_bytes(3) == 160 + 64
    assert HeadLayout(parse("dense", 10, torch.bfloat16)).offsets == {"tail": 48}


def test_views_write_through() -> None:
    layout = PageLayout(parse("int8", 5, torch.float16), 2)
    pages = torch.zeros(1, 1, 3, layout.page_bytes, dtype=torch.uint8)
    layout.views(pages)["levels"][0, 0, 1] = 7
    written = pages[0, 0].nonzero().tolist()
    assert written == [[1, 4 + level] for level in range(10)]
    field = Field("x", torch.int16, 2)
    assert typed(torch.arange(8, dtype=torch.uint8), 2, field).tolist() == [0x0302, 0x0504]


def test_fields_are_values() -> None:
    field = Field("x", torch.float32, 3)
    assert (field.nbytes, field.per) == (12, "token")
    with pytest.raises(dataclasses.FrozenInstanceError):
        field.width = 4  # type: ignore[misc]
