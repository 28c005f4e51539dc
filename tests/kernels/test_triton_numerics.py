"""The Triton kernels against the reference: on a GPU, or in Triton's interpreter.

The interpreter has to be chosen before Triton is imported; ``test_triton_interpreted`` runs this
file again in a process where it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from spark_compile import ops as _ops  # noqa: F401  (defines spark_reference)
from spark_compile.kernels.formats import parse
from spark_compile.kernels.layout import STEP, counters
from spark_compile.kernels.reference.store import ALL, Store, allocate
from spark_compile.kernels.spec import SIDES, Spec

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("neither a GPU nor the interpreter", allow_module_level=True)

from spark_compile.kernels.triton.ops import EAGER  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
REFERENCE = torch.ops.spark_reference
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
KEYS = ("dense", "int8", "spark(kept=5)", "spark(kept=5,stored=int8,recovery=none)",
        "spark(kept=12,stored=int8,saliency=absolute)", "pruned(kept=4)", "quantized(bits=6)",
        "quantized(bits=4-2-2-1,scaled=True)")  # fmt: skip
VALUES = ("dense", "int8", "pruned(kept=3)", "pruned(kept=10,stored=int8)", "quantized(bits=4)",
          "quantized(bits=3,rotated=False)")  # fmt: skip


def some_are_slow(*cases: tuple[Any, ...], every: int) -> list[Any]:
    """Cases of which one of ``every`` is fast; the interpreter takes a second for each."""
    marks = [pytest.mark.slow]
    return [pytest.param(*case, marks=marks * (n % every > 0)) for n, case in enumerate(cases)]


@pytest.fixture(autouse=True)
def on_the_device() -> Iterator[None]:
    """New tensors are where the kernels run."""
    with torch.device(DEVICE):
        yield


@pytest.fixture(autouse=True)
def bfloat16_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter multiplies bfloat16 as integers and truncates to it; GPUs do neither."""
    if not INTERPRETED:
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounded(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        data = torch.tensor(np.asarray(source.data), device="cpu").bfloat16()
        return TensorHandle(data.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    def widened(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
                    for t in (a, b))  # fmt: skip
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", widened)


def spec_of(
    key: str = "spark(kept=5)", value: str = "pruned(kept=3)", *,
    dtype: torch.dtype = torch.float32, dims: tuple[int, int] = (12, 10), window: int = 4,
    recent: int = 5, sinks: int = 0, min_tokens: int = 0, scale: float = 0.4,
    softcap: float = 0.0,
) -> Spec:  # fmt: skip
    formats = [parse(text, dim, dtype) for text, dim in zip((key, value), dims, strict=True)]
    return Spec(*formats, window, recent, sinks, min_tokens, scale, softcap)


class Cache:
    """A cache made by the reference, which operators step through; unused bytes are all ones."""

    def __init__(
        self, spec: Spec, tokens: int = 23, *, heads: tuple[int, int] = (2, 1), pages: int = 12,
        garbage: int = 255, batch: int = 1,
    ) -> None:  # fmt: skip
        """The interpreter runs a kernel for each batch entry and key head, one after the other."""
        self.spec, self.heads, self.batch, self.stored = spec, heads, batch, list[Tensor]()
        query = self.queries(min(tokens, 7))
        for side, rows in zip(SIDES, self.new(tokens), strict=True):
            empty = allocate(rows, spec, side, pages, int(spec.tail_rows(tokens, tokens + 9)))
            for stored in (empty.pages, empty.head[..., spec.head(side).offsets["tail"] :]):
                stored.fill_(garbage)
            store = Store(empty.pages, empty.head, spec, side)
            store.observe(query)
            store.append(rows, ALL)
            self.stored += [store.pages, store.head]

    def queries(self, tokens: int) -> Tensor:
        format = self.spec.key
        sizes = self.batch, self.heads[0], tokens, format.head_dim
        return torch.randn(sizes, dtype=format.dtype)

    def new(self, tokens: int) -> list[Tensor]:
        sizes, formats = (self.batch, self.heads[1], tokens), (self.spec.key, self.spec.value)
        return [torch.randn(*sizes, f.head_dim, dtype=f.dtype) for f in formats]

    def sides(self) -> list[Store]:
        return [
            Store(*self.stored[2 * i : 2 * i + 2], self.spec, side) for i, side in enumerate(SIDES)
        ]

    @property
    def visible(self) -> int:
        return self.sides()[0].visible

    def step(
        self, tokens: int = 1, *, queries: int | None = None, keep: int | None = ALL,
        position: int | None = None, operator: Any = EAGER["step"], spread: bool = False,
        **how: Any,
    ) -> Tensor:  # fmt: skip
        """Step the kernels and, on a copy, the reference; the outputs and caches are the same."""
        dtype = self.spec.key.dtype
        given = [self.queries(tokens if queries is None else queries), *self.new(tokens)]
        rest = (
            how.get("mask"), how.get("sinks"), how.get("causal_offset"), keep,
            None if position is None else torch.tensor([position]), self.spec.text,
        )  # fmt: skip
        expected = [t.clone() for t in self.stored]
        wanted = REFERENCE.step(*given, *expected, *rest)
        if spread:
            given = [scattered(t) for t in given]
        output: Tensor = operator(*given, *self.stored, *rest)
        assert output.dtype == dtype
        allowed = {"atol": TOLERANCES[dtype], "rtol": TOLERANCES[dtype]}
        torch.testing.assert_close(output, wanted, **allowed)
        check_same(self.stored, expected, self.spec)
        return output


def check_same(result: list[Tensor], expected: list[Tensor], spec: Spec) -> None:
    """Counters are equal; tokens, current statistics and constants but for the order of sums."""
    dtype = spec.key.dtype
    allowed = {"atol": TOLERANCES[dtype], "rtol": TOLERANCES[dtype]}
    for i, side in enumerate(SIDES):
        pair = (slice(2 * i, 2 * i + 2), spec, side)
        ours, theirs = (Store(*stored[pair[0]], *pair[1:]) for stored in (result, expected))
        torch.testing.assert_close(ours.counters, theirs.counters)
        torch.testing.assert_close(ours.rows(), theirs.rows(), **allowed)
        if ours.stats is not None and theirs.stats is not None:
            slot = ours.step % 2
            torch.testing.assert_close(ours.stats[:, :, slot], theirs.stats[:, :, slot])
        if ours.packed:
            torch.testing.assert_close(ours.constants, theirs.constants)


def scattered(tensor: Tensor) -> Tensor:
    """The same values with the dimensions reversed in memory and every second element unused."""
    spread = tensor.new_empty(*reversed(tensor.shape), 2)[..., 0]
    return spread.permute(*reversed(range(tensor.dim()))).copy_(tensor)


PARTS = [("spark(kept=5)", "dense"), ("int8", "quantized(bits=4)"), ("dense", "dense")]


@pytest.mark.parametrize(("key", "value"), PARTS)
@pytest.mark.parametrize("tokens", [0, 24])
def test_a_part_of_the_tokens(key: str, value: str, tokens: int) -> None:
    """Also none: as of a rank that stores none of the new ones, or none at all yet."""
    cache = Cache(spec_of(key, value), tokens=tokens, batch=2)
    for new, queries in ((0, 1), (1, 1), (0, 3), (3, 3)):
        given = [cache.queries(queries), *cache.new(new)]
        sinks = torch.randn(cache.heads[0]) if new else None
        rest = (None, sinks, cache.visible + new - 2, ALL, None, cache.spec.text)
        expected = [t.clone() for t in cache.stored]
        wanted = REFERENCE.step_partial(*given, *expected, *rest)
        result = EAGER["step_partial"](*given, *cache.stored, *rest)
        allowed = {"atol": TOLERANCES[torch.float32], "rtol": TOLERANCES[torch.float32]}
        torch.testing.assert_close(result, wanted, **allowed)
        check_same(cache.stored, expected, cache.spec)


# 5 is no divisor of the number of values: the fast ones meet every key and every value.
@pytest.mark.parametrize(("key", "value"), some_are_slow(*product(KEYS, VALUES), every=7))
def test_every_pair_of_formats(key: str, value: str) -> None:
    """A page is packed in the first step and read in the second."""
    cache = Cache(spec_of(key, value), tokens=24, batch=2)
    for tokens in (1, 3):
        cache.step(tokens)


@pytest.mark.parametrize(
    ("key", "sinks"),
    some_are_slow(
        ("spark(kept=5,stored=int8)", 0), ("spark(kept=5,stored=int8)", 2),
        ("quantized(bits=4-2,scaled=True)", 2), ("quantized(bits=4-2,scaled=True)", 0), every=2,
    ),
)  # fmt: skip
def test_the_first_page_is_packed(key: str, sinks: int) -> None:
    """With it, the constants are fixed."""
    cache = Cache(spec_of(key, "quantized(bits=5)", sinks=sinks), tokens=7 + sinks)
    for tokens in (1, 1, 1, 4):
        cache.step(tokens)
    assert cache.sides()[0].packed == 8


CASES: dict[str, dict[str, Any]] = {
    "odd group, odd sizes": {"dims": (13, 7), "heads": (6, 2)},
    "one group of 20": {"heads": (20, 1), "dims": (32, 32)},
    "planes of 16 bits": {"dims": (80, 48)},
    "planes of 8 bits": {"dims": (72, 40)},
    "planes of 32 bits": {"dims": (128, 64), "key": "spark(kept=26)"},
    "window of one": {"window": 1, "pages": 30},
    "odd window": {"window": 7},
    "wide window": {"window": 24, "tokens": 60},
    "nothing recent": {"recent": 0},
    "nothing packed": {"min_tokens": 1000, "steps": (1, 2, 1)},
    "packed at last": {"min_tokens": 26},
    "one token": {"tokens": 1},
    "many blocks": {"tokens": 90, "heads": (2, 1), "recent": 40, "pages": 14},
    "parts of whole words": {
        "key": "quantized(bits=4-2-2-1,scaled=True)",
        "value": "quantized(bits=4)",
        "dims": (128, 64),
    },
    "parts of three kinds": {
        "key": "quantized(bits=6-5-5-4,scaled=True)",
        "value": "quantized(bits=5)",
        "dims": (64, 64),
    },
    "parts of bytes": {
        "key": "quantized(bits=4-2-2-1,scaled=True)",
        "value": "quantized(bits=1)",
        "dims": (64, 96),
    },
    "two parts": {
        "key": "quantized(bits=5-3,scaled=True)",
        "value": "quantized(bits=2)",
        "dims": (128, 64),
    },
    "six bits": {
        "key": "quantized(bits=6,scaled=True)",
        "value": "quantized(bits=6)",
        "dims": (64, 32),
    },
    "eight bits": {
        "key": "quantized(bits=8-4,scaled=True)",
        "value": "quantized(bits=8)",
        "dims": (64, 40),
    },
    "three bits": {
        "key": "quantized(bits=3,scaled=True)",
        "value": "quantized(bits=3)",
        "dims": (80, 64),
    },
    "a format for both": {"key": "spark(kept=5)", "value": "spark(kept=4)", "dims": (12, 12)},
}


SLOW_CASES = (
    "parts of three kinds", "parts of bytes", "three bits", "one group of 20", "wide window",
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW_CASES else []) for n in CASES],
)
def test_shapes(name: str) -> None:
    case = dict(CASES[name])
    steps = case.pop("steps", (1, 4, 1))
    made = {n: case.pop(n) for n in ("heads", "tokens", "pages") if n in case}
    cache = Cache(spec_of(**case), **made)
    for tokens in steps:
        cache.step(tokens)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("spark(kept=5,stored=int8)", "pruned(kept=4,stored=int8)"),
        ("int8", "dense"),
        ("quantized(bits=6,scaled=True)", "quantized(bits=4)"),
    ],
)
def test_half_precision(key: str, value: str, dtype: torch.dtype) -> None:
    cache = Cache(spec_of(key, value, dtype=dtype), heads=(6, 2))
    for tokens in (3, 1):
        cache.step(tokens)


@pytest.mark.parametrize("sinks", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_a_chunk_that_is_longer_than_the_tail(sinks: int) -> None:
    cache = Cache(spec_of(sinks=sinks), tokens=10)
    for tokens in (19, 2):
        cache.step(tokens, causal_offset=cache.visible)


def test_evicted_tokens_are_not_seen_and_their_pages_used_again() -> None:
    cache = Cache(spec_of(), tokens=24, pages=6)
    for tokens, keep in ((1, 20), (4, 18), (4, 18), (1, 3), (1, 18)):
        cache.step(tokens, keep=keep)
    assert cache.sides()[0].packed // 4 > 6
    cache.step(7, keep=18, causal_offset=cache.visible)


@pytest.mark.parametrize("spread", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_masks_offsets_caps_and_sinks(spread: bool) -> None:
    one, two = {"heads": (3, 1)}, {"heads": (6, 2), "batch": 2}
    hows: tuple[tuple[dict[str, Any], dict[str, Any], Any], ...] = (
        ({"softcap": 3.0}, two, lambda n: {"mask": torch.rand(2, 1, 3, n) < 0.7}),
        ({"sinks": 2}, one, lambda n: {"mask": torch.randn(3, n), "causal_offset": 15}),
        ({}, two, lambda n: {"mask": torch.rand(2, 6, 1, n) < 0.7, "sinks": torch.randn(6)}),
        ({}, two, lambda n: {"mask": torch.randn(2, 6, 3, 1), "causal_offset": 0}),
        ({}, one, lambda n: {"mask": torch.rand(1, 1, 3, n + 9) < 0.7}),
        ({"softcap": 2.0}, {"heads": (6, 2)},
         lambda n: {"sinks": torch.randn(6), "causal_offset": n - 3}),
    )  # fmt: skip
    for changes, sizes, how in hows:
        cache = Cache(spec_of(**changes), **sizes)
        given = how(cache.visible + 3)
        if spread and "mask" in given:
            given["mask"] = scattered(given["mask"])
        cache.step(3, spread=spread, **given)


def test_a_mask_begins_with_the_first_token_that_is_not_evicted() -> None:
    cache = Cache(spec_of(), tokens=24)
    cache.step(keep=11)
    cache.step(mask=torch.rand(1, 1, 1, 12) < 0.5)


def test_a_query_that_sees_nothing() -> None:
    cache = Cache(spec_of(), batch=2)
    mask = torch.ones(2, 1, 2, cache.visible + 2, dtype=torch.bool)
    mask[1, :, 1] = False
    output = cache.step(2, mask=mask)
    assert (output[1, :, 1] == 0).all()
    cache.step(2, causal_offset=-1)


def test_sharers_note_their_queries() -> None:
    """A page is packed by norms of the queries of all."""
    cache = Cache(spec_of(), tokens=23)
    for _ in range(2):
        cache.step(keep=None)
        cache.step()


@pytest.mark.parametrize(
    ("value", "sinks", "position"),
    some_are_slow(
        *(
            (value, *where)
            for value in ("pruned(kept=3,stored=int8)", "int8", "quantized(bits=4)")
            for where in ((0, 22), (0, 10), (0, 8), (0, 0), (3, 24), (3, 12), (3, 11), (3, 2))
        ),
        every=3,
    ),
)
def test_a_position_forgets_what_comes_after(position: int, sinks: int, value: str) -> None:
    key = "quantized(bits=5-3,scaled=True)" if "bits" in value else "spark(kept=5,stored=int8)"
    cache = Cache(spec_of(key, value, sinks=sinks), tokens=24)
    cache.step(2, position=position)
    cache.step(1, position=position + 1)


def test_a_position_may_cut_what_is_evicted() -> None:
    cache = Cache(spec_of("dense", "dense"), tokens=24)
    cache.step(keep=9)
    cache.step(position=18)
    cache.step(position=0)


def test_a_position_after_the_last_token_appends() -> None:
    """Nothing can be raised on the device."""
    cache = Cache(spec_of())
    expected = [t.clone() for t in cache.stored]
    given = (cache.queries(1), *cache.new(1))
    rest = (None, None, None, ALL)
    wanted = REFERENCE.step(*given, *expected, *rest, None, cache.spec.text)
    result = EAGER["step"](*given, *cache.stored, *rest, torch.tensor([99]), cache.spec.text)
    torch.testing.assert_close(result, wanted)
    check_same(cache.stored, expected, cache.spec)


@pytest.mark.parametrize("key", ["spark(kept=5)", "int8", "dense", "quantized(bits=4,scaled=True)"])
def test_no_operand_has_to_be_contiguous(key: str) -> None:
    heads = (6, 2) if key == "spark(kept=5)" else (3, 1)
    cache = Cache(spec_of(key, "pruned(kept=3)"), heads=heads, tokens=24, batch=2)
    for tokens in (3, 1):
        cache.step(tokens, spread=True)


def test_the_operator_for_compilers_does_the_same() -> None:
    cache = Cache(spec_of(), tokens=23)
    for position in (None, 24, 8):
        cache.step(2, operator=torch.ops.spark_triton.step, position=position)


def test_a_channel_that_no_query_looked_at_does_not_overflow() -> None:
    cache = Cache(spec_of("spark(kept=3,saliency=absolute)", dtype=torch.float16))
    cache.sides()[0].constants["norms"][:, :, 3] = 0.0
    how = (None, None, None, ALL, None, cache.spec.text)
    output = EAGER["step"](cache.queries(1), *cache.new(1), *cache.stored, *how)
    assert output.isfinite().all()


def test_of_equally_salient_channels_the_first_are_kept() -> None:
    for kept in (1, 2, 3, 4, 7):
        spec = spec_of(f"spark(kept={kept},recovery=none)", "dense", dims=(8, 8), recent=0)
        key = torch.tensor([1.0, -1.0, 0.0, 1.0, 2.0, 1.0, 0.0, -0.0]).expand(1, 1, 4, 8)
        given = (key, key, [torch.ones(1, 1, 1, 8)], spec.text, None)
        result, expected = EAGER["build"](*given), REFERENCE.build(*given)
        torch.testing.assert_close(result[0], expected[0])


@pytest.mark.parametrize("tokens", [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 9)), 23])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("spark(kept=5)", "pruned(kept=3)"),
        ("spark(kept=5,stored=int8)", "int8"),
        ("dense", "dense"),
        ("quantized(bits=4-3,scaled=True)", "quantized(bits=6)"),
    ],
)
def test_build(key: str, value: str, tokens: int) -> None:
    for changes, operator in (
        ({}, EAGER["build"]),
        ({"sinks": 2}, torch.ops.spark_triton.build),
        ({"min_tokens": 20}, EAGER["build"]),
    ):
        cache = Cache(replace(spec_of(key, value), **changes), batch=1 if changes else 2)
        given = (*cache.new(tokens), [cache.queries(tokens), cache.queries(3)])
        rest = (cache.spec.text, 40)
        expected = list(REFERENCE.build(*given, *rest))
        result = list(operator(scattered(given[0]), *given[1:], *rest))
        assert [t.shape for t in result] == [t.shape for t in expected]
        check_same(result, expected, cache.spec)
    cache.stored = result
    cache.step(4)


def test_what_the_kernels_cannot_do_goes_to_the_reference() -> None:
    for changes in ({"key": "spark(kept=5,recovery=gaussian)"}, {"dims": (300, 8)}):
        cache = Cache(spec_of(**changes))  # type: ignore[arg-type]
        cache.step()


def test_what_does_not_fit_is_named() -> None:
    cache = Cache(spec_of(), pages=6, heads=(4, 2), batch=2)
    names = ("query", "new_key", "new_value", "key_pages", "key_head", "value_pages", "value_head")
    given = dict(zip(names, (cache.queries(1), *cache.new(1), *cache.stored), strict=True))
    for changes, message in (
        ({"query": given["query"][:, :3]}, r"query is .*\[2, 3, 1, 12\]: allowed is .*\[2, 2, 1, "),
        ({"new_value": given["new_value"][..., :5]}, r"new_value is torch.float32\[2, 2, 1, 5\]"),
        ({"key_pages": given["key_pages"][..., 1:]}, "key_pages is"),
        ({"value_head": given["value_head"][..., :32]}, "value_head is"),
        (
            {"key_pages": given["key_pages"].mT.contiguous().mT},
            "key_pages has pages that do not lie one after the other",
        ),
        ({"value_head": given["value_head"].mT.contiguous().mT}, "value_head has strides"),
        (dict(zip(names[1:3], cache.new(40), strict=True)), "key_pages has 6 pages: at least 8"),
    ):
        arguments = ({**given, **changes}[name] for name in names)
        with pytest.raises(ValueError, match=message):
            EAGER["step"](*arguments, None, None, None, ALL, None, cache.spec.text)


@pytest.mark.parametrize("value", [10**9, -5, 2**40 + 3])
def test_no_counter_leads_out_of_the_buffers(value: int) -> None:
    """Nothing can be raised on the device: rows outside are left out."""
    for counter in range(STEP + 1):
        cache = Cache(spec_of(sinks=0))
        for head in cache.stored[1::2]:
            counters(head)[..., counter] = value
        arguments = (cache.queries(2), *cache.new(2), *cache.stored, None, None, 3, 9)
        EAGER["step"](*arguments, torch.tensor([7]), cache.spec.text)
