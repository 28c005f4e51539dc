"""What a long prompt takes: peak memory and time of a prefill, whole and in chunks.

    python -m benchmarks memory

A decoder in SmolLM2-135M's shape with random weights reads prompts by ``generate``, with
transformers' own ``prefill_chunk_size`` where it reads them in chunks, and chooses one token. Every
way has a process of its own, in which each prompt is read twice: the first time compiles. The peak
is the highest resident memory of the second time less the resident memory before it, with weights
and compiled code there.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.table import Table

import spark_compile
from spark_compile.demo.worker import memory_bytes, reset_peak
from spark_compile.transformers_names import cache_argument

from .measure import wide_console
from .results import Metric, Result, ratios

ROOT = Path(__file__).parent.parent
DENSE = "dense"
BUDGETS = ("near-lossless", "smallest")
KEYS = ["cache", "chunk", "context"]
METRICS = {"kv_bytes": Metric("exact")} | ratios("less", ["peak_bytes", "stays_bytes"])


@dataclass(frozen=True)
class Settings:
    """How every way is measured."""

    contexts: list[int]
    layers: int
    dtype: str
    threads: int
    inner: str
    regional: bool


def shape(layers: int, positions: int) -> transformers.LlamaConfig:
    """SmolLM2-135M's sizes."""
    return transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
    )


def measure(budget: str, chunk: int, options: Settings) -> list[dict[str, Any]]:
    """One way to read prompts, in this process: a row of figures for each context.

    Args:
        budget: of ``SparkConfig``; ``DENSE``: the unmodified model, not compiled.
        chunk: tokens that are read at once; 0: all.
    """
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = shape(options.layers, max(options.contexts) + 8)
    dtype = getattr(torch, options.dtype)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if budget != DENSE:
        inner, regional = options.inner, options.regional
        spark_compile.optimize(model, budget=budget, inner=inner, regional=regional)
    name = cache_argument(model.prepare_inputs_for_generation)
    arguments = {"max_new_tokens": 1, "do_sample": False, "prefill_chunk_size": chunk or None}
    rows = []
    for tokens in options.contexts:
        prompt = torch.randint(config.vocab_size, (1, tokens))
        for _ in range(2):
            cache = transformers.DynamicCache(config=config)
            before_bytes, start_s = reset_peak(), time.perf_counter()
            model.generate(prompt, **arguments, **{name: cache})
            seconds, peak_bytes = time.perf_counter() - start_s, memory_bytes("VmHWM")
            stays_bytes, kv_bytes = reset_peak() - before_bytes, spark_compile.kv_bytes(cache)
            del cache
        rows.append(
            {
                "cache": budget,
                "chunk": chunk,
                "context": tokens,
                "kv_bytes": kv_bytes,
                "peak_bytes": peak_bytes - before_bytes,
                "stays_bytes": stays_bytes,
                "prefill_tokens_per_s": tokens / seconds,
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """All rows; MB are 10^6 bytes."""
    made = Table(
        title="Memory of a prefill above that of the model, MB",
        caption="stored: keys and values; peak: of the process; stays: with the cache, afterwards",
    )
    made.add_column("cache")
    for name in ("chunk", "tokens", "stored", "peak", "peak - stored", "stays", "tokens/s"):
        made.add_column(name, justify="right")
    for row in rows:
        stored, peak = row["kv_bytes"] / 1e6, row["peak_bytes"] / 1e6
        sizes = (stored, peak, peak - stored, row["stays_bytes"] / 1e6)
        made.add_row(
            row["cache"],
            str(row["chunk"] or "whole"),
            str(row["context"]),
            *(f"{size:.1f}" for size in sizes),
            f"{row['prefill_tokens_per_s']:.0f}",
        )
    return made


def main(
    contexts: Annotated[str, typer.Option(help="tokens of the prompts")] = "1024,4096,7800",
    chunks: Annotated[str, typer.Option(help="tokens read at once; 0: all")] = "0,512",
    caches: str = ",".join((DENSE, *BUDGETS)),
    layers: int = 30,
    dtype: str = "bfloat16",
    threads: int = 2,
    inner: str = "inductor",
    regional: Annotated[bool, typer.Option(help="compile layer by layer")] = False,
    name: Annotated[str, typer.Option(help="of the result file")] = "prefill-memory",
    way: Annotated[str, typer.Option(help="cache:chunk, of a worker", hidden=True)] = "",
) -> None:
    """Measure the memory of prefills, each way in a process of its own."""
    lengths = [int(tokens) for tokens in contexts.split(",")]
    settings = Settings(lengths, layers, dtype, threads, inner, regional)
    if way:
        cache, _, chunk = way.partition(":")
        # Answers have a channel of their own, because libraries may print.
        answers, sys.stdout = sys.stdout, sys.stderr
        print(json.dumps(measure(cache, int(chunk), settings)), file=answers)
        return
    console = wide_console()
    rows: list[dict[str, Any]] = []
    for cache in caches.split(","):
        for chunk in chunks.split(","):
            command = [sys.executable, "-m", "benchmarks", *sys.argv[1:], f"--way={cache}:{chunk}"]
            with console.status(f"{cache}, chunks of {chunk}"):
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT)
            rows += json.loads(done.stdout)
    console.print(table(rows))
    result = Result(name, KEYS, METRICS, rows, dataclasses.asdict(settings), comparable=["cpu"])
    console.print(result.write(), markup=False)
