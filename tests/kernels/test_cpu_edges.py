"""What few caches have, and a damaged one may: the native CPU kernels do as the reference does."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from stores import Cache, assert_close, assert_same, format_of
from torch import Tensor

from spark_compile import ops, spread_ops
from spark_compile.kernels import cpu, layout
from spark_compile.kernels.layout import FIRST, LENGTH, PACKED, STEP
from spark_compile.kernels.reference.store import ALL
from spark_compile.kernels.spec import Spec
from spark_compile.report import forget_warnings

pytestmark = [
    pytest.mark.skipif(not cpu.load(), reason="there are no native kernels here"),
    pytest.mark.filterwarnings("ignore:no native kernel"),
]

reference = torch.ops.spark_reference
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANTIZED = (
    "quantized-1", "quantized-3", "quantized-4", "quantized-6", "quantized-plain-4",
    "quantized-scaled-4", "quantized-scaled-4-2-2-1", "quantized-scaled-5",
)  # fmt: skip
FORMATS = (
    "spark", "spark-int8", "spark-none", "dense", "int8", "pruned", "pruned-int8", *QUANTIZED,
)  # fmt: skip
Tokens = tuple[Tensor, Tensor, Tensor]


def spec_of(keys: str, values: str, dtype: torch.dtype, dim: int = 16, **numbers: Any) -> Spec:
    formats = (format_of(name, dim, dtype, max(dim // 2, 1)) for name in (keys, values))
    return Spec(*formats, **{"window": 8, "recent": 4, "scale": 0.4, **numbers})


def tokens_of(spec: Spec, count: int, batch: int = 2) -> Tokens:
    """Queries of four heads, keys and values of two."""
    sizes = (4, spec.key), (2, spec.key), (2, spec.value)
    query, key, value = (
        torch.randn(batch, heads, count, f.head_dim).to(f.dtype) for heads, f in sizes
    )
    return query, key, value


def check_build(spec: Spec, prompt: Tokens, capacity: int | None = None) -> Cache:
    """Both operators build the same of a prompt."""
    query, *rows = prompt
    actual, expected = (
        Cache(spec, *operator(*rows, [query], spec.text, capacity))
        for operator in (ops.build, reference.build)
    )
    assert_same(actual, expected)
    return expected


def check_step(cache: Cache, new: Tokens, *rest: Any) -> Tensor:
    """All operators make the same of a step, which ``cache`` is changed by; returns the output."""
    rest = rest or (None, None, None, ALL, None)
    actual, of_part = cache.clone(), cache.clone()
    output = ops.step(*new, *actual.tensors, *rest, cache.spec.text)
    part, lse = spread_ops.step_partial(*new, *of_part.tensors, *rest, cache.spec.text)
    expected: Tensor
    expected, expected_lse = reference.step_partial(*new, *cache.tensors, *rest, cache.spec.text)
    assert_close(output, expected, cache.spec.key.dtype)
    assert torch.equal(part, output)
    assert_close(lse, expected_lse, cache.spec.key.dtype)
    for each in (actual, of_part):
        assert_same(each, cache)
    return expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", range(1, 9))
def test_small_heads(dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(dim)
    for name in FORMATS:
        spec = spec_of(name, name, dtype, dim)
        cache = check_build(spec, tokens_of(spec, 40), 60)
        for count in (1, 3, 9):
            check_step(cache, tokens_of(spec, count))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prompt", [0, 1, 7])
def test_prompts_shorter_than_a_page(prompt: int, dtype: torch.dtype) -> None:
    for name in FORMATS:
        spec = spec_of(name, "int8", dtype, sinks=2)
        cache = check_build(spec, tokens_of(spec, prompt), 40)
        for count in (1, 1, 17):
            check_step(cache, tokens_of(spec, count))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_batch_entries(dtype: torch.dtype) -> None:
    for name in FORMATS:
        spec = spec_of(name, "int8", dtype)
        query, *rows = tokens_of(spec, 40, batch=0)
        built = ops.build(*rows, [query], spec.text, None)
        expected = reference.build(*rows, [query], spec.text, None)
        assert [t.shape for t in built] == [t.shape for t in expected]
        output = ops.step(
            *tokens_of(spec, 3, batch=0), *built, None, None, None, ALL, None, spec.text
        )
        assert output.shape == (0, 4, 3, 16)
        assert output.dtype == dtype


@pytest.mark.parametrize("keep", [None, ALL, 30])
@pytest.mark.parametrize("position", [None, [], [40], [38]])
def test_no_new_tokens(keep: int | None, position: list[int] | None) -> None:
    dtype = torch.float32
    for name in FORMATS:
        spec = spec_of(name, "int8", dtype)
        cache = check_build(spec, tokens_of(spec, 40))
        at = None if position is None else torch.tensor(position, dtype=torch.int64)
        output = check_step(cache, tokens_of(spec, 0), None, None, None, keep, at)
        assert output.shape == (2, 4, 0, 16)
        new = tokens_of(spec, 5)  # queries without tokens of their own
        check_step(cache, (new[0], *tokens_of(spec, 0)[1:]), None, None, None, keep, None)


NOT_FINITE = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("what", NOT_FINITE)
@pytest.mark.parametrize("where", ["a key", "a value", "a query", "a new key"])
def test_numbers_that_are_not_finite(where: str, what: float) -> None:
    """Each dtype with each pair of formats at each place, with one of the three numbers."""
    pairs = itertools.product(FORMATS, ("dense", "int8", "pruned", "quantized-4"))
    pairs = itertools.chain(pairs, (("dense", name) for name in QUANTIZED))
    for number, (name, values) in enumerate(pairs, NOT_FINITE.index(what)):
        dtype = DTYPES[number % 3]
        spec = spec_of(name, values, dtype)
        prompt, new = tokens_of(spec, 40), tokens_of(spec, 2)
        rows = {"a key": prompt[1], "a value": prompt[2], "a query": new[0]}
        rows.get(where, new[1])[0, 1, 1, 3] = what
        query, *stored = prompt
        builders = (ops.build, reference.build)
        caches = [Cache(spec, *b(*stored, [query], spec.text, None)) for b in builders]
        rest = (None, None, None, None, None, spec.text)
        outputs = [
            operator(*new, *cache.tensors, *rest)
            for operator, cache in zip((ops.step, reference.step), caches, strict=True)
        ]
        assert torch.equal(*(output.isfinite() for output in outputs)), (dtype, name)
        finite = outputs[1].isfinite()
        assert_close(outputs[0][finite], outputs[1][finite], dtype)


PLANES = (("spark", "pruned"), ("spark-int8", "pruned-int8"), ("spark-none", "int8"))


def mark(cache: Cache, bits: int) -> None:
    """Let every packed token say that it keeps these channels."""
    for side, pages, _ in cache.sides():
        fields = cache.spec.pages(side).views(pages)
        if "keep" in fields:
            fields["keep"].fill_(bits)


@pytest.mark.parametrize("bits", [0, 1, 0x55, 0xF0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_planes_that_keep_other_channels_or_none(bits: int, dtype: torch.dtype) -> None:
    for (keys, values), dim in itertools.product(PLANES, (8, 64, 128)):
        spec = spec_of(keys, values, dtype, dim)
        cache = check_build(spec, tokens_of(spec, 60))
        mark(cache, bits)
        check_step(cache, tokens_of(spec, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_planes_that_keep_all_channels(dtype: torch.dtype) -> None:
    for (keys, values), dim in itertools.product(PLANES, (7, 13, 64, 128)):
        formats = (format_of(name, dim, dtype, dim) for name in (keys, values))
        spec = Spec(*formats, 8, 4, scale=0.4)
        check_step(check_build(spec, tokens_of(spec, 60)), tokens_of(spec, 3))
        # Where there is room for half of them, the others are worth anything, in bounds.
        spec = spec_of(keys, values, dtype, dim)
        cache = check_build(spec, tokens_of(spec, 60))
        mark(cache, 255)
        rest = (None, None, None, ALL, None, spec.text)
        output = ops.step(*tokens_of(spec, 3), *cache.tensors, *rest)
        assert output.shape == (2, 4, 3, dim)


@pytest.mark.parametrize("counts", [1, 8, 40])
def test_a_window_that_rolls_under_a_mask(counts: int) -> None:
    """The mask covers what is left of the window and the new tokens."""
    for name in FORMATS:
        spec = spec_of(name, "int8", torch.float32, rolls=39)
        cache = check_build(spec, tokens_of(spec, 40), 40)
        for _ in range(3):
            mask = torch.rand(2, 4, 1, 40) < 0.7
            check_step(cache, tokens_of(spec, 1), mask, None, None, 39, None)
        first = counts + cache.count(FIRST)
        with pytest.raises(ValueError, match="attn_mask is"):
            reference.step(
                *tokens_of(spec, 1), *cache.tensors, mask[..., :39], None, None, 39, None, spec.text
            )
        assert cache.count(FIRST) == first - counts


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_bytes_lead_nowhere(dtype: torch.dtype) -> None:
    """As in a damaged file; under ``make sanitize`` every access outside is seen, too."""
    torch.manual_seed(1)
    edges = [-(2**63), -1, 0, 1, 7, 8, 9, 40, 48, 2**31, 2**40, 2**62, 2**63 - 1]
    raised = ran = 0
    for number in range(300):
        keys, values = (FORMATS[int(torch.randint(len(FORMATS), ()))] for _ in range(2))
        spec = spec_of(keys, values, dtype, (13, 64)[number % 2], rolls=(5, 0, 0)[number % 3])
        query, *rows = tokens_of(spec, 40)
        cache = Cache(spec, *ops.build(*rows, [query], spec.text, None))
        heads = (cache.key_head, cache.value_head)
        counted = layout.counters(cache.key_head).clone()
        for tensor in cache.tensors:
            tensor.random_(0, 256)
        if number % 4:
            for _ in range(number % 3):
                counter = (LENGTH, PACKED, FIRST, STEP)[int(torch.randint(4, ()))]
                counted[..., counter] = edges[int(torch.randint(len(edges), ()))]
            for head in heads:
                layout.counters(head).copy_(counted)
        count = int(torch.randint(0, 20, ()))
        position = torch.randint(-1, 60, (1,)) if number % 5 == 0 else None
        keep = (None, ALL, 10, 0)[number % 4]
        rest = (None, None, int(edges[number % 13]), keep, position, spec.text)
        try:
            output = ops.step(*tokens_of(spec, count), *cache.tensors, *rest)
        except ValueError:
            raised += 1
            continue
        assert output.shape == (2, 4, count, spec.value.head_dim)
        ran += 1
    assert raised > 30
    assert ran > 30


def test_channels_that_do_not_lie_side_by_side_take_no_reference() -> None:
    spec = spec_of("quantized-scaled-4", "quantized-4", torch.bfloat16)

    def across(tokens: Tokens) -> Tokens:
        query, key, value = (rows.mT.contiguous().mT for rows in tokens)
        return query, key, value

    forget_warnings()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "no native kernel")
        query, *rows = across(tokens_of(spec, 60))
        built = Cache(spec, *ops.build(*rows, [query], spec.text, None))
        new = across(tokens_of(spec, 3))
        output = ops.step(*new, *built.clone().tensors, *(None,) * 5, spec.text)
    expected = reference.step(*new, *built.clone().tensors, *(None,) * 5, spec.text)
    assert_close(output, expected, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", ["1", "2", "3", "4", "5", "6", "8-5-3-1"])
def test_quantized_heads_of_every_size(bits: str, dtype: torch.dtype) -> None:
    """The last row of codes ends where the pages do: nothing after it may be read."""
    for dim in (4, 8, 12, 20, 32, 64, 80, 100, 128, 192, 256, 300, 1024):
        spec = spec_of(f"quantized-scaled-{bits}", f"quantized-{bits[0]}", dtype, dim)
        cache = check_build(spec, tokens_of(spec, 77, batch=1), 68)
        assert cache.count(PACKED) == 8 * cache.key_pages.shape[2]
        for count in (1, 3):
            check_step(cache.clone(), tokens_of(spec, count, batch=1), *(None,) * 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [256, 512, 1024])
def test_the_largest_sums_of_products(dim: int, dtype: torch.dtype) -> None:
    """Levels and queries at the ends of their ranges, of one sign: integer sums have 32 bits."""
    spec = spec_of("int8", "int8", dtype, dim, scale=1 / dim)
    query, key, value = tokens_of(spec, 60)
    tokens = query.fill_(1), key.fill_(-1), value
    check_step(check_build(spec, tokens), tokens, *(None,) * 5)


def test_more_tokens_than_sums_of_whole_numbers_hold() -> None:
    """All weights and all values are the largest: 32 bits would overflow after 133,000 tokens."""
    count, threads = 140_000, torch.get_num_threads()
    spec = spec_of("int8", "int8", torch.bfloat16)
    query, key, value = tokens_of(spec, 1, batch=1)
    rows = [torch.ones_like(part).expand(-1, -1, count, -1) for part in (key, value)]
    torch.set_num_threads(1)  # which takes all tokens of a head one after the other
    try:
        built = ops.build(*rows, [query], spec.text, count + 1)
        output = ops.step(query, key, value, *built, None, None, None, None, None, spec.text)
    finally:
        torch.set_num_threads(threads)
    assert_close(output, torch.ones_like(output), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_keys_and_values_of_any_ranks(dtype: torch.dtype) -> None:
    for dim in (13, 32, 64, 128):
        spec = spec_of("quantized-scaled-4-2-2-1", "quantized-scaled-4-2-2-1", dtype, dim)
        cache = check_build(spec, tokens_of(spec, 60))
        check_step(cache.clone(), tokens_of(spec, 3))
        for side, pages, head in cache.sides():
            pages.random_(0, 256)
            order = spec.head(side).constants(head)["order"]
            order.copy_(torch.tensor((-1, dim, 2**15 - 1, -(2**15))).short().repeat(dim)[:dim])
        rest = (None, None, None, ALL, None, spec.text)
        output = ops.step(*tokens_of(spec, 3), *cache.tensors, *rest)
        assert output.shape == (2, 4, 3, dim)


@pytest.mark.parametrize("values", ["pruned", "quantized-4", "quantized-scaled-4"])
def test_constants_leave_out_the_first_tokens_that_stay_dense(values: str) -> None:
    spec = spec_of("quantized-scaled-4", values, torch.float32, sinks=3)
    prompt = tokens_of(spec, 60)
    for rows in prompt[1:]:
        rows[:, :, :3] *= 1000
    check_step(check_build(spec, prompt, 80), tokens_of(spec, 3))


def test_quantized_numbers_that_are_not_finite_leave_the_constants_as_they_are() -> None:
    for name in ("quantized-4", "quantized-6", "quantized-scaled-4-2-2-1"):
        spec = spec_of(name, name, torch.float32)
        prompt = tokens_of(spec, 60)
        for number, rows in zip((math.nan, math.inf), prompt[1:], strict=True):
            rows[0, 0, 5, 3] = number
        cache = check_build(spec, prompt)
        for side, _, head in cache.sides():
            for constant in spec.head(side).constants(head).values():
                assert constant.isfinite().all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_steps_without_new_tokens(name: str, dtype: torch.dtype) -> None:
    """As of a rank that stores none of the new ones, or none at all yet."""
    spec = spec_of(name, name, dtype)
    for length in (0, 3, 40):
        cache = check_build(spec, tokens_of(spec, length), length + 2)
        for queries in (1, 3):
            (query, *_), (_, *nothing) = tokens_of(spec, queries), tokens_of(spec, 0)
            check_step(cache, (query, *nothing))
            check_step(cache, (query, *nothing), None, None, length // 2 - 1, ALL, None)
        check_step(cache, tokens_of(spec, 2))
