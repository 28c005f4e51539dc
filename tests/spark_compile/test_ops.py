"""Every operator: its registration (schema, fake, tracing) and what it computes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from spark_compile import SparkWarning, ops
from spark_compile.kernels import cpu
from spark_compile.kernels.eviction import parse_scorer
from spark_compile.kernels.formats import parse
from spark_compile.kernels.layout import DROPPED, LENGTH, counters
from spark_compile.kernels.reference.attend import attention
from spark_compile.kernels.reference.evict import take
from spark_compile.kernels.reference.store import ALL
from spark_compile.kernels.spec import Spec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVICT = parse_scorer("snapkv(tokens=12,window=3)")
HEADS, GROUPS, KEY_DIM, VALUE_DIM = 2, 3, 13, 7
FORMATS = [
    ("dense", "dense"), ("int8", "int8"), ("spark(kept=5)", "pruned(kept=3)"),
    ("spark(kept=5,stored=int8,recovery=gaussian)", "pruned(kept=3,stored=int8)"),
]  # fmt: skip


def spec_of(formats: tuple[str, str], dtype: torch.dtype = torch.float32, **numbers: Any) -> Spec:
    key, value = formats
    return Spec(
        parse(key, KEY_DIM, dtype), parse(value, VALUE_DIM, dtype),
        **{"window": 4, "recent": 3, **numbers}, scale=0.3, softcap=5.0,
    )  # fmt: skip


def tokens(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values."""
    query = torch.randn(2, GROUPS * HEADS, count, KEY_DIM, dtype=dtype)
    key, value = (torch.randn(2, HEADS, count, dim, dtype=dtype) for dim in (KEY_DIM, VALUE_DIM))
    return query, key, value


def built(spec: Spec, length: int, capacity: int | None = None) -> list[Tensor]:
    """The stored tensors of random tokens."""
    query, key, value = tokens(length, spec.key.dtype)
    if spec.evict is None:
        return list(ops.build(key, value, [query], spec.text, capacity))
    kept = ops.evict(key, [query], None, 0, spec.text)
    rows = take(key, kept), take(value, kept)
    return list(ops.build(*rows, [query], spec.text, capacity, kept))


def copies(arguments: Any) -> Any:
    """Arguments of an operator, with tensors that it may change."""
    return [a.clone() if isinstance(a, Tensor) else a for a in arguments]


def samples(dtype: torch.dtype) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of every operator, by its name, on odd shapes."""
    query, key, value = tokens(3, dtype)
    _, past, past_value = tokens(9, dtype)
    mask, bias = torch.rand(2, 1, 3, 9) < 0.8, torch.randn(3, 9, dtype=dtype)
    sinks = torch.randn(GROUPS * HEADS, dtype=dtype)
    hows = [(None, 0, 0.3, 0.0, None), (mask, None, 0.3, 5.0, sinks), (bias, 8, 0.3, 0.0, None)]
    specs = [spec_of(formats, dtype, sinks=1) for formats in FORMATS]
    specs.append(spec_of(FORMATS[2], dtype, min_tokens=40))
    longer, at = torch.rand(2, 1, 3, 30) < 0.8, torch.tensor([9, 10, 11])
    steps = [
        (query, key, value, *built(spec, 20, capacity), *how, spec.text)
        for spec in specs
        for capacity in (None, 28)
        for how in ((None, None, 20, ALL, None), (longer, sinks, None, ALL, at),
                    (None, None, None, None, None))
    ]  # fmt: skip
    evicting = spec_of(FORMATS[2], dtype, sinks=1, evict=EVICT)  # 8 of 20 tokens
    steps += [
        (query, key, value, *built(evicting, 20), *how, evicting.text)
        for how in ((None, None, 20, ALL, None), (longer, sinks, None, ALL, None))
    ]
    prompts = [tokens(count, dtype) for count in (20, 9)]
    return {
        "evict": [
            (dense, [rows], mask, offset, evicting.text)
            for rows, dense, _ in prompts
            for mask, offset in ((None, 0), (torch.rand(2, 1, 1, dense.shape[2]) < 0.8, None))
        ],
        "attention": [(query, past, past_value, *how) for how in hows],
        "kv_append": [
            (past, key, None, 2), (None, key, None, 2), (past, key, torch.tensor([4]), 2),
            (past, past[:, :1], None, 1),
        ],
        "build": [
            (past, past_value, queries, spec.text, capacity)
            for spec in specs
            for queries in ([], [query], [query, tokens(9, dtype)[0]])
            for capacity in (None, 28)
        ],
        "step": steps,
        "recover": [
            (*built(spec, 20, capacity)[first : first + 2], spec.text, first == 0, length)
            for spec in specs
            for first in (0, 2)
            for capacity, length in ((None, 20), (28, 28))
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
    for arguments in (*samples(torch.float32)[name][::2], half_precision):
        torch.library.opcheck(getattr(torch.ops.spark, name).default, tuple(copies(arguments)))


@pytest.mark.parametrize("name", ["build", "step", "recover"])
@pytest.mark.parametrize("min_tokens", [0, 15])
def test_lengths_that_change_need_one_graph(name: str, min_tokens: int) -> None:
    compiled = CompileCounterWithBackend("aot_eager")
    spec = spec_of(FORMATS[2], min_tokens=min_tokens)

    @torch.compile(backend=compiled, dynamic=True, fullgraph=True)
    def run(query: Tensor, key: Tensor, value: Tensor, stored: list[Tensor]) -> Any:
        if name == "build":
            return ops.build(key, value, [query], spec.text, None)
        if name == "step":
            return ops.step(query[:, :, -2:], key[:, :, -2:], value[:, :, -2:], *stored, None, None,
                            key.shape[2], ALL, None, spec.text)  # fmt: skip
        return ops.recover(*stored[:2], spec.text, True, key.shape[2])

    for length in (33, 17, 90):  # none is another size of the first call
        dense = tokens(length)
        room = 100 if name == "step" else None
        stored = list(ops.build(*dense[1:], [dense[0]], spec.text, room))
        result = run(*dense, copies(stored))
        if name == "build":
            assert all(map(torch.equal, result, stored))
        elif name == "step":
            args = [t[:, :, -2:] for t in dense]
            expected = ops.step(*args, *stored, None, None, length, ALL, None, spec.text)
            torch.testing.assert_close(result, expected)
        else:
            expected = ops.recover(*stored[:2], spec.text, True, length)
            torch.testing.assert_close(result, expected)
    assert compiled.frame_count == 1


def test_prompts_that_are_evicted_or_not_need_one_graph() -> None:
    compiled = CompileCounterWithBackend("aot_eager")
    text = spec_of(FORMATS[2], sinks=1, evict=EVICT).text

    @torch.compile(backend=compiled, dynamic=True, fullgraph=True)
    def run(query: Tensor, key: Tensor, value: Tensor) -> Any:
        kept = ops.evict(key, [query], None, 0, text)
        return ops.build(take(key, kept), take(value, kept), [query], text, None, kept)

    for length in (33, 7, 90, 12, 13):
        dense = tokens(length)
        keys = run(*dense)[:2]
        assert counters(keys[1])[0, 0, LENGTH] == min(length, 12)
        assert counters(keys[1])[0, 0, DROPPED] == max(length - 12, 0)
    assert compiled.frame_count == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["attention", "step", "recover"])
def test_outputs_have_the_dtype_of_the_inputs(name: str, dtype: torch.dtype) -> None:
    result = getattr(ops, name)(*samples(dtype)[name][-1])
    assert result.dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_non_contiguous_inputs_change_nothing(name: str) -> None:
    for arguments in samples(torch.float32)[name]:
        scattered = [_scattered(a) if isinstance(a, Tensor) else a for a in arguments]
        expected, result = (getattr(ops, name)(*given) for given in (copies(arguments), scattered))
        if name == "build":  # what is worth the same may have been rounded otherwise
            expected, result = (_recovered(stored, arguments) for stored in (expected, result))
        torch.testing.assert_close(result, expected)


def _recovered(stored: list[Tensor], arguments: tuple[Any, ...]) -> list[Tensor]:
    """What the stored tensors that ``build`` makes of its arguments are worth."""
    text, length = arguments[3], arguments[0].shape[2]
    return [ops.recover(*stored[i : i + 2], text, i == 0, length) for i in (0, 2)]


def _scattered(tensor: Tensor) -> Tensor:
    """The same values, laid out with the dimensions reversed and every second element unused.

    The bytes of stored tensors stay side by side, as fields are views of them.
    """
    if tensor.dim() == 0:
        return tensor
    if tensor.dtype == torch.uint8:
        spread = tensor.new_empty(*tensor.shape[-2::-1], tensor.shape[-1] + 8)[..., 8:]
        order = [*reversed(range(tensor.dim() - 1)), tensor.dim() - 1]
        return spread.permute(order).copy_(tensor)
    spread = tensor.new_empty(*reversed(tensor.shape), 2)[..., 0]
    return spread.permute(*reversed(range(tensor.dim()))).copy_(tensor)


@pytest.mark.parametrize("formats", FORMATS, ids=str)
@pytest.mark.parametrize("numbers", [{}, {"sinks": 2}, {"min_tokens": 30}], ids=str)
@pytest.mark.parametrize("how", ["plain", "causal", "mask and sinks"])
def test_a_step_is_recover_attention_and_append(
    formats: tuple[str, str], numbers: dict[str, int], how: str
) -> None:
    spec = spec_of(formats, **numbers)
    stored, new = built(spec, 20, 40), tokens(3)
    past = [ops.recover(*stored[i : i + 2], spec.text, i == 0, 20) for i in (0, 2)]
    key, value = (torch.cat(pair, 2) for pair in zip(past, new[1:], strict=True))
    mask = torch.rand(2, 1, 3, 23) < 0.7 if how == "mask and sinks" else None
    sinks = torch.randn(6) if how == "mask and sinks" else None
    offset = 20 if how == "causal" else None
    output = ops.step(*new, *stored, mask, sinks, offset, ALL, None, spec.text)
    expected, _ = attention(new[0], key, value, mask, offset, 0.3, 5.0, sinks)
    torch.testing.assert_close(output, expected)
    for i, dense in ((0, key), (2, value)):
        after = ops.recover(*stored[i : i + 2], spec.text, i == 0, 23)
        assert torch.equal(after[:, :, -3:], dense[:, :, -3:])
        assert torch.equal(after[:, :, :13], dense[:, :, :13])


@pytest.mark.parametrize("formats", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unused_bytes_are_never_read(dtype: torch.dtype, formats: tuple[str, str]) -> None:
    spec, results = spec_of(formats, dtype, sinks=1), []
    for poison in (0x00, 0xFF):  # of floats the second one is NaN
        torch.manual_seed(5)
        stored, new = built(spec, 20, 60), tokens(2, dtype)
        for side, first in (("key", 0), ("value", 2)):
            pages, head = stored[first : first + 2]
            pages[:, :, 4:] = poison
            spec.head(side).tail(head)[:, :, 4:].view(torch.uint8).fill_(poison)  # type: ignore[arg-type]
        outputs = [ops.step(*new, *stored, None, None, None, ALL, None, spec.text) for _ in "abcd"]
        sides = [ops.recover(*stored[i : i + 2], spec.text, i == 0, 40) for i in (0, 2)]
        results.append((*outputs, *sides))
    for clean, poisoned in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, poisoned)


def test_recover_fills_a_capacity_with_zeros() -> None:
    spec = spec_of(FORMATS[0])
    stored = built(spec, 20, 33)
    dense = ops.recover(*stored[:2], spec.text, True, 33)
    assert torch.equal(dense[:, :, :20], ops.recover(*stored[:2], spec.text, True, 20))
    assert dense[:, :, :20].all()
    assert not dense[:, :, 20:].any()


@pytest.mark.parametrize(
    ("device", "reason"),
    [("cuda", "Triton cannot be imported"), ("mps", "there are some for CPU and CUDA")],
)
def test_a_device_without_native_kernels_is_told(
    monkeypatch: pytest.MonkeyPatch, device: str, reason: str
) -> None:
    monkeypatch.setattr("spark_compile.kernels.triton.load", lambda: False)
    text = rf"no native kernels on {device} \({reason}\): the slow reference runs instead"
    with pytest.warns(SparkWarning, match=text):
        assert not ops._accelerated.__wrapped__(device)


NOT_NATIVE = {
    "drawn recovery": ("spark(kept=5,recovery=gaussian)", 13, torch.float32),
    "large head": ("spark(kept=5)", 2048, torch.float32),
    "large dense head": ("dense", 2048, torch.bfloat16),
}


@pytest.mark.skipif(not cpu.load(), reason="there are no native kernels here")
@pytest.mark.parametrize("name", NOT_NATIVE)
def test_what_native_kernels_leave_to_the_reference_is_told(name: str) -> None:
    text, dim, dtype = NOT_NATIVE[name]
    format = parse(text, dim, dtype)
    spec = Spec(format, parse("dense", dim, dtype), window=4, recent=3)
    query, key = (torch.randn(1, 1, 9, dim, dtype=dtype) for _ in range(2))
    what = rf"{re.escape(format.text)} of {dim} {dtype} channels.*: the slow reference runs instead"
    with pytest.warns(SparkWarning, match=f"no native kernel does this build with {what}"):
        stored = torch.ops.spark.build(key, key, [query], spec.text, None)
    new = key[:, :, :1]
    with pytest.warns(SparkWarning, match=f"no native kernel does this step with {what}"):
        torch.ops.spark.step(
            query[:, :, :1], new, new, *stored, None, None, None, ALL, None, spec.text
        )
