"""The portable operators, run as they are, against the reference: same bytes, same outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from stores import Cache, assert_close, assert_same, format_of
from torch import Tensor

from spark_compile.kernels.eviction import parse_scorer
from spark_compile.kernels.formats import parse
from spark_compile.kernels.reference import operators as reference
from spark_compile.kernels.reference import portable
from spark_compile.kernels.reference.store import ALL, Store
from spark_compile.kernels.spec import Spec

BATCH, HEADS, QUERY_HEADS, DIM, CAPACITY = 2, 2, 4, 8, 100
PORTABLE = [
    "dense", "int8", "quantized-6", "quantized-4", "quantized-plain-4", "quantized-scaled-4-2-2-1",
    "spark", "spark-int8", "pruned", "pruned-int8",
]  # fmt: skip
RHYTHMS = [
    {"window": 4, "recent": 3},
    {"window": 4, "recent": 0, "sinks": 2},
    {"window": 4, "recent": 1, "sinks": 1, "min_tokens": 15},
    {"window": 1, "recent": 1},
]


def spec_of(name: str, dtype: torch.dtype = torch.float32, **numbers: int) -> Spec:
    format = format_of(name, DIM, dtype)
    return Spec(format, format, **{"window": 4, "recent": 3, **numbers}).attending(0.3, 5.0)


def rows(heads: int, tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(BATCH, heads, tokens, DIM, dtype=dtype)


def built(spec: Spec, tokens: int) -> tuple[Cache, Cache]:
    """A prompt stored by the reference and by the portable operator."""
    key, value = rows(HEADS, tokens, spec.key.dtype), rows(HEADS, tokens, spec.value.dtype)
    queries = [rows(QUERY_HEADS, tokens), rows(QUERY_HEADS, max(tokens - 1, 1))]
    sides = reference.build(key, value, queries, spec, CAPACITY)
    expected = Cache(spec, sides[0].pages, sides[0].head, sides[1].pages, sides[1].head)
    actual = Cache(spec, *portable.build(key, value, queries, spec.text, CAPACITY))
    return expected, actual


def stepped(
    expected: Cache, actual: Cache, position: int | None, tokens: int = 1, *,
    mask: Tensor | None = None, sinks: Tensor | None = None, causal_offset: int | None = None,
    keep: int | None = ALL, queries: int = 1,
) -> None:  # fmt: skip
    """The same step by both; outputs and bytes have to agree."""
    spec, dtype = expected.spec, expected.spec.key.dtype
    query = rows(QUERY_HEADS, queries if tokens == 1 else tokens, dtype)
    new = rows(HEADS, tokens, dtype), rows(HEADS, tokens, dtype)
    at = None if position is None else torch.arange(position, position + tokens)
    keys = Store(expected.key_pages, expected.key_head, spec, "key")
    values = Store(expected.value_pages, expected.value_head, spec, "value")
    wanted = reference.step(query, *new, keys, values, mask, sinks, causal_offset, keep, at)
    output = portable.step(
        query, *new, *actual.tensors, mask, sinks, causal_offset, keep, at, spec.text
    )
    assert_close(output, wanted, dtype)
    assert_same(actual, expected)


@pytest.mark.parametrize("rhythm", range(len(RHYTHMS)))
@pytest.mark.parametrize("name", PORTABLE)
def test_prompts_of_lengths_around_the_ends_of_pages(name: str, rhythm: int) -> None:
    spec = spec_of(name, **RHYTHMS[rhythm])
    for tokens in (1, 2, 3, 5, 6, 7, 8, 14, 15, 16):
        expected, actual = built(spec, tokens)
        assert_same(actual, expected)
        for mine, other in zip(actual.tensors, expected.tensors, strict=True):
            assert mine.shape == other.shape


@pytest.mark.parametrize("name", PORTABLE)
def test_seventy_steps(name: str) -> None:
    """What means nothing is NaN: it may not be read."""
    dtype = torch.bfloat16 if "int8" in name else torch.float32
    expected, actual = built(spec_of(name, dtype, sinks=2), 9)
    for position in range(9, 79):
        actual.poison()
        mask = torch.rand(BATCH, 1, 1, CAPACITY) > 0.3
        stepped(expected, actual, position, mask=mask)


@pytest.mark.parametrize("rhythm", RHYTHMS)
def test_from_the_first_token(rhythm: dict[str, int]) -> None:
    expected, actual = built(spec_of("quantized-scaled-4", **rhythm), 1)
    for position in range(1, 20):
        actual.poison()
        stepped(expected, actual, None if position % 2 else position)


@pytest.mark.parametrize("rhythm", RHYTHMS)
@pytest.mark.parametrize("name", ["dense", "spark-int8"])
def test_rewinding(name: str, rhythm: dict[str, int]) -> None:
    for position in (0, 1, 3, 6, 9, 20):
        expected, actual = built(spec_of(name, **rhythm), 21)
        stepped(expected, actual, position, keep=None)
        for more in range(7):
            stepped(expected, actual, position + more)


@pytest.mark.parametrize("tokens", [2, 7, 13])
@pytest.mark.parametrize("name", ["int8", "spark"])
def test_a_prompt_that_is_a_step(name: str, tokens: int) -> None:
    """It replaces what is in the cache, as for models that read a prompt from their buffers."""
    expected, actual = built(spec_of(name, sinks=1), 21)
    hidden = torch.ones(tokens, CAPACITY).triu(1) * -1e4
    stepped(expected, actual, 0, tokens, mask=hidden)
    stepped(expected, actual, tokens)


@pytest.mark.parametrize(
    "how",
    [
        {"mask": torch.randn(BATCH, QUERY_HEADS, 1, CAPACITY)},
        {"mask": torch.ones(1, dtype=torch.bool)},
        {"mask": torch.zeros(())},
        {"mask": torch.randn(13).bfloat16()},
        {"causal_offset": 4},
        {"causal_offset": 8, "mask": torch.rand(1, 1, 2, CAPACITY) > 0.5, "queries": 2},
        {"sinks": torch.randn(QUERY_HEADS)},
        {"keep": None},
    ],
)
def test_ways_to_attend(how: dict[str, Any]) -> None:
    expected, actual = built(spec_of("quantized-scaled-4", sinks=2), 12)
    stepped(expected, actual, 12, **how)


@pytest.mark.parametrize(
    "text",
    ["think(kept=4)", "spark-g(kept=4)", "spark-g(kept=3,counts=all)", "spark-tight(kept=4)",
     "spark(kept=4,recovery=gaussian)", "spark(kept=4,recovery=exponential)"],
)  # fmt: skip
def test_other_formats(text: str) -> None:
    format = parse(text, DIM, torch.float32)
    expected, actual = built(Spec(format, format, window=4, recent=1), 9)
    for position in range(9, 15):
        stepped(expected, actual, position)


def test_a_wrong_position_fails_before_anything_is_written() -> None:
    _, cache = built(spec_of("dense"), 9)
    before = cache.clone()
    new = rows(HEADS, 1)
    for position, count in ((10, 1), (-1, 1), (1, 2)):
        new = rows(HEADS, count)
        with pytest.raises(RuntimeError, match="the position is after a gap"):
            portable.step(
                rows(QUERY_HEADS, count), new, new, *cache.tensors, None, None, None, ALL,
                torch.tensor([position]), cache.spec.text,
            )  # fmt: skip
    assert all(map(torch.equal, cache.tensors, before.tensors))


def test_a_full_cache_fails_before_anything_is_written() -> None:
    spec = spec_of("dense", recent=0)
    key = rows(HEADS, 4)
    stored = portable.build(key, key, [], spec.text, 4)
    new = rows(HEADS, 1)

    def append(position: int) -> None:
        portable.step(
            rows(QUERY_HEADS, 1), new, new, *stored, None, None, None, ALL,
            torch.tensor([position]), spec.text,
        )  # fmt: skip

    for position in range(4, 11):
        append(position)
    before = [tensor.clone() for tensor in stored]
    with pytest.raises(RuntimeError, match="no room"):
        append(11)  # a third page
    assert all(map(torch.equal, stored, before))


def test_refusals() -> None:
    spec, key = spec_of("dense"), rows(HEADS, 6)
    with pytest.raises(portable.NotPortableError, match="a cache that grows is not portable"):
        portable.build(key, key, [], spec.text, None)
    scorer = parse_scorer("streamingllm(tokens=16)")
    with pytest.raises(portable.NotPortableError, match="the scorer streamingllm"):
        portable.build(key, key, [], replace(spec, evict=scorer).text, CAPACITY)
    with pytest.raises(RuntimeError, match="6 tokens do not fit into 5"):
        portable.build(key, key, [], spec.text, 5)
    _, cache = built(spec, 9)
    new = rows(HEADS, 1)
    for keep, text in ((20, spec.text), (ALL, replace(spec, rolls=20).text)):
        with pytest.raises(portable.NotPortableError, match="is not portable: allowed is"):
            portable.step(
                rows(QUERY_HEADS, 1), new, new, *cache.tensors, None, None, None, keep, None, text
            )
