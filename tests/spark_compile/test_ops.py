"""Every operator: its registration (schema, fake, tracing) and what it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stores import Store, store
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from spark_compile import ops
from spark_compile.kernels.reference.attend import attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def samples(dtype: torch.dtype) -> dict[str, list[tuple[Any, tuple[Any, ...]]]]:
    """Arguments of every operator, by its name, on odd shapes."""
    s = store(dtype, queries=3, dims=(13, 7), heads=(6, 2))
    dense = (s.query, s.key, s.value)
    mask = torch.rand(2, 1, 3, s.length) < 0.8
    bias = torch.randn(3, s.length, dtype=dtype)
    sinks = torch.randn(6, dtype=dtype)
    hows = [(None, 0, 0.3, 0.0, None), (mask, None, 0.3, 5.0, sinks), (bias, 8, 0.3, 0.0, None)]
    new = tuple(torch.randn(2, 2, 2, dim, dtype=dtype) for dim in (13, 7))
    longer_mask = torch.rand(2, 1, 3, s.length + 2) < 0.8
    grown = [(None, 10, 0.3, 0.0, None), (longer_mask, None, 0.3, 5.0, sinks)]
    norms = s.packed[3]
    bias_of = torch.rand(2, 2, 7)
    values = [(s.values, None, None, None)]
    for bias, kept, quantized in ((None, 7, True), (bias_of, 3, False), (bias_of, 3, True)):
        rows, bits, step = ops.pack_values(s.values, bias, kept, quantized)
        values.append((rows, None if bias is None else bits, step, bias))
    return {
        "attention": [(*dense, *how) for how in hows],
        "kv_append": [(s.key, s.key[:, :, :1]), (None, s.key)],
        "query_stats": [(s.query, 2, 2), (s.query, 2, 9)],
        "prune": [
            (s.key, norms, norms * 2, 4, recovery, saliency)
            for recovery in ("degenerate", "gaussian")
            for saliency in ("squared", "absolute")
        ],
        "append": [
            (s.tail.clone(), new[0], s.length, s.packed[4]),
            (s.values.clone(), new[1], s.length),
        ],
        "attend": [
            (s.query, *s.buffers(), *how, *s.method, lse)
            for how in hows
            for lse in (False, True)
        ],
        "append_attend": [
            (s.query, *new, *s.buffers(), *how, *s.method, lse)
            for how in grown
            for lse in (False, True)
        ],
        "sliding_append_attend": [
            (s.query, torch.tensor(0), torch.tensor(0), *new, *s.buffers(), *how, *s.method)
            for how in grown
        ],
        "pack_values": [
            (s.value, None, 7, True), (s.value, bias_of, 3, False), (s.value, bias_of, 3, True)
        ],
        "append_values": [
            (*(None if t is None else t.clone() for t in stored), new[1], s.length)
            for stored in values
        ],
        "recover": [(*s.packed, s.tail, s.length, *s.method)],
        "first_rows": [
            (s.values, s.length), (s.values, 0), *((v[0], s.length, *v[1:]) for v in values)
        ],
    }  # fmt: skip


NAMES = tuple(samples(torch.float32))


def test_every_operator_is_sampled() -> None:
    defined = {
        value._opname
        for value in vars(ops).values()
        if isinstance(value, torch._ops.OpOverload) and value.namespace == "spark"
    }
    assert defined == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_registration_holds(name: str) -> None:
    half_precision = samples(torch.bfloat16)[name][-1]
    for arguments in (*samples(torch.float32)[name], half_precision):
        torch.library.opcheck(getattr(torch.ops.spark, name).default, arguments)


def test_a_growing_store_needs_one_graph() -> None:
    compiled = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=compiled, dynamic=True, fullgraph=True)
    def step(s: Store, length: int, new: tuple[Tensor, Tensor]) -> Tensor:
        how = (None, length, 0.4, 0.0, None, *s.method)
        return ops.append_attend(s.query, *new, *s.packed, s.tail, s.values, length, *how)[0]

    for packed, dense in ((17, 11), (7, 9), (12, 3)):
        s = store(packed=packed, dense=dense, sink_tokens=2)
        new = torch.randn(2, 2, 1, 12), torch.randn(2, 2, 1, 10)
        key, value = torch.cat((s.key, new[0]), 2), torch.cat((s.value, new[1]), 2)
        expected, _ = attention(s.query, key, value, None, None, 0.4, 0.0, None)
        torch.testing.assert_close(step(s, s.length, new), expected)
    assert compiled.frame_count == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["attention", "attend", "append_attend", "recover"])
def test_outputs_have_the_dtype_of_the_inputs(name: str, dtype: torch.dtype) -> None:
    result = getattr(ops, name)(*samples(dtype)[name][-1])
    assert (result if isinstance(result, Tensor) else result[0]).dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_non_contiguous_inputs_change_nothing(name: str) -> None:
    for arguments in samples(torch.float32)[name]:
        scattered = [_scattered(a) if isinstance(a, Tensor) else a for a in arguments]
        expected, result = (getattr(ops, name)(*given) for given in (arguments, scattered))
        torch.testing.assert_close(result, expected)
        if name == "append":
            torch.testing.assert_close(scattered[0], arguments[0])
        if name == "append_attend":
            torch.testing.assert_close(scattered[8:10], list(arguments[8:10]))


def _scattered(tensor: Tensor) -> Tensor:
    """The same values, laid out with the dimensions reversed and every second element unused."""
    if tensor.dim() == 0:
        return tensor
    spread = tensor.new_empty(*reversed(tensor.shape), 2)[..., 0]
    return spread.permute(*reversed(range(tensor.dim()))).copy_(tensor)


@pytest.mark.parametrize("recovery", ["degenerate", "none", "exponential", "gaussian"])
@pytest.mark.parametrize("saliency", ["squared", "absolute"])
@pytest.mark.parametrize("sink_tokens", [0, 2])
def test_attend_is_recover_and_dense_attention(
    recovery: str, saliency: str, sink_tokens: int
) -> None:
    s = store(queries=2, recovery=recovery, saliency=saliency, sink_tokens=sink_tokens)
    how = (torch.rand(2, 4, 2, 11) < 0.7, 9, 0.4, 3.0, torch.randn(4))
    output, lse = ops.attend(s.query, *s.buffers(), *how, *s.method, True)
    expected, expected_lse = attention(s.query, s.key, s.value, *how)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert ops.attend(s.query, *s.buffers(), *how, *s.method)[1].numel() == 0


@pytest.mark.parametrize(("packed", "dense"), [(0, 3), (6, 1), (6, 0), (4, 4)])
def test_append_attend_is_append_and_dense_attention(packed: int, dense: int) -> None:
    s = store(queries=3, packed=packed, dense=dense, sink_tokens=min(dense, 1))
    new_key, new_value = torch.randn(2, 2, 3, 12), torch.randn(2, 2, 3, 10)
    *rows, tail, values, length = s.buffers()
    how = (None, length, 0.4, 0.0, None)
    output, _ = ops.append_attend(
        s.query, new_key, new_value, *rows, tail, values, length, *how, *s.method
    )
    key, value = torch.cat((s.key, new_key), 2), torch.cat((s.value, new_value), 2)
    torch.testing.assert_close(output, attention(s.query, key, value, *how)[0])
    assert torch.equal(tail[:, :, dense : dense + 3], new_key)
    assert torch.equal(values[:, :, length : length + 3], new_value)
    assert torch.equal(tail[:, :, :dense], s.tail[:, :, :dense])
    assert torch.equal(values[:, :, :length], s.value)


@pytest.mark.parametrize("recovery", ["degenerate", "none", "exponential", "gaussian"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unused_rows_are_never_read(dtype: torch.dtype, recovery: str) -> None:
    results = []
    for poison in (0.0, torch.nan):
        torch.manual_seed(5)
        s = store(dtype, queries=2, recovery=recovery, poison=poison)
        new = torch.randn(2, 2, 2, 12, dtype=dtype), torch.randn(2, 2, 2, 10, dtype=dtype)
        how = (None, s.length, 0.4, 0.0, None, *s.method, True)
        results.append((
            s.key,
            *ops.attend(s.query, *s.buffers(), *how),
            *ops.append_attend(s.query, *new, *s.buffers(), *how),
            ops.first_rows(s.values, s.length),
        ))  # fmt: skip
    for clean, poisoned in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, poisoned)
