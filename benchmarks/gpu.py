"""The Triton kernels on a GPU: numerics first, then a sweep against dense attention.

    python -m benchmarks gpu

Writes ``results/gpu-<device>.jsonl``. Every time is the median of CUDA events with the cache
flushed between calls; bytes are those that a call has to read, so that bytes / s over the bandwidth
of reading is how near the attention is to the limit of the memory. The kernels are measured through
CUDA graphs, as Inductor would run them: otherwise short contexts measure Python.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple
from unittest import mock

import torch
import typer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from spark_compile import ops as _ops  # noqa: F401  (defines the operators)
from spark_compile.kernels.formats import kept_channels, parse
from spark_compile.kernels.reference.store import ALL
from spark_compile.kernels.spec import Spec, parse_spec
from spark_compile.kernels.triton import blocks

from .measure import machine_facts
from .results import Result, ratios

WINDOW, RECENT, SINKS = 32, 96, 4
BUDGET_S = 420.0


class Shape(NamedTuple):
    """One point of the sweep."""

    batch: int
    tokens: int
    group: int
    dim: int
    dtype: torch.dtype
    key: str
    """Format of the keys, ``{0}`` being the kept channels at 80 % pruned and ``{1}`` at 50 %."""
    value: str = "dense"
    kv_heads: int = 8

    def spec(self) -> Spec:
        counts = [kept_channels(self.dim, ratio) for ratio in (0.8, 0.5)]
        key, value = (
            parse(text.format(*counts), self.dim, self.dtype) for text in (self.key, self.value)
        )
        return Spec(key, value, WINDOW, RECENT, SINKS, 0, self.dim**-0.5)


def sweep() -> Iterator[Shape]:
    """One typical decoder with one parameter changed at a time, most important first."""
    six = ("quantized(bits=6,scaled=True)", "quantized(bits=6)")
    four = ("quantized(bits=4,scaled=True)", "quantized(bits=4)")
    least = ("quantized(bits=4-2-2-1,scaled=True)", "quantized(bits=3)")
    pruned = ("spark(kept={0},stored=int8)", "int8")
    usual = Shape(1, 32768, 4, 128, torch.bfloat16, *six)
    for tokens in (32768, 131072, 4096):
        for key, value in (six, four, least, ("int8", "int8"), ("dense", "dense"), pruned):
            yield usual._replace(tokens=tokens, key=key, value=value)
    yield usual._replace(key="spark(kept={1})", value="dense")
    yield usual._replace(key="spark(kept={0})", value="pruned(kept={1},stored=int8)")
    for batch, tokens in ((8, 4096), (8, 32768), (32, 4096)):
        yield usual._replace(batch=batch, tokens=tokens)
    for group in (1, 7, 8):
        yield usual._replace(group=group)
    for dim in (64, 80, 256):
        yield usual._replace(dim=dim)
    yield usual._replace(dtype=torch.float16)
    yield usual._replace(dtype=torch.float32)


def block_shapes() -> Iterator[tuple[int, int, int]]:
    """Tokens, warps and stages of ``attend_split`` that ``--tune`` tries."""
    yield from itertools.product((16, 32, 64, 128), (2, 4, 8), (1, 2, 3))


def median_ms(run: Callable[[], Any], flush: Tensor, graph: bool = True, calls: int = 20) -> float:
    """The median time of a call, through a CUDA graph where it can be captured."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    start = run
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        start = captured.replay
    times = []
    for _ in range(calls):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        start()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def read_bandwidth(flush: Tensor) -> float:
    """Bytes / s of a large sum, which does nothing but read."""
    source = torch.empty(1 << 27, dtype=torch.int64, device="cuda")
    return source.nbytes / median_ms(source.sum, flush) * 1e3


def arguments(shape: Shape) -> tuple[Any, ...]:
    """What ``step`` takes for one query per sequence; the cache is built by the kernels."""
    query, key, value = dense_tensors(shape)
    spec = shape.spec().text
    stored = torch.ops.spark_triton.build(key, value, [query], spec, shape.tokens + WINDOW)
    new = (rows[:, :, :1].contiguous() for rows in (key, value))
    # The position makes every call begin with the same tokens.
    position = torch.tensor([shape.tokens], device="cuda")
    return query, *new, *stored, None, None, None, ALL, position, spec


def nbytes(given: tuple[Any, ...]) -> int:
    """Bytes of what a step has to read."""
    return sum(t.numel() * t.element_size() for t in given if isinstance(t, Tensor))


def spark(given: tuple[Any, ...]) -> Callable[[], Any]:
    """A whole step: attention, appending and what packing costs where no page is due."""
    from spark_compile.kernels.triton.ops import EAGER

    return lambda: EAGER["step"](*given)


def attention(given: tuple[Any, ...]) -> Callable[[], Any]:
    """The attention alone."""
    from spark_compile.kernels.triton import launch, sides

    query, key, value, *stored = given[:7]
    spec = parse_spec(given[-1])
    operands = (
        sides.operand(stored[0], stored[1], key, spec, "key"),
        sides.operand(stored[2], stored[3], value, spec, "value"),
    )
    return lambda: launch.attend(query, *operands, None, None, None, spec)[0]


def dense_tensors(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value."""

    def random(heads: int, tokens: int) -> Tensor:
        return torch.randn(shape.batch, heads, tokens, shape.dim, dtype=shape.dtype, device="cuda")

    kv_heads, tokens = shape.kv_heads, shape.tokens
    return random(kv_heads * shape.group, 1), random(kv_heads, tokens), random(kv_heads, tokens)


def dense(shape: Shape) -> dict[str, Callable[[], Any]]:
    """Dense attention of the same shape, by name."""
    query, key, value = dense_tensors(shape)
    runs = {
        "sdpa": lambda: scaled_dot_product_attention(query, key, value, enable_gqa=True),
    }
    # With a single query per head, as rows of one head, flash attention reads the keys once.
    rows = query.view(shape.batch, shape.kv_heads, shape.group, shape.dim)
    runs["sdpa, grouped rows"] = lambda: scaled_dot_product_attention(rows, key, value)
    for name, dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        runs[f"{name} cache + sdpa"] = _quantized(rows, key, value, dtype)
    return runs


def _quantized(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    """A dense cache of 8 bits per channel with a step per token, dequantized by Inductor."""
    step = key.new_full((*key.shape[:3], 1), 0.03)
    stored = [(t.float() / 0.03).clamp(-127, 127).to(dtype) for t in (key, value)]

    @torch.compile(dynamic=False)
    def run(query: Tensor, key: Tensor, value: Tensor, step: Tensor) -> Tensor:
        scores = (query @ (key.to(query.dtype) * step).mT).float() * query.shape[-1] ** -0.5
        return scores.softmax(-1).to(query.dtype) @ (value.to(query.dtype) * step)

    return lambda: run(query, *stored, step)


def flex(shape: Shape) -> Callable[[], Any]:
    """FlexAttention's decoding kernel."""
    from torch.nn.attention.flex_attention import flex_attention

    query, key, value = dense_tensors(shape)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(query, key, value, enable_gqa=True)


def numerics(shape: Shape) -> dict[str, float]:
    """The largest difference from the reference on the same tensors."""
    given = arguments(shape)
    copies = (t.clone() if isinstance(t, Tensor) else t for t in given)
    expected = torch.ops.spark_reference.step(*copies).float()
    difference = (spark(given)().float() - expected).abs().max().item()
    return {"largest_difference": difference, "largest_output": expected.abs().max().item()}


def measured(shape: Shape, flush: Tensor, bandwidth: float, baselines: bool) -> dict[str, Any]:
    """Times of one shape, ours and, if asked for, those of others."""
    given = arguments(shape)
    ms, step_ms = (median_ms(run(given), flush) for run in (attention, spark))
    size = nbytes(given)
    entry: dict[str, Any] = {
        **shape._asdict(),
        "dtype": str(shape.dtype).removeprefix("torch."),
        "spark_ms": ms,
        "spark_step_ms": step_ms,
        "spark_bytes": size,
        "of_read_bandwidth": size / ms * 1e3 / bandwidth,
        "dense_bytes": 2 * shape.batch * shape.kv_heads * shape.tokens * shape.dim
        * shape.dtype.itemsize,
    }  # fmt: skip
    del given
    if baselines:
        runs = {**dense(shape), "flex": flex(shape)}
        for name, run in runs.items():
            try:
                entry[f"{name}_ms"] = median_ms(run, flush)
            except Exception as error:
                torch.cuda.synchronize()
                entry[f"{name}_error"] = str(error).splitlines()[0][:200]
    return entry


def tuned(shape: Shape, flush: Tensor) -> dict[str, float]:
    """Times of the attention in ms by block shape, "tokens warps stages"; those that run."""
    given, chosen, times = arguments(shape), blocks.attend_blocks, {}
    for tokens, warps, stages in block_shapes():

        def choose(*of: Any) -> blocks.Blocks:
            own = chosen(*of)
            return own._replace(tokens=tokens, warps=warps, stages=stages)  # noqa: B023

        with mock.patch.object(blocks, "attend_blocks", choose):
            try:
                times[f"{tokens} {warps} {stages}"] = median_ms(attention(given), flush, calls=9)
            except Exception as error:  # too much shared memory, say
                print(tokens, warps, stages, str(error).splitlines()[0][:100], flush=True)
    return dict(sorted(times.items(), key=lambda item: item[1]))


def check_numerics(shapes: Sequence[Shape]) -> None:
    """Compare every shape, with fewer tokens, with the reference.

    Raises:
        SystemExit: they differ.
    """
    for shape in shapes:
        small = shape._replace(batch=min(shape.batch, 2), tokens=2048)
        found = numerics(small)
        print(small, json.dumps(found), flush=True)
        allowed = 1e-3 if small.dtype == torch.float32 else 2e-2
        if found["largest_difference"] > allowed * max(1.0, found["largest_output"]):
            sys.exit(f"the kernels differ from the reference: {small}: {found}")


def main(
    seconds: Annotated[float, typer.Option(help="after which no shape is begun")] = BUDGET_S,
    tune: Annotated[bool, typer.Option(help="try block shapes in place of others")] = False,
) -> None:
    """Numerics of the Triton kernels on a GPU, then as much of the sweep as the time allows."""
    if not torch.cuda.is_available():
        sys.exit("no GPU: torch.cuda.is_available() is False")
    from spark_compile.kernels.triton import ops  # noqa: F401  (defines spark_triton)

    begin, device = time.monotonic(), torch.cuda.get_device_name()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    bandwidth, shapes, rows = read_bandwidth(flush), list(sweep()), []
    check_numerics(shapes)
    for shape in shapes:
        if time.monotonic() - begin > seconds:
            break
        entry = measured(shape, flush, bandwidth, not tune and shape.value == "dense")
        if tune:
            entry["blocks_ms"] = tuned(shape, flush)
        rows.append(entry)
        print(json.dumps(entry), flush=True)
        torch.cuda.empty_cache()
    name = "gpu-" + "-".join(device.lower().split()).replace("/", "-")
    settings = {"shapes": len(shapes), "read_bytes_per_s": bandwidth}
    machine, keys = machine_facts() | {"device": device}, [*Shape._fields]
    metrics = ratios("more", ["of_read_bandwidth"])
    print(Result(name, keys, metrics, rows, settings, machine, ["device"]).write())
