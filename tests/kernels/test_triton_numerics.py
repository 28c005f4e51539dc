"""The Triton kernels against the reference: on a GPU, or in Triton's interpreter.

The interpreter has to be chosen before Triton is imported; ``test_triton_interpreted`` runs this
file again in a process where it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from stores import with_room
from torch import Tensor

from spark_compile import ops as _ops  # noqa: F401  (defines spark_reference)
from spark_compile.kernels.reference import prune as reference_prune
from spark_compile.kernels.reference import values as reference_values

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("neither a GPU nor the interpreter", allow_module_level=True)

from spark_compile.kernels.triton import launch  # noqa: E402
from spark_compile.kernels.triton import ops as triton_ops  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
REFERENCE = torch.ops.spark_reference
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = tuple(TOLERANCES)


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


def scattered(tensor: Tensor | None) -> Tensor | None:
    """The same values with the dimensions reversed in memory and every second element unused."""
    if tensor is None or tensor.dim() == 0:
        return tensor
    spread = tensor.new_empty(*reversed(tensor.shape), 2)[..., 0]
    return spread.permute(*reversed(range(tensor.dim()))).copy_(tensor)


def stored(
    dtype: torch.dtype, *, dims: tuple[int, int] = (12, 10), heads: tuple[int, int] = (4, 2),
    queries: int = 1, packed: int = 37, dense: int = 21, kept: int = 5, room: int = 4,
    key_int8: bool = False, value_int8: bool = False, value_kept: int = 0,
    saliency: str = "squared", recovery: str = "degenerate", sink_tokens: int = 2,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of ``attend`` by name, but for the mask and what follows it."""
    (query_heads, kv_heads), (dim, value_dim) = heads, dims
    norms = torch.rand(2, kv_heads, dim) + 0.1
    keys = torch.randn(2, kv_heads, packed, dim, dtype=dtype)
    rows = reference_prune.prune(keys, norms, norms, kept, recovery, saliency, key_int8)
    value = torch.randn(2, kv_heads, packed + dense, value_dim, dtype=dtype)
    bias = torch.rand(2, kv_heads, value_dim) if value_kept else None
    packed_values = reference_values.pack_values(value, bias, value_kept or value_dim, value_int8)
    values, bits, scale = (with_room(t, room, torch.nan) for t in packed_values)
    return {
        "query": torch.randn(2, query_heads, queries, dim, dtype=dtype),
        **dict(
            zip(
                ("kept", "bits", "scale"),
                (with_room(t, room, torch.nan) for t in rows),
                strict=True,
            )
        ),
        "norms": norms,
        "packed_length": torch.tensor(packed, device="cpu"),
        "tail": with_room(torch.randn(2, kv_heads, dense, dim, dtype=dtype), room, torch.nan),
        "values": values,
        "length": packed + dense,
        "attn_mask": None, "causal_offset": None, "attn_scale": 0.4, "softcap": 0.0, "sinks": None,
        "sink_tokens": min(sink_tokens, dense), "recovery": recovery, "saliency": saliency,
        "return_lse": True,
        "value_bits": bits if value_kept else None,
        "value_scale": scale if value_kept or value_int8 else None,
        "value_bias": bias,
    }  # fmt: skip


def check_attend(case: dict[str, Any], dtype: torch.dtype, loaded: bool = False) -> None:
    """The kernels give the reference's output, with the packed length as a number or loaded."""
    expected = REFERENCE.attend(*case.values())
    tolerance = {"atol": TOLERANCES[dtype], "rtol": TOLERANCES[dtype]}
    attend = torch.ops.spark_triton.attend if loaded else triton_ops.EAGER["attend"]
    result = attend(*case.values())
    assert result[0].dtype == dtype
    torch.testing.assert_close(result, expected, **tolerance)


CASES: dict[str, dict[str, Any]] = {
    "decode": {},
    "odd group, odd sizes": {"dims": (13, 7), "heads": (6, 2), "queries": 3},
    "one group of 20": {"heads": (20, 1), "dims": (32, 32), "kept": 16},
    "words of 16 bits": {"dims": (80, 48), "kept": 40, "value_kept": 20},
    "words of 8 bits": {"dims": (72, 40), "kept": 20, "value_kept": 9},
    "words of 32 bits": {"dims": (128, 64), "kept": 26, "value_kept": 32, "queries": 2},
    "all channels kept": {"kept": 12},
    "one channel kept": {"kept": 1},
    "no recovery": {"recovery": "none"},
    "absolute saliency": {"saliency": "absolute"},
    "int8 keys": {"key_int8": True},
    "int8 values": {"value_int8": True},
    "pruned values": {"value_kept": 3},
    "int8 and pruned": {"key_int8": True, "value_int8": True, "value_kept": 3, "queries": 2},
    "nothing packed": {"packed": 0, "room": 3},
    "empty tail": {"dense": 0},
    "one token": {"packed": 0, "dense": 1},
    "many blocks": {"packed": 90, "dense": 70, "room": 40, "heads": (2, 1)},
    "no room": {"room": 0},
}


@pytest.mark.parametrize("name", CASES)
def test_attend(name: str) -> None:
    check_attend(stored(torch.float32, **CASES[name]), torch.float32)


@pytest.mark.parametrize("name", ["odd group, odd sizes", "nothing packed", "empty tail"])
def test_attend_with_a_loaded_length(name: str) -> None:
    check_attend(stored(torch.float32, **CASES[name]), torch.float32, loaded=True)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", ["odd group, odd sizes", "int8 and pruned"])
def test_attend_in_half_precision(name: str, dtype: torch.dtype) -> None:
    check_attend(stored(dtype, **CASES[name]), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_offsets_caps_and_sinks(dtype: torch.dtype) -> None:
    case = stored(dtype, queries=3, heads=(6, 2), packed=20, dense=11)
    length = case["length"]
    hows: tuple[dict[str, Any], ...] = (
        {"causal_offset": length - 3},
        {"causal_offset": 0, "sinks": torch.randn(6)},
        {"attn_mask": torch.rand(2, 1, 3, length) < 0.7, "softcap": 3.0},
        {"attn_mask": torch.randn(3, length, dtype=dtype), "causal_offset": 25},
        {"attn_mask": torch.rand(2, 6, 1, length) < 0.7, "sinks": torch.randn(6)},
    )
    for how in hows if dtype == torch.float32 else hows[2:4]:
        check_attend({**case, **how}, dtype)


def test_a_query_that_sees_nothing() -> None:
    case = stored(torch.float32, queries=2, packed=9, dense=5)
    mask = torch.ones(2, 1, 2, case["length"], dtype=torch.bool)
    mask[1, :, 1] = False
    output, lse = triton_ops.EAGER["attend"](*{**case, "attn_mask": mask}.values())
    assert (output[1, :, 1] == 0).all()
    assert lse[1, :, 1].isneginf().all()
    check_attend({**case, "attn_mask": mask}, torch.float32)
    check_attend({**case, "causal_offset": -1}, torch.float32)


def test_a_channel_that_no_query_looked_at_does_not_overflow() -> None:
    case = stored(torch.float16, saliency="absolute")
    case["norms"][:, :, 3] = 0.0
    output, _ = triton_ops.EAGER["attend"](*case.values())
    assert output.isfinite().all()


@pytest.mark.parametrize("name", ["odd group, odd sizes", "int8 and pruned"])
def test_non_contiguous_inputs_change_nothing(name: str) -> None:
    case = stored(torch.float32, **CASES[name])
    expected = triton_ops.EAGER["attend"](*case.values())
    spread = [scattered(v) if isinstance(v, Tensor) else v for v in case.values()]
    torch.testing.assert_close(triton_ops.EAGER["attend"](*spread), expected)


def test_random_recoveries_go_to_the_reference() -> None:
    for recovery in ("gaussian", "exponential"):
        case = stored(torch.float32, recovery=recovery)
        expected = REFERENCE.attend(*case.values())
        result = triton_ops.EAGER["attend"](*case.values())
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_return_lse_and_what_follows_may_be_left_out() -> None:
    *given, _, _, _, _ = stored(torch.float32).values()
    assert triton_ops.EAGER["attend"](*given)[1].numel() == 0


@pytest.mark.parametrize("name", ["decode", "int8 and pruned", "nothing packed", "empty tail"])
@pytest.mark.parametrize("spread", [False, True])
def test_append_attend(name: str, spread: bool) -> None:
    case = stored(torch.float32, **{**CASES[name], "queries": 2, "heads": (6, 2)})
    new = [torch.randn(2, 2, 2, size) for size in (12, 10)]
    case["causal_offset"] = case["length"]
    names = ("tail", "values", "value_bits", "value_scale")
    buffers: list[dict[str, Any]] = [
        {n: None if case[n] is None else case[n].clone() for n in names} for _ in range(3)
    ]
    if spread:
        buffers[1] = {n: scattered(t) for n, t in buffers[1].items()}
    operators = (
        REFERENCE.append_attend,
        triton_ops.EAGER["append_attend"],
        torch.ops.spark_triton.append_attend,
    )
    query, *rest = case
    results = []
    for operator, changed in zip(operators, buffers, strict=True):
        given = {**case, **changed}
        results.append(operator(given[query], *new, *(given[n] for n in rest)))
    for result, changed in zip(results[1:], buffers[1:], strict=True):
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=1e-5)
        for n in names:
            if changed[n] is not None:
                torch.testing.assert_close(changed[n], buffers[0][n], equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("saliency", ["squared", "absolute"])
def test_prune(saliency: str, quantized: bool, dtype: torch.dtype) -> None:
    for dim, kept in ((12, 5), (13, 13), (72, 1)):
        key, norms = torch.randn(2, 2, 5, dim, dtype=dtype), torch.rand(2, 2, dim)
        given = (key, norms, norms.flip(1) + 0.1, kept, "degenerate", saliency, quantized)
        expected = REFERENCE.prune(*given)
        spread = [scattered(t) if isinstance(t, Tensor) else t for t in given]
        check_packed(triton_ops.EAGER["prune"](*spread), expected)
        check_packed(torch.ops.spark_triton.prune(*given), expected)


def check_packed(result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Rows and planes are equal, and the scale but for the order of its sum."""
    torch.testing.assert_close(result[:2], expected[:2], rtol=0, atol=0)
    torch.testing.assert_close(result[2], expected[2])


def test_of_equally_salient_channels_the_first_are_kept() -> None:
    key = torch.tensor([1.0, -1.0, 0.0, 1.0, 2.0, 1.0, 0.0, -0.0]).expand(1, 1, 3, 8)
    norms = torch.ones(1, 1, 8)
    for kept in (1, 2, 3, 4, 7):
        given = (key, norms, norms, kept, "none", "squared", False)
        check_packed(triton_ops.EAGER["prune"](*given), REFERENCE.prune(*given))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kept", "quantized"), [(0, True), (4, False), (4, True)])
def test_pack_and_append_values(kept: int, quantized: bool, dtype: torch.dtype) -> None:
    for dim in (10, 33):
        value, bias = torch.randn(2, 3, 5, dim, dtype=dtype), torch.rand(2, 3, dim)
        given = (value, bias if kept else None, kept or dim, quantized)
        packed = REFERENCE.pack_values(*given)
        for pack in (triton_ops.EAGER["pack_values"], torch.ops.spark_triton.pack_values):
            check_packed(pack(*given), packed)
        buffers = [with_room(t, 4, torch.nan) if t.numel() else None for t in packed]
        new = scattered(torch.randn(2, 3, 3, dim, dtype=dtype))
        changed = [[None if t is None else t.clone() for t in buffers] for _ in range(3)]
        changed[1] = [scattered(t) for t in changed[1]]
        for append, stores in zip(
            (REFERENCE.append_values, triton_ops.EAGER["append_values"],
             torch.ops.spark_triton.append_values), changed, strict=True,
        ):  # fmt: skip
            append(*stores, bias if kept else None, new, 5)
        for stores in changed[1:]:
            torch.testing.assert_close(stores, changed[0], equal_nan=True)


def test_what_does_not_fit_is_named() -> None:
    case = stored(torch.float32, packed=6, dense=5, room=2)
    attend = triton_ops.EAGER["attend"]
    for changes, message in (
        ({"length": 14}, "length is 14: allowed is 6 to 13"),
        ({"packed_length": torch.tensor(9, device="cpu")}, "packed_length is 9: allowed is 0 to 8"),
        ({"saliency": "cubic"}, "saliency is cubic: allowed is squared, absolute"),
        ({"query": case["query"].double()}, "query.dtype is torch.float64"),
        ({"norms": case["norms"][:, :1]}, "norms has the shape"),
        ({"tail": case["tail"][..., :5]}, "tail has the shape"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(*{**case, **changes}.values())
    rows = case["tail"].clone()
    for start in (-1, 6):
        with pytest.raises(ValueError, match="do not fit into a buffer of 7"):
            launch.append(rows, torch.zeros(2, 2, 2, 12), start, 0)
    torch.testing.assert_close(rows, case["tail"], equal_nan=True)


def test_loaded_bounds_never_lead_out_of_the_buffers() -> None:
    """Where the packed length is loaded, nothing can be raised; rows outside are left out."""
    case = stored(torch.float32, packed=6, dense=5, room=2)
    for packed in (10**9, -5):
        given = {**case, "packed_length": torch.tensor(packed, device="cpu"), "length": 100}
        torch.ops.spark_triton.attend(*given.values())
    for packed, expected in ((0, [0, 0, 0, 1]), (4, [1, 1, 0, 0]), (99, [0, 0, 0, 0])):
        rows = torch.zeros(1, 1, 4, 8)
        launch.append(rows, torch.ones(1, 1, 3, 8), 3, torch.tensor(packed))
        assert rows[0, 0, :, 0].tolist() == expected
