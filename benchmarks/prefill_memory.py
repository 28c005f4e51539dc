"""What a long prompt takes: peak memory and time of a prefill, whole and in chunks.

    python -m benchmarks.prefill_memory

A decoder in SmolLM2-135M's shape with random weights reads prompts by ``generate``, with
transformers' own ``prefill_chunk_size`` where it reads them in chunks, and chooses one token. Every
way has a process of its own, in which each prompt is read twice: the first time compiles. The peak
is the highest resident memory of the second time less the resident memory before it, with weights
and compiled code there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table

import spark_compile
from spark_compile.demo.worker import memory_bytes, reset_peak
from spark_compile.transformers_names import cache_argument

from .measure import machine_facts, wide_console, write_json

ROOT = Path(__file__).parent.parent
DENSE = "dense"
BUDGETS = ("near-lossless", "smallest")


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


def measure(
    budget: str, chunk: int, contexts: Sequence[int], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One way to read prompts, in this process: a row of figures for each context.

    Args:
        budget: of ``SparkConfig``; ``DENSE``: the unmodified model, not compiled.
        chunk: tokens that are read at once; 0: all.
    """
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = shape(options.layers, max(contexts) + 8)
    dtype = getattr(torch, options.dtype)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if budget != DENSE:
        inner, regional = options.inner, options.regional
        spark_compile.optimize(model, budget=budget, inner=inner, regional=regional)
    name = cache_argument(model.prepare_inputs_for_generation)
    arguments = {"max_new_tokens": 1, "do_sample": False, "prefill_chunk_size": chunk or None}
    rows = []
    for tokens in contexts:
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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", default="1024,4096,7800", help="tokens of the prompts")
    parser.add_argument("--chunks", default="0,512", help="tokens read at once; 0: all")
    parser.add_argument("--caches", default=",".join((DENSE, *BUDGETS)))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--regional", action="store_true", help="compile layer by layer")
    parser.add_argument("--name", default="prefill-memory", help="of the result file")
    parser.add_argument("--way", help=argparse.SUPPRESS)  # of a worker: cache:chunk
    return parser.parse_args()


def main() -> None:
    """Measure each way in a process of its own, print a table and write the result file."""
    options = _arguments()
    contexts = [int(tokens) for tokens in options.contexts.split(",")]
    if options.way:
        cache, _, chunk = options.way.partition(":")
        # Answers have a channel of their own, because libraries may print.
        answers, sys.stdout = sys.stdout, sys.stderr
        print(json.dumps(measure(cache, int(chunk), contexts, options)), file=answers)
        return
    console, machine = wide_console(), machine_facts()
    rows: list[dict[str, Any]] = []
    for cache in options.caches.split(","):
        for chunk in options.chunks.split(","):
            command = [sys.executable, "-m", "benchmarks.prefill_memory", *sys.argv[1:]]
            command.append(f"--way={cache}:{chunk}")
            with console.status(f"{cache}, chunks of {chunk}"):
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT)
            rows += json.loads(done.stdout)
    console.print(table(rows))
    settings = {name: value for name, value in vars(options).items() if name != "way"}
    console.print(write_json(options.name, machine, settings, rows=rows), markup=False)


if __name__ == "__main__":
    main()
