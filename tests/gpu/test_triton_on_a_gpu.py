"""What only a GPU can show of the Triton kernels; their numerics are in ``tests/kernels``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from spark_compile import ops as _ops  # noqa: F401  (defines the operators)
from spark_compile.kernels import triton as kernels
from spark_compile.kernels.formats import parse
from spark_compile.kernels.reference.store import ALL
from spark_compile.kernels.spec import Spec

REFERENCE = torch.ops.spark_reference
FORMATS = (
    ("spark(kept={0})", "dense"),
    ("spark(kept={0},stored=int8)", "pruned(kept={0},stored=int8)"),
    ("int8", "int8"),
    ("quantized(bits=6,scaled=True)", "quantized(bits=6)"),
    ("quantized(bits=8,scaled=True)", "quantized(bits=6)"),
    ("quantized(bits=4-2-2-1,scaled=True)", "quantized(bits=3)"),
    ("quantized(bits=5-3,scaled=True)", "quantized(bits=4)"),
    ("quantized(bits=4,scaled=True)", "quantized(bits=2)"),
    ("quantized(bits=3,scaled=True)", "quantized(bits=1)"),
)


def spec_of(
    formats: tuple[str, str] = FORMATS[1], dim: int = 128, dtype: torch.dtype = torch.bfloat16
) -> Spec:
    key, value = (parse(text.format(dim // 4), dim, dtype) for text in formats)
    return Spec(key, value, 32, 32, 4, 0, 0.09)


def new(
    spec: Spec, tokens: int = 1, *, batch: int = 2, heads: tuple[int, int] = (32, 8)
) -> list[Tensor]:
    """A query, a key and a value."""
    shape, dtype = (tokens, spec.key.head_dim), spec.key.dtype
    return [
        torch.randn(batch, count, *shape, dtype=dtype, device="cuda")
        for count in (heads[0], heads[1], heads[1])
    ]


def built(spec: Spec, tokens: int, capacity: int | None = None, **shape: Any) -> list[Tensor]:
    query, key, value = new(spec, tokens, **shape)
    return list(torch.ops.spark.build(key, value, [query], spec.text, capacity))


def check_stored(result: list[Tensor], expected: list[Tensor], spec: Spec, length: int) -> None:
    """Caches are worth the same, but for single channels that are all but equally salient.

    Which of those is kept depends on the order in which the norms are summed.
    """
    for i, is_key in ((0, True), (2, False)):
        ours, theirs = (
            torch.ops.spark.recover(*stored[i : i + 2], spec.text, is_key, length).float()
            for stored in (result, expected)
        )
        differ = ~torch.isclose(ours, theirs, atol=1e-2, rtol=1e-2)
        assert differ.float().mean() < 1e-5


def close(result: Any, expected: Any, dtype: torch.dtype) -> None:
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(result, expected, atol=tolerance, rtol=tolerance)


def test_the_operators_run_the_kernels() -> None:
    assert kernels.load()
    for name in ("build", "step"):
        operator = getattr(torch.ops.spark, name).default
        assert operator.has_kernel_for_dispatch_key("CUDA"), name


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_long_contexts(dtype: torch.dtype, dim: int, formats: tuple[str, str]) -> None:
    """40 steps: a page is packed at least once."""
    kernels.load()
    spec = spec_of(formats, dim, dtype)
    stored = built(spec, 9000)
    expected = [t.clone() for t in stored]
    rest = (None, None, None, ALL, None, spec.text)
    for _ in range(40):
        given = new(spec)
        result = torch.ops.spark.step(*given, *stored, *rest)
        close(result, REFERENCE.step(*given, *expected, *rest), dtype)
    check_stored(stored, expected, spec, 9040)


def test_a_prefill_is_stored_as_the_reference_does() -> None:
    kernels.load()
    for formats in FORMATS:
        spec = spec_of(formats)
        query, key, value = new(spec, 5000)
        stored = list(torch.ops.spark.build(key, value, [query], spec.text, None))
        expected = list(REFERENCE.build(key, value, [query], spec.text, None))
        check_stored(stored, expected, spec, 5000)


def test_a_step_in_one_graph_through_inductor() -> None:
    """Inductor sees the kernels; a growing cache neither breaks nor recompiles the graph."""
    kernels.load()
    spec = spec_of()
    rest = (None, None, None, ALL, None, spec.text)

    @torch.compile(dynamic=True, fullgraph=True)
    def step(query: Tensor, key: Tensor, value: Tensor, stored: list[Tensor]) -> Tensor:
        return torch.ops.spark_triton.step(query, key, value, *stored, *rest) * 2

    for tokens in (1000, 1200, 1500):
        stored = built(spec, tokens)
        given, expected = new(spec), [t.clone() for t in stored]
        wanted = REFERENCE.step(*given, *expected, *rest)
        close(step(*given, stored), wanted * 2, torch.bfloat16)
        check_stored(stored, expected, spec, tokens + 1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_offsets_beyond_32_bits() -> None:
    """More than 2^31 bytes in one buffer."""
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB")
    kernels.load()
    spec, shape = spec_of(FORMATS[0]), {"batch": 10, "heads": (8, 8)}
    stored = built(spec, 140_000, **shape)
    assert stored[2].numel() > 2**31
    given = new(spec, **shape)
    rest = (None, None, None, ALL, None, spec.text)
    last = [t[9:].clone() for t in (*given, *stored)]
    result = torch.ops.spark.step(*given, *stored, *rest)
    close(result[9:], REFERENCE.step(*last, *rest), torch.bfloat16)


@pytest.mark.parametrize("formats", FORMATS)
def test_a_step_can_be_captured_and_follows_the_counters(formats: tuple[str, str]) -> None:
    """One captured step, replayed: it appends, packs, evicts and goes back to a position."""
    kernels.load()
    spec = spec_of(formats)
    stored, given = built(spec, 500, capacity=600), new(spec)
    position = torch.tensor([500], device="cuda")
    rest = (None, None, None, ALL, position, spec.text)
    expected = [t.clone() for t in stored]
    kept = [t.clone() for t in stored]
    torch.ops.spark.step(*given, *stored, *rest)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = torch.ops.spark.step(*given, *stored, *rest)
    for buffer, before in zip(stored, kept, strict=True):
        buffer.copy_(before)
    for place in (*range(500, 570), 530, 531, 3, 4):
        position.fill_(place)
        for tensor, fresh in zip(given, new(spec), strict=True):
            tensor.copy_(fresh)
        graph.replay()
        close(output, REFERENCE.step(*given, *expected, *rest), torch.bfloat16)
    check_stored(stored, expected, spec, 600)


def test_a_step_does_not_wait_for_the_device() -> None:
    kernels.load()
    spec = spec_of()
    stored, given = built(spec, 500), new(spec)
    rest = (None, None, None, ALL, torch.tensor([499], device="cuda"), spec.text)
    torch.ops.spark.step(*given, *stored, *rest)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.spark.step(*given, *stored, *rest)
    finally:
        torch.cuda.set_sync_debug_mode("default")
