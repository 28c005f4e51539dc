"""Both oracles on real architectures, tiny and with random weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from oracle import SimulatedSpark, assert_close
from torch import Tensor
from zoo import ARCHITECTURES, CACHE, heads, tiny

from spark_compile import SparkConfig, kv_bytes, optimize

PROMPT, STEPS, CHUNK, WINDOW = 21, 14, 5, 4


def tokens(batch: int) -> Tensor:
    return torch.randint(1, 90, (batch, PROMPT + STEPS + CHUNK))


def teacher_forced(model: Any, ids: Tensor, padding: int, mode: Any = None) -> tuple[Tensor, Any]:
    """Logits of the last position after the prompt, each single token and one chunk."""
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    cache = transformers.DynamicCache(config=model.config)
    ends = [PROMPT + step for step in range(STEPS + 1)] + [PROMPT + STEPS + CHUNK]
    logits, start = [], 0
    for end in ends:
        if mode is not None:
            mode.begin_step()
        given = {"attention_mask": mask[:, :end]} if padding else {}
        with torch.no_grad():
            output = model(input_ids=ids[:, start:end], use_cache=True, **{CACHE: cache}, **given)
        cache, start = output[CACHE], end
        logits.append(output.logits[:, -1].float())
    return torch.stack(logits), cache


LAYERS = {"gpt2": 1, "mistral_sliding": 1}
"""Of those whose tests are fast; what layers have to do with each other, llama shows."""
FAST = {"gpt2", "llama", "mistral_sliding"}
"""The others take a quarter or half of a minute each: left to the slow tests."""


def cases() -> Iterator[Any]:
    """Every architecture in every combination; of those of ``FAST`` a quarter is fast.

    In that quarter every value of a factor meets every architecture.
    """
    for number, name in enumerate(sorted(ARCHITECTURES, key=lambda name: name not in FAST)):
        for attention, padding, dtype in itertools.product(
            ("sdpa", "eager"), (0, 3), (torch.float32, torch.bfloat16)
        ):
            both = (attention == "eager") == ((padding > 0) if number % 2 else (padding == 0))
            same = (dtype == torch.bfloat16) == ((attention == "eager") ^ (number % 4 > 1))
            yield pytest.param(
                name, attention, padding, dtype,
                id=f"{name}-{attention}-{'padded' if padding else 'single'}-{dtype}",
                marks=[] if both and same and name in FAST else [pytest.mark.slow],
            )  # fmt: skip


@pytest.mark.parametrize(("name", "attention", "padding", "dtype"), list(cases()))
def test_both_oracles(name: str, attention: str, padding: int, dtype: torch.dtype) -> None:
    model = tiny(name, attention, LAYERS.get(name)).to(dtype)
    ids = tokens(batch=2 if padding else 1)
    exact, dense_cache = teacher_forced(copy.deepcopy(model), ids, padding)

    options: dict[str, Any] = {"window": WINDOW, "inner": "eager", "strict": True}
    unpruned = optimize(copy.deepcopy(model), key_ratio=0.0, **options)
    logits, _ = teacher_forced(unpruned, ids, padding)
    assert_close(logits, exact, dtype)

    torch._dynamo.reset()
    options["key_ratio"] = 0.5
    layers = LAYERS.get(name)
    cache = check_pruned(name, layers, attention, ids, padding, dtype, exact, **options)
    assert kv_bytes(cache) < kv_bytes(dense_cache) * 1.25 + fixed_bytes(cache)


def fixed_bytes(cache: Any) -> int:
    """What a cache takes however short it is: constants, statistics and two pages of room."""
    total = 0
    for state in (state for layer in cache.layers for state in (layer.keys, layer.values)):
        spec, heads = state.spec, state.pages.shape[:2].numel()
        constants = spec.head(state.SIDE).offsets["tail"]
        total += heads * (constants + 2 * spec.pages(state.SIDE).page_bytes)
    return total


def check_pruned(
    name: str, layers: int | None, attention: str, ids: Tensor, padding: int, dtype: torch.dtype,
    exact: Tensor, **options: Any,
) -> Any:  # fmt: skip
    """Compare a compiled model with the simulated method; returns the compiled one's cache."""
    model = tiny(name, "sdpa", layers).to(dtype)
    with SimulatedSpark(SparkConfig(**options), *heads(model)) as simulated:
        expected, _ = teacher_forced(model, ids, padding, simulated)
    pruned = optimize(tiny(name, attention, layers).to(dtype), **options)
    logits, cache = teacher_forced(pruned, ids, padding)
    assert_close(logits, expected, dtype)
    assert (expected - exact).abs().max() > 1e-3, "pruning changed nothing: the oracle is blind"
    return cache


FORMATS: dict[str, dict[str, Any]] = {
    "int8 keys": {"key_ratio": 0.5, "key_dtype": "int8"},
    "int8 values": {"key_ratio": 0.5, "value_dtype": "int8"},
    "int8": {"key_ratio": 0.5, "key_dtype": "int8", "value_dtype": "int8"},
    "pruned values": {"key_ratio": 0.5, "value_ratio": 0.5},
    "everything": {
        "key_ratio": 0.5,
        "key_dtype": "int8",
        "value_ratio": 0.3,
        "value_dtype": "int8",
    },
}


def formats() -> Iterator[Any]:
    """Every format on two models; of the second all but one are slow."""
    for form in FORMATS:
        marks = [] if form == "everything" else [pytest.mark.slow]
        yield pytest.param("llama", 0, torch.float32, form, id=f"llama-{form}")
        yield pytest.param("qwen3", 3, torch.bfloat16, form, id=f"qwen3-{form}", marks=marks)


@pytest.mark.parametrize(("name", "padding", "dtype", "form"), list(formats()))
def test_every_format(name: str, padding: int, dtype: torch.dtype, form: str) -> None:
    ids = tokens(batch=2 if padding else 1)
    exact, _ = teacher_forced(tiny(name, "sdpa", 1).to(dtype), ids, padding)
    options = {"window": WINDOW, "inner": "eager", "strict": True, **FORMATS[form]}
    check_pruned(name, 1, "sdpa", ids, padding, dtype, exact, **options)
