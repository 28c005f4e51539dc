"""What only a GPU can show of the Triton kernels; their numerics are in ``tests/kernels``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stores import with_room
from torch import Tensor

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from spark_compile import ops as spark_ops  # noqa: F401
from spark_compile.kernels import triton as kernels


def stored(
    dtype: torch.dtype, *, batch: int = 2, tokens: int = 9000, tail: int = 300, room: int = 100,
    heads: tuple[int, int] = (32, 8), dim: int = 128, kept: int = 26,
) -> tuple[Any, ...]:  # fmt: skip
    """Query and buffers with ``room`` rows of NaN, made by the reference on the GPU."""
    query_heads, kv_heads = heads

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=dtype, device="cuda")

    def roomy(rows: Tensor) -> Tensor:
        return with_room(rows, room, torch.nan)

    norms = torch.rand(batch, kv_heads, dim, device="cuda") + 0.1
    key = random(batch, kv_heads, tokens - tail, dim)
    rows = torch.ops.spark_reference.prune(key, norms, norms, kept, "degenerate", "squared")
    return (
        random(batch, query_heads, 1, dim), *map(roomy, rows), norms, torch.tensor(tokens - tail),
        roomy(random(batch, kv_heads, tail, dim)), roomy(random(batch, kv_heads, tokens, dim)),
        tokens,
    )  # fmt: skip


HOW = (None, None, 0.09, 0.0, None, 4, "degenerate", "squared")


def test_the_operators_run_the_kernels() -> None:
    assert kernels.load()
    for name in ("prune", "pack_values", "append", "append_values", "attend", "append_attend"):
        operator = getattr(torch.ops.spark, name).default
        assert operator.has_kernel_for_dispatch_key("CUDA"), name


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_long_contexts(dtype: torch.dtype, dim: int) -> None:
    kernels.load()
    given = stored(dtype, dim=dim, kept=dim // 4)
    expected = torch.ops.spark_reference.attend(*given, *HOW, True)
    result = torch.ops.spark.attend(*given, *HOW, True)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(result, expected, atol=tolerance, rtol=tolerance)


def test_a_step_in_one_graph_through_inductor() -> None:
    """Inductor sees the kernels; a growing cache neither breaks nor recompiles the graph."""

    @torch.compile(dynamic=True, fullgraph=True)
    def step(query: Tensor, new: Tensor, stores: tuple[Tensor, ...], length: int) -> Tensor:
        output, _ = torch.ops.spark_triton.append_attend(query, new, new, *stores, length, *HOW)
        return output * 2

    for tokens in (1000, 1200, 1500):
        query, *stores, length = stored(torch.bfloat16, tokens=tokens)
        new = torch.randn(2, 8, 1, 128, dtype=torch.bfloat16, device="cuda")
        copies = [t.clone() for t in stores]
        expected, _ = torch.ops.spark_reference.append_attend(
            query, new, new, *copies, length, *HOW
        )
        result = step(query, new, tuple(stores), length)
        torch.testing.assert_close(result, expected * 2, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(stores[5][:, :, :301], copies[5][:, :, :301])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_offsets_beyond_32_bits() -> None:
    """More than 2^31 values in one buffer."""
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB")
    given = stored(torch.bfloat16, batch=16, tokens=140_000, heads=(8, 8), tail=40, room=10)
    assert given[7].numel() > 2**31
    last = slice(15, None)
    expected = torch.ops.spark_reference.attend(
        *(t[last] if isinstance(t, Tensor) and t.dim() else t for t in given), *HOW
    )
    kernels.load()
    result = torch.ops.spark.attend(*given, *HOW)
    torch.testing.assert_close(result[0][last], expected[0], atol=1e-2, rtol=1e-2)


def test_the_packed_length_may_be_captured_on_the_device() -> None:
    """A captured step follows the packed length when it is loaded from the device."""
    from spark_compile.kernels.triton import launch

    query, kept, bits, scale, norms, packed, tail, values, length = stored(torch.bfloat16)
    loaded = packed.cuda()
    how = (*HOW, False, None, None, None)

    def attend() -> Tensor:
        return launch.attend(
            query, kept, bits, scale, norms, loaded, tail, values, length, *how
        )[0]  # fmt: skip

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = attend()
    graph.replay()
    expected = torch.ops.spark_reference.attend(
        query, kept, bits, scale, norms, packed, tail, values, length, *HOW
    )[0]
    torch.testing.assert_close(output, expected, atol=1e-2, rtol=1e-2)
