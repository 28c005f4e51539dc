"""The native CPU kernels against the reference, on whatever shapes hypothesis thinks of.

Everything here runs for the level of instruction sets that $SPARK_COMPILE_CPU names, by default
the best one; the last test runs all of it again for each of the others.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import Store, store, with_room
from torch import Tensor

from spark_compile import ops
from spark_compile.kernels import cpu
from spark_compile.kernels.cpu.build import level, supported

pytestmark = pytest.mark.skipif(not cpu.load(), reason="there are no native kernels here")

reference = torch.ops.spark_reference
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest error relative to the largest number, by dtype."""

thorough = settings(max_examples=120, deadline=None, derandomize=True, database=None)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return
    assert torch.equal(actual.isfinite(), expected.isfinite())
    actual, expected = (t.float().nan_to_num(0, 0, 0) for t in (actual, expected))
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert error <= TOLERANCE[dtype], f"error {error:.2e}, allowed {TOLERANCE[dtype]:.0e}"


@st.composite
def stores(draw: st.DrawFn) -> Store:
    """Stores of every format with NaN in their unused rows."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    key_dim = draw(st.sampled_from([1, 3, 8, 12, 16, 20, 32, 64, 80, 96, 128, 256]))
    value_dim = draw(st.sampled_from([1, 5, 8, 16, 24, 64, 128, 130]))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 3), (3, 1), (1, 7), (2, 4), (1, 17)]))
    packed = draw(st.sampled_from([0, 1, 6, 31, 32, 33, 63, 64, 65, 129, 300, 900]))
    dense = draw(st.sampled_from([0, 1, 5, 40]) if packed else st.sampled_from([1, 5, 40]))
    return store(
        draw(st.sampled_from(DTYPES)),
        queries=draw(st.sampled_from([1, 1, 2, 5, 19])),
        packed=packed,
        dense=dense,
        room=draw(st.sampled_from([0, 3])),
        dims=(key_dim, value_dim),
        heads=(kv_heads * group, kv_heads),
        kept=draw(st.integers(1, key_dim)),
        sink_tokens=draw(st.integers(0, min(dense, 3))),
        recovery=draw(st.sampled_from(["degenerate", "none"])),
        saliency=draw(st.sampled_from(["squared", "absolute"])),
        poison=torch.nan,
        quantized=(draw(st.booleans()), draw(st.booleans())),
        value_kept=draw(st.one_of(st.none(), st.integers(1, value_dim))),
    )


def hows(draw: st.DrawFn, s: Store, length: int) -> tuple[Any, ...]:
    """Mask, causal offset, scale, softcap and sinks."""
    queries, heads = s.query.shape[2], s.query.shape[1]
    shape = draw(st.sampled_from([
        (2, heads, queries, length), (2, 1, queries, length), (queries, length), (1, 1, 1, length),
    ]))  # fmt: skip
    mask = draw(st.sampled_from([None, "bool", torch.float32, s.query.dtype]))
    if mask == "bool":
        mask = torch.rand(shape) < 0.7
    elif mask is not None:
        mask = torch.randn(shape).masked_fill(torch.rand(shape) < 0.2, -torch.inf).to(mask)
    offset = draw(st.sampled_from([None, length - queries, length // 2, -1]))
    sinks = draw(st.sampled_from([None, s.query.dtype]))
    sinks = None if sinks is None else torch.randn(heads).to(sinks)
    return mask, offset, 0.4, draw(st.sampled_from([0.0, 3.0])), sinks


@thorough
@given(st.data())
def test_attend(data: st.DataObject) -> None:
    s = data.draw(stores())
    how = (*hows(data.draw, s, s.length), *s.method, True)
    given_ = (s.query, *s.buffers(), *how, *s.value_buffers())
    for actual, expected in zip(ops.attend(*given_), reference.attend(*given_), strict=True):
        assert_close(actual, expected, s.query.dtype)


@settings(thorough, max_examples=40)
@given(st.data())
def test_malformed_bits_lead_nowhere(data: st.DataObject) -> None:
    # More bits than stored channels, as in a damaged file: `make sanitize` sees what is read.
    s = data.draw(stores())
    kept, bits, *rest = s.packed
    value_bits, scale, bias = s.packed_values
    full = None if value_bits is None else torch.full_like(value_bits, 255)
    s = Store(**{**vars(s), "packed": (kept, torch.full_like(bits, 255), *rest),
                 "packed_values": (full, scale, bias)})  # fmt: skip
    how = (*hows(data.draw, s, s.length), *s.method, True)
    output, lse = ops.attend(s.query, *s.buffers(), *how, *s.value_buffers())
    assert (output.shape[:3], output.dtype) == (lse.shape, s.query.dtype)


@thorough
@given(st.data())
def test_append_attend(data: st.DataObject) -> None:
    s = data.draw(stores())
    count, dtype = s.query.shape[2], s.query.dtype
    s = Store(**{**vars(s), **grown(s, count)})
    new = [torch.randn(*t.shape[:2], count, t.shape[3], dtype=dtype) for t in (s.tail, s.value)]
    how = (*hows(data.draw, s, s.length + count), *s.method, True)
    calls = [(s.query, *new, *s.buffers(), *how, *s.value_buffers()) for _ in range(2)]
    results = [
        f(*c) for f, c in zip((ops.append_attend, reference.append_attend), calls, strict=True)
    ]
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, dtype)
    for actual, expected in zip(*calls, strict=True):
        if isinstance(actual, Tensor):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def grown(s: Store, count: int) -> dict[str, Any]:
    """The growable buffers of a store with room for ``count`` more rows."""

    def more(t: Tensor | None) -> Tensor | None:
        return None if t is None else with_room(t, count, torch.nan)

    bits, scale, bias = s.packed_values
    return {"tail": more(s.tail), "values": more(s.values),
            "packed_values": (more(bits), more(scale), bias)}  # fmt: skip


@thorough
@given(st.data())
def test_prune(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    dtype, channels = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1, 7, 16, 40, 64, 128]))
    key = torch.randn(2, 3, draw(st.sampled_from([0, 1, 5, 70])), channels, dtype=dtype)
    if draw(st.booleans()):
        key = key.round()  # many equal saliencies, and zeros
    norms = [torch.rand(2, 3, channels).mul(3).round() for _ in range(2)]
    how = (draw(st.sampled_from(["degenerate", "gaussian"])),
           draw(st.sampled_from(["squared", "absolute"])), draw(st.booleans()))  # fmt: skip
    given_ = (key, *norms, draw(st.integers(1, channels)), *how)
    actual, expected = ops.prune(*given_), reference.prune(*given_)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    torch.testing.assert_close(actual[2], expected[2])


@thorough
@given(st.data())
def test_pack_values(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    dtype, channels = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1, 7, 16, 40, 64, 128]))
    value = torch.randn(2, 3, draw(st.sampled_from([0, 1, 5, 300])), channels, dtype=dtype)
    bias = draw(st.sampled_from([None, torch.rand(2, 3, channels)]))
    kept = channels if bias is None else draw(st.integers(1, channels))
    given_ = (value, bias, kept, True if bias is None else draw(st.booleans()))
    actual, expected = ops.pack_values(*given_), reference.pack_values(*given_)
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[2], expected[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_query_stats(dtype: torch.dtype) -> None:
    query = torch.randn(2, 5, 6, 9, dtype=dtype).transpose(1, 2)  # [B, Hq, L, D] as models have it
    for window in (1, 3, 50):
        actual = ops.query_stats(query, 3, window)
        torch.testing.assert_close(actual, reference.query_stats(query, 3, window))


def test_a_prefix_of_a_long_context_takes_any_number_of_chunks() -> None:
    s = store(packed=9000, dense=40, dims=(32, 16), kept=7)
    how = (None, None, 0.3, 0.0, None, *s.method, True)
    given_ = (s.query, *s.buffers(), *how)
    for actual, expected in zip(ops.attend(*given_), reference.attend(*given_), strict=True):
        assert_close(actual, expected, torch.float32)


@pytest.mark.parametrize("what", ["float64", "draws", "wide", "scattered"])
def test_what_the_kernel_cannot_do_goes_to_the_reference(what: str) -> None:
    dims = (12, 1100) if what == "wide" else (12, 10)
    s = store(dims=dims, recovery="gaussian" if what == "draws" else "degenerate")
    given_ = [s.query, *s.buffers(), None, None, 0.3, 0.0, None, *s.method, True]
    if what == "float64":
        given_[0] = s.query.double()
    if what == "scattered":
        given_[7] = s.values.mT.contiguous().mT
    for actual, expected in zip(ops.attend(*given_), reference.attend(*given_), strict=True):
        assert_close(actual, expected, torch.float32)


@pytest.mark.parametrize("other", [name for name in supported() if name != level()])
def test_every_other_level(other: str) -> None:
    if "SPARK_COMPILE_CPU" in os.environ:
        pytest.skip("this is one of the other levels")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(
        command, env={**os.environ, "SPARK_COMPILE_CPU": other}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
