"""A compiled decode step touches the new token only: counted in bytes, and in its code."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from compiled import compiled
from decoders import decode, decoder, prompt
from torch._inductor.utils import run_and_get_code
from zoo import tiny

from spark_compile import kv_bytes
from spark_compile.kernels import cpu
from spark_compile.transformers_names import cache_argument

FORMATS: dict[str, dict[str, Any]] = {
    "whole": {},
    "int8": {"key_dtype": "int8", "value_dtype": "int8"},
}


@pytest.mark.parametrize("form", FORMATS)
def test_the_code_of_a_step_copies_nothing(form: str) -> None:
    model = decoder("sdpa_causal", layers=1, dim=64)
    spark = compiled(model, key_ratio=0.5, window=32, inner="inductor", **FORMATS[form])
    with torch.no_grad():
        _, codes = run_and_get_code(decode, spark, prompt(50), None, 4)
    steps = [code for code in codes if "spark.step" in code]
    assert steps
    assert not any("clone" in code or "aten.cat" in code for code in steps)


# Inductor's cache knows nothing of the operators' tags.
@torch._inductor.config.patch(fx_graph_cache=False)
@pytest.mark.parametrize("masks", [0, 1], ids=["causal", "padded"])
def test_layers_share_a_mask_or_have_none(masks: int) -> None:
    """Of several new tokens it is larger than what a step reads of the cache."""
    model = tiny("llama", "sdpa")
    spark = compiled(model, key_ratio=0.5, window=32, inner="inductor")
    cache = {cache_argument(model.forward): transformers.DynamicCache(config=model.config)}
    padded = torch.ones(1, 59, dtype=torch.long)
    padded[0, :3] = 0
    first, later = ({"attention_mask": padded[:, :n]} if masks else {} for n in (50, 59))
    with torch.no_grad():
        spark(torch.randint(1, 90, (1, 50)), **cache, **first)
        _, codes = run_and_get_code(spark, torch.randint(1, 90, (1, 9)), **cache, **later)
    (step,) = (code for code in codes if "spark.step" in code)
    assert step.count("torch.ops.spark.step.default(") == model.config.num_hidden_layers == 2
    assert len(re.findall(r"= empty_strided_cpu\(.*torch\.bool\)", step)) == masks


@pytest.mark.skipif(not cpu.load(), reason="the reference reads the cache as dense tensors")
@pytest.mark.parametrize("form", FORMATS)
def test_a_step_allocates_no_second_cache(form: str) -> None:
    model = decoder("sdpa_causal", layers=1, dim=64)
    spark = compiled(model, key_ratio=0.5, window=32, **FORMATS[form])
    with torch.no_grad():
        _, past = decode(spark, prompt(450), None, 4)
        with torch.profiler.profile(profile_memory=True) as profile:
            _, past = decode(spark, prompt(1), past, 0)
    allocated_bytes = sum(max(e.self_cpu_memory_usage, 0) for e in profile.key_averages())
    assert 0 < allocated_bytes < kv_bytes(past) / 20


@pytest.mark.parametrize("form", FORMATS)
def test_steps_of_one_handle_after_the_other_stay_in_its_buffers(form: str) -> None:
    """Of 32 steps one packs: it copies the head and, at most every other time, the pages.

    Before that the tail grows from the 40 rows of the prompt to 64.
    """
    model = decoder("sdpa_causal", layers=1, dim=64)
    spark = compiled(model, key_ratio=0.5, window=32, **FORMATS[form])
    moves, pointers = [0] * 4, [0] * 4
    with torch.no_grad():
        _, past = decode(spark, prompt(70), None, 0)
        for _ in range(64):
            _, past = decode(spark, prompt(1), past, 0)
            states: Any = past[0]
            now = [t.data_ptr() for state in states for t in (state.pages, state.head)]
            moves = [m + (a != b) for m, a, b in zip(moves, now, pointers, strict=True)]
            pointers = now
    assert max(moves) <= 1 + 2 + 3
