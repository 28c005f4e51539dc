"""The native CPU kernels against the reference, on whatever hypothesis thinks of.

Everything here runs for the level of instruction sets that $SPARK_COMPILE_CPU names, by default
the best one; the last test runs all of it again for each of the others.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from draws import masks, output_or_error, rows, thorough
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import Cache, assert_close, assert_same, format_of
from torch import Tensor

from spark_compile import ops
from spark_compile.kernels import cpu, layout
from spark_compile.kernels.cpu.build import level, supported
from spark_compile.kernels.formats import Dense, Quantized, Spark
from spark_compile.kernels.layout import FIRST, LENGTH, PACKED, STEP
from spark_compile.kernels.reference.store import ALL
from spark_compile.kernels.spec import Spec

pytestmark = [
    pytest.mark.skipif(not cpu.load(), reason="there are no native kernels here"),
    pytest.mark.filterwarnings("ignore:no native kernel"),
]

reference = torch.ops.spark_reference
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUERIED = (
    "spark", "spark-int8", "spark-absolute", "spark-none", "quantized-scaled-4",
    "quantized-scaled-4-2-2-1", "quantized-scaled-6-5-3-3", "quantized-scaled-5",
)  # fmt: skip
FORMATS = (
    *QUERIED, "dense", "int8", "pruned", "pruned-int8", "quantized-1", "quantized-2", "quantized-3",
    "quantized-4", "quantized-5", "quantized-6", "quantized-plain-4", "quantized-plain-3",
)  # fmt: skip
"""Those that note queries, and all."""
OPERANDS = (
    "query", "new_key", "new_value", "key_pages", "key_head", "value_pages", "value_head",
)  # fmt: skip
EMULATED_TILES = "-DSPARK_EMULATED_TILES"


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    dtype = draw(st.sampled_from(DTYPES))
    key_dim = draw(st.sampled_from([1, 3, 8, 12, 16, 20, 32, 64, 80, 96, 128, 256, 300]))
    value_dim = draw(st.sampled_from([key_dim, key_dim, 1, 5, 24, 64, 128, 130]))
    # Values that note queries must have as many channels as those.
    names = FORMATS if key_dim == value_dim else FORMATS[len(QUERIED) :]
    return Spec(
        format_of(draw(st.sampled_from(FORMATS)), key_dim, dtype, draw(st.integers(1, key_dim))),
        format_of(draw(st.sampled_from(names)), value_dim, dtype, draw(st.integers(1, value_dim))),
        window=draw(st.sampled_from([1, 3, 8, 32, 32, 33])),
        recent=draw(st.sampled_from([0, 5, 32])),
        sinks=draw(st.sampled_from([0, 0, 3])),
        min_tokens=draw(st.sampled_from([0, 0, 50])),
        scale=0.4,
        softcap=draw(st.sampled_from([0.0, 3.0])),
    )


@st.composite
def prompts(draw: st.DrawFn) -> tuple[Spec, Tensor, Tensor, list[Tensor]]:
    """A spec and tokens for it: keys, values, queries."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    spec = draw(specs())
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 3), (3, 1), (1, 7), (2, 4), (1, 17)]))
    tokens = draw(st.sampled_from([1, 6, 31, 33, 64, 65, 129, 300, 900]))
    key = rows(draw, kv_heads, tokens, spec.key)
    # Many channels that are equally salient, and zeros. Not where channels are rotated: a sum that
    # cancels out leaves a rest of either sign, by the order of adding, and that decides a code.
    rotated = isinstance(spec.key, Quantized) and spec.key.rotated
    if draw(st.booleans()) and not rotated:
        key = key.round()
    count = draw(st.sampled_from([1, 5, 40]))
    sharers = draw(st.sampled_from([1, 1, 2]))
    queries = [rows(draw, kv_heads * group, count, spec.key) for _ in range(sharers)]
    return spec, key, rows(draw, kv_heads, tokens, spec.value), queries


def built(prompt: tuple[Spec, Tensor, Tensor, list[Tensor]], capacity: int | None) -> Cache:
    spec, key, value, queries = prompt
    return Cache(spec, *reference.build(key, value, queries, spec.text, capacity))


@settings(thorough, max_examples=80)
@given(st.data())
def test_build(data: st.DataObject) -> None:
    prompt = data.draw(prompts())
    spec, key, value, queries = prompt
    capacity = data.draw(st.sampled_from([None, key.shape[2], key.shape[2] + 77]))
    actual = Cache(spec, *ops.build(key, value, queries, spec.text, capacity))
    expected = built(prompt, capacity)
    assert_same(actual, expected)
    for mine, theirs in zip(actual.tensors, expected.tensors, strict=True):
        assert (mine.shape, mine.dtype, mine.stride()) == (
            theirs.shape,
            theirs.dtype,
            theirs.stride(),
        )
    for side, pages, _ in actual.sides():
        full = expected.count(PACKED) // spec.window
        assert not pages[:, :, full:].any(), f"{side} pages that are not used yet are zeros"


def one_step(draw: st.DrawFn, cache: Cache, query_heads: int) -> tuple[Any, ...]:
    """What ``step`` takes in front of and after the cache."""
    spec, kv_heads = cache.spec, cache.key_head.shape[1]
    count = draw(st.sampled_from([1, 1, 1, 2, 5, 19, 80]))
    queries = count if draw(st.booleans()) else draw(st.sampled_from([1, 4, 33]))
    query = rows(draw, query_heads, queries, spec.key)
    new_key, new_value = (rows(draw, kv_heads, count, f) for f in (spec.key, spec.value))
    # Sinks are no part of a window that slides.
    evicts = [ALL, ALL, None] if spec.sinks else [ALL, None, 10, 100]
    keep = draw(st.sampled_from(evicts))
    length, first = cache.count(LENGTH), cache.count(FIRST)
    position, start = None, length
    if draw(st.integers(0, 3)) == 0:
        dense = max(cache.count(PACKED) + spec.sinks, first)
        start = draw(st.sampled_from([0, length, length // 2, dense, min(dense + 2, length)]))
        position = start + torch.arange(draw(st.sampled_from([1, count])))
    visible = start - min(first, start) + count
    mask, sinks = masks(draw, query, visible), draw(st.sampled_from([None, spec.key.dtype]))
    sinks = None if sinks is None else torch.randn(query_heads).to(sinks)
    offset = draw(st.sampled_from([None, visible - queries, visible // 2, -1]))
    return (query, new_key, new_value), (mask, sinks, offset, keep, position, spec.text)


@thorough
@given(st.data())
def test_steps(data: st.DataObject) -> None:
    prompt = data.draw(prompts())
    spec, key = prompt[:2]
    expected = built(prompt, data.draw(st.sampled_from([None, key.shape[2] + 300])))
    if data.draw(st.booleans()):
        expected = slice_of_more(expected)
    for _ in range(data.draw(st.integers(1, 4))):
        expected.poison()
        actual = expected.clone()
        before, after = one_step(data.draw, expected, prompt[3][0].shape[1])
        results = [
            output_or_error(operator, before, cache, after)
            for operator, cache in ((ops.step, actual), (reference.step, expected))
        ]
        if isinstance(results[1], str):
            assert results[0] == results[1]
            continue
        assert_close(*results, spec.key.dtype)
        assert_same(actual, expected)


def slice_of_more(cache: Cache) -> Cache:
    """The same as batch entries of a larger cache."""
    return Cache(cache.spec, *(torch.cat((t, t, t))[1:3] for t in cache.tensors))


@settings(thorough, max_examples=60)
@given(st.data())
def test_malformed_bytes_lead_nowhere(data: st.DataObject) -> None:
    # As in a damaged file: `make sanitize` sees what is read and written.
    draw = data.draw
    prompt = draw(prompts())
    cache = built(prompt, None)
    counters = [layout.counters(head).clone() for head in (cache.key_head, cache.value_head)]
    for tensor in cache.tensors:
        if draw(st.booleans()):
            tensor.random_(0, 256)
    if draw(st.booleans()):
        counters[0][..., draw(st.integers(0, 3))] = draw(COUNTS)
        if draw(st.booleans()):
            counters[1] = counters[0]
    if draw(st.integers(0, 4)):
        for head, filled in zip((cache.key_head, cache.value_head), counters, strict=True):
            layout.counters(head).copy_(filled)
    (query, *new), (_, sinks, offset, keep, position, text) = one_step(
        draw, built(prompt, None), prompt[3][0].shape[1]
    )
    try:
        output = ops.step(query, *new, *cache.tensors, None, sinks, offset, keep, position, text)
    except ValueError:
        return
    assert output.shape == (*query.shape[:3], cache.spec.value.head_dim)


COUNTS = st.one_of(
    st.sampled_from([-1, 1, 2, 32, 64, 10**9, 2**40, 2**62, 2**63 - 1, -(2**63)]),
    st.integers(0, 1000),
)


def cache_for(spec: Spec, tokens: int, capacity: int | None = None) -> tuple[Cache, Tensor]:
    """A cache of two key heads, and four query heads."""
    key, value = (torch.randn(2, 2, tokens, f.head_dim).to(f.dtype) for f in (spec.key, spec.value))
    query = torch.randn(2, 4, 3, spec.key.head_dim).to(spec.key.dtype)
    return Cache(spec, *reference.build(key, value, [query], spec.text, capacity)), query


def new_tokens(spec: Spec, count: int = 1) -> list[Tensor]:
    return [torch.randn(2, 2, count, f.head_dim).to(f.dtype) for f in (spec.key, spec.value)]


def test_a_prefix_of_a_long_context_takes_any_number_of_chunks() -> None:
    dtype = torch.float32
    spec = Spec(format_of("spark", 32, dtype, 7), format_of("dense", 16, dtype), 32, 32, sinks=4)
    cache, query = cache_for(spec, 9000)
    given_ = (*new_tokens(spec), *cache.tensors, None, None, None, None, None, spec.text)
    assert_close(ops.step(query, *given_), reference.step(query, *given_), dtype)


def is_mapped(address: int) -> bool:
    """Whether the process has memory at an address."""
    maps = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(first, 16) <= address < int(end, 16) for first, end in maps)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_pages_have_memory_of_their_own_until_the_state_goes() -> None:
    """And memory that no token has filled yet is not resident."""
    spec = Spec(Dense(64, torch.float32), Dense(64, torch.float32), window=32, recent=32)
    tokens = torch.randn(1, 2, 100, 64)
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    built = torch.ops.spark.build(tokens, tokens, [], spec.text, 400_000)
    grown = int(Path("/proc/self/statm").read_text().split()[1]) - resident
    middle, size = built[0].data_ptr() + built[0].nbytes // 2, built[0].nbytes
    assert size > 2e8
    assert grown * os.sysconf("SC_PAGE_SIZE") < 0.1 * size
    assert not built[0][:, :, 3:].any()
    assert is_mapped(middle)
    del built
    assert not is_mapped(middle)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dims", "queries"), [((64, 64), 1), ((128, 128), 7), ((40, 40), 3)])
def test_every_pair_of_formats_has_a_native_kernel(
    dtype: torch.dtype, dims: tuple[int, int], queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked_for(name: str, args: Any) -> None:
        pytest.fail(f"{name} went to the reference")

    some = [n for n in FORMATS if not n.startswith("quantized") or n.endswith(("scaled-4", "d-4"))]
    alike = [(name, name) for name in FORMATS if name not in some]
    for names in (*itertools.product(some, some), *alike):
        formats = (format_of(n, d, dtype, d // 3) for n, d in zip(names, dims, strict=True))
        spec = Spec(*formats, 8, 4, sinks=2, scale=0.3)
        expected, _ = cache_for(spec, 150, 160)
        actual, new = expected.clone(), new_tokens(spec, queries)
        query = torch.randn(2, 4, queries, dims[0]).to(dtype)
        rest = (None, None, expected.visible, ALL, torch.tensor([148]), spec.text)
        monkeypatch.setattr(ops, "_warn_slow", asked_for)
        ops.build(*new, [query], spec.text, None)
        output = ops.step(query, *new, *actual.tensors, *rest)
        monkeypatch.undo()
        assert_close(output, reference.step(query, *new, *expected.tensors, *rest), dtype)
        assert_same(actual, expected)


class Negated(Dense):
    """A format of a user's own."""

    NAME = "negated"

    def encode(self, rows: Tensor, norms: Any, constants: Any) -> dict[str, Tensor]:
        return {"rows": -rows}

    def decode(self, stored: Any, constants: Any, first: int = 0) -> Tensor:
        return -super().decode(stored, constants, first)


@pytest.mark.parametrize(
    "what", ["query", "draws", "wide", "parts", "scattered", "own format", "cut page"]
)
def test_what_the_kernel_cannot_do_goes_to_the_reference(what: str) -> None:
    dtype = torch.float32
    key, value = format_of("spark", 12, dtype), Dense(1100 if what == "wide" else 10, dtype)
    if what == "draws":
        key = Spark(12, dtype, 5, recovery="gaussian")
    if what == "parts":
        key = Quantized(18, dtype, "1-2-1-2-1-2-1-2-1", scaled=True)
    if what == "own format":
        key = Negated(12, dtype)
    spec = Spec(key, value, 8, 4)
    expected, query = cache_for(spec, 100)
    new_key, new_value = new_tokens(spec)
    if what == "query":
        query = query.bfloat16()
    if what == "scattered":
        new_value = torch.randn(2, 2, 1, 20)[..., ::2]
    position = torch.tensor([51]) if what == "cut page" else None
    actual = expected.clone()
    results = [
        operator(
            query, new_key, new_value, *cache.tensors, None, None, None, ALL, position, spec.text
        )
        for operator, cache in ((ops.step, actual), (reference.step, expected))
    ]
    assert_close(*results, dtype)
    assert_same(actual, expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"new_key": torch.zeros(2, 2, 1, 11)},
            r"new_key is torch.float32\[2, 2, 1, 11\]: allowed",
        ),
        ({"new_value": torch.zeros(2, 2, 2, 10)}, r"new_value is .*: allowed is .*2, 2, 1, 10\]"),
        ({"key_pages": torch.zeros(2, 2, 3, 8, dtype=torch.uint8)}, "key_pages is"),
        ({"value_head": torch.zeros(2, 2, 40, dtype=torch.uint8)}, "value_head is"),
        ({"attn_mask": torch.zeros(1, 99)}, r"attn_mask is \[1, 99\]: .* to \[2, 4, 3, 101\]"),
        ({"position": torch.tensor([101])}, "position 101 leaves a gap after 100 tokens"),
        ({"position": torch.tensor([7, 9])}, r"positions \[7, 9\] are not consecutive"),
    ],
)
def test_errors_are_those_of_the_reference(change: dict[str, Tensor], said: str) -> None:
    spec = Spec(format_of("spark", 12, torch.float32), Dense(10, torch.float32), 8, 4)
    cache, query = cache_for(spec, 100)
    names = ("key_pages", "key_head", "value_pages", "value_head")
    operands = dict(zip(names, cache.tensors, strict=True))
    operands |= {"query": query, "position": None, "attn_mask": None}
    operands |= dict(zip(("new_key", "new_value"), new_tokens(spec), strict=True)) | change
    rest = {"sinks": None, "causal_offset": None, "keep": ALL, "spec": spec.text}
    for operator in (ops.step, reference.step):
        with pytest.raises(ValueError, match=said):
            operator(**operands, **rest)


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize(
    ("counter", "value", "said"),
    [
        (LENGTH, -1, "LENGTH is -1, allowed is 0 to"),
        (LENGTH, 2**60, f"LENGTH is {2**60}, allowed is 0 to"),
        (LENGTH, 95, "PACKED is 96, allowed is 0 to 95"),
        (LENGTH, 200, "LENGTH - PACKED is 104, allowed is 0 to 8"),
        (PACKED, -8, "PACKED is -8, allowed is 0 to 100"),
        (PACKED, 95, "PACKED modulo window is 7, allowed is 0"),
        (PACKED, 80, "LENGTH - PACKED is 20, allowed is 0 to 8"),
        (FIRST, -1, "FIRST is -1, allowed is 0 to 100"),
        (FIRST, 101, "FIRST is 101, allowed is 0 to 100"),
        (STEP, -1, "STEP is -1, allowed is 0 to"),
        (STEP, 2**63 - 1, "STEP is .*, allowed is 0 to"),
        (None, 2, "the number of live pages is 12, allowed is 0 to 2"),
    ],
)
def test_damaged_counters_are_named(side: str, counter: int | None, value: int, said: str) -> None:
    spec = Spec(format_of("spark", 12, torch.float32), Dense(10, torch.float32), 8, 4)
    cache, query = cache_for(spec, 100)
    operands = dict(zip(OPERANDS, (query, *new_tokens(spec), *cache.tensors), strict=True))
    if counter is None:
        operands[f"{side}_pages"] = operands[f"{side}_pages"][:, :, :value].contiguous()
    else:
        layout.counters(operands[f"{side}_head"])[..., counter] = value
    rest = (None, None, None, ALL, None, spec.text)
    for operator in (ops.step, reference.step):
        with pytest.raises(ValueError, match=f"the {side}s of the cache are damaged: {said}"):
            operator(*operands.values(), *rest)
    recovered = (operands[f"{side}_pages"], operands[f"{side}_head"], spec.text, side == "key", 100)
    with pytest.raises(ValueError, match=f"the {side}s of the cache are damaged: {said}"):
        ops.recover(*recovered)


def test_a_cache_with_sinks_evicts_nothing() -> None:
    dtype = torch.float32
    spec = Spec(format_of("spark", 12, dtype), Dense(10, dtype), 8, 4, sinks=2)
    cache, query = cache_for(spec, 100)
    arguments = (query, *new_tokens(spec), *cache.tensors, None, None, None, 60, None, spec.text)
    for operator in (ops.step, reference.step):
        with pytest.raises(ValueError, match="keep is 60: a cache that keeps its first 2 tokens"):
            operator(*arguments)


@pytest.mark.parametrize("offset", [2**63 - 1, 2**62, -(2**62), -(2**63)])
def test_a_causal_offset_may_be_any_number(offset: int) -> None:
    dtype = torch.float32
    spec = Spec(format_of("spark", 12, dtype), Dense(10, dtype), 8, 4)
    cache, query = cache_for(spec, 100)
    before = (query, *new_tokens(spec), *cache.tensors, None, None)
    for operator in (ops.step, reference.step):
        output = operator(*before, offset, None, None, spec.text)
        seen = operator(*before, None if offset > 0 else -3, None, None, spec.text)
        assert_close(output, seen, dtype)


def test_a_spec_with_another_scale_is_another_spec() -> None:
    spec = Spec(format_of("spark", 12, torch.float32), Dense(10, torch.float32), 8, 4)
    cache, query = cache_for(spec, 100)
    new = new_tokens(spec)
    outputs = []
    for scale in (0.1, 1e-05, 0.1):
        text = dataclasses.replace(spec, scale=scale).text
        given_ = (query, *new, *cache.tensors, None, None, None, None, None, text)
        assert_close(ops.step(*given_), reference.step(*given_), torch.float32)
        outputs.append(ops.step(*given_))
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])


def other_levels() -> list[str]:
    """Levels to test in processes of their own, "amx" with emulated tiles where there are none."""
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    emulated = "amx" not in supported() and has.get("avx512_bf16") and has.get("avx512_vbmi2")
    return [name for name in supported() if name != level()] + ["amx"] * bool(emulated)


def levels_and_files() -> Iterator[Any]:
    """What to run at which level; the fast tests try one level, which takes most of a minute."""
    next_level = "avx512" if "avx512" in other_levels() else "avx2"
    for other, name in itertools.product(other_levels(), ("", "_edges", "_evict")):
        marks = [] if (other, name) == (next_level, "") else [pytest.mark.slow]
        yield pytest.param(other, f"test_cpu{name}.py", marks=marks)


@pytest.mark.parametrize(("other", "name"), list(levels_and_files()))
def test_every_other_level(other: str, name: str) -> None:
    if "SPARK_COMPILE_CPU" in os.environ:
        pytest.skip("this is one of the other levels")
    environment = {**os.environ, "SPARK_COMPILE_CPU": other}
    if other not in supported():
        environment["SPARK_COMPILE_CXXFLAGS"] = EMULATED_TILES
    file = str(Path(__file__).with_name(name))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
