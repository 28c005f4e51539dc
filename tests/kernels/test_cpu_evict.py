"""Caches of evicted prompts: the native CPU kernels against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from draws import masks, output_or_error, rows, thorough
from hypothesis import given
from hypothesis import strategies as st
from stores import Cache, assert_close, assert_same, format_of
from torch import Tensor

from spark_compile import ops
from spark_compile.kernels import cpu, layout
from spark_compile.kernels.eviction import parse_scorer
from spark_compile.kernels.layout import DROPPED, LENGTH, PACKED
from spark_compile.kernels.reference.evict import take
from spark_compile.kernels.reference.operators import step
from spark_compile.kernels.reference.store import ALL, Store
from spark_compile.kernels.spec import Spec

pytestmark = pytest.mark.skipif(not cpu.load(), reason="there are no native kernels here")

reference = torch.ops.spark_reference
FORMATS = ("spark", "spark-int8", "dense", "int8", "pruned", "pruned-int8")


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    dim = draw(st.sampled_from([1, 3, 8, 16, 20, 32, 64, 128]))
    value_dim = draw(st.sampled_from([dim, 5, 64]))
    formats = (
        format_of(draw(st.sampled_from(FORMATS)), dim, dtype, draw(st.integers(1, dim))),
        format_of(draw(st.sampled_from(FORMATS[2:])), value_dim, dtype),
    )
    window, recent = draw(st.sampled_from([1, 3, 8, 32, 33])), draw(st.sampled_from([0, 5, 32]))
    sinks = draw(st.sampled_from([0, 3]))
    tokens = sinks + recent + window + draw(st.integers(0, 100))
    scorer = draw(st.sampled_from(["knorm(tokens={})", "snapkv(tokens={},window=1)"]))
    evict = parse_scorer(scorer.format(tokens))
    return Spec(*formats, window, recent, sinks, scale=0.4, softcap=draw(st.sampled_from([0.0, 3])),
                evict=evict)  # fmt: skip


@st.composite
def caches(draw: st.DrawFn) -> tuple[Cache, int]:
    """A cache that native code has built, as the reference does, and the number of query heads."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    spec = draw(specs())
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 3), (3, 1), (2, 4)]))
    assert spec.evict is not None
    tokens = spec.evict.tokens + draw(st.sampled_from([0, 1, 40, 300]))
    query = rows(draw, kv_heads * group, draw(st.sampled_from([1, 5])), spec.key)
    key, value = (rows(draw, kv_heads, tokens, f) for f in (spec.key, spec.value))
    kept = ops.evict(key, [query], None, 0, spec.text)
    given_ = (take(key, kept), take(value, kept), [query], spec.text,
              draw(st.sampled_from([None, tokens + 300])), kept)  # fmt: skip
    actual, expected = (Cache(spec, *b(*given_)) for b in (ops.build, reference.build))
    assert_same(actual, expected)
    return expected, kv_heads * group


def logical(cache: Cache) -> int:
    return cache.count(LENGTH) + cache.count(DROPPED)


def one_step(draw: st.DrawFn, cache: Cache, query_heads: int) -> tuple[Any, ...]:
    spec, kv_heads, length = cache.spec, cache.key_head.shape[1], logical(cache)
    count = draw(st.sampled_from([1, 1, 1, 2, 5, 40]))
    queries = draw(st.sampled_from([count, count, 4]))
    query = rows(draw, query_heads, queries, spec.key)
    new = [rows(draw, kv_heads, count, f) for f in (spec.key, spec.value)]
    position, start = None, length
    if draw(st.integers(0, 3)) == 0:
        dense = cache.count(PACKED) + spec.sinks + cache.count(DROPPED)
        start = draw(st.sampled_from([length, min(dense, length), min(dense + 2, length), 0, 5]))
        position = torch.arange(min(start, length), min(start, length) + count)
        start = min(start, length)
    mask = masks(draw, query, start + count)
    offsets = [None, start + count - queries, cache.count(DROPPED), start // 2, -1, 10**12]
    return (query, *new), (mask, None, draw(st.sampled_from(offsets)), ALL, position, spec.text)


# A rewind to 5 in front of a page's end is the reference's, as without a scorer.
@pytest.mark.filterwarnings("ignore:no native kernel")
@thorough
@given(st.data())
def test_steps(data: st.DataObject) -> None:
    expected, query_heads = data.draw(caches())
    for _ in range(data.draw(st.integers(1, 4))):
        expected.poison()
        actual = expected.clone()
        before, after = one_step(data.draw, expected, query_heads)
        mine, theirs = (
            output_or_error(operator, before, cache, after)
            for operator, cache in ((ops.step, actual), (reference.step, expected))
        )
        if isinstance(theirs, str):
            assert mine == theirs
            continue
        assert_close(mine, theirs, expected.spec.key.dtype)
        assert_same(actual, expected)


def small(scorer: str = "knorm(tokens=17)", **numbers: int) -> Spec:
    formats = (format_of("spark", 16, torch.float32), format_of("dense", 16, torch.float32))
    numbers = {"window": 4, "recent": 3, **numbers}
    return Spec(*formats, **numbers, scale=0.3, evict=parse_scorer(scorer))


def tokens(count: int, heads: int = 2) -> Tensor:
    return torch.randn(2, heads, count, 16)


@pytest.mark.filterwarnings("error:no native kernel")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [None, 0, 30])
def test_nothing_is_slow(masked: bool, offset: int | None) -> None:
    """The prompt as a step of an empty cache, a token, a chunk, and the next prompt."""
    spec = small("snapkv(tokens=17,window=5)", sinks=2)
    built = Cache(spec, *ops.build(tokens(0), tokens(0), [], spec.text, 90))
    caches = [built, built.clone()]
    start = 0
    for count, position in ((30, [0]), (1, [30]), (9, None), (1, [40]), (25, [0])):
        start = start if position is None else position[0]
        query, key, value = tokens(count, 4), tokens(count), tokens(count)
        at = None if position is None else torch.tensor(position)
        mask = torch.rand(2, 1, count, 90) < 0.8 if masked else None
        after = mask, None, offset, ALL, at, spec.text
        mine = ops.step(query, key, value, *caches[0].tensors, *after)
        theirs = by_reference(query, key, value, caches[1], after)
        assert_close(mine, theirs, torch.float32)
        assert_same(*caches)
        start += count
    assert caches[0].count(DROPPED) == 8


def by_reference(query: Tensor, key: Tensor, value: Tensor, cache: Cache, after: Any) -> Tensor:
    """The reference without the warning that ``spark_reference`` gives."""
    keys, values = (Store(pages, head, cache.spec, side) for side, pages, head in cache.sides())
    return step(query, key, value, keys, values, *after[:-1])


def test_positions_of_no_prompt_are_refused() -> None:
    spec = small()
    kept = ops.evict(tokens(30), [], None, 0, spec.text)
    kept[0, 0, 3] = kept[0, 0, 4]
    with pytest.raises(ValueError, match="allowed are those of spark::evict"):
        ops.build(tokens(17), tokens(17), [], spec.text, None, kept)
    with pytest.raises(ValueError, match=r"positions is torch.int32"):
        ops.build(tokens(17), tokens(17), [], spec.text, None, kept.int())


def test_a_damaged_position_leads_nowhere() -> None:
    """Where `make sanitize` sees what is read."""
    spec = small()
    kept = ops.evict(tokens(30), [], None, 0, spec.text)
    cache = Cache(spec, *ops.build(tokens(17), tokens(17), [], spec.text, None, kept))
    spec.pages("key").views(cache.key_pages)["position"].fill_(-5)
    mask = torch.rand(2, 4, 1, 31)
    output = ops.step(tokens(1, 4), tokens(1), tokens(1), *cache.tensors, mask, None, None, ALL,
                      None, spec.text)  # fmt: skip
    assert output.isfinite().all()
    assert layout.counters(cache.key_head)[0, 0, DROPPED] == 13
