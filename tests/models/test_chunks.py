"""``generate`` that reads the prompt in chunks: ratio 0 gives the eager model's tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from zoo import tiny

from spark_compile import PrunedKeys, StoredValues, optimize
from spark_compile.dynamo import MOST_GRAPHS
from spark_compile.transformers_names import returned_cache

GROWING: dict[str, Any] = {}
STATIC: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True}


@pytest.mark.parametrize("cache", [GROWING, STATIC], ids=["growing", "static"])
def test_chunks_of_any_prompt(cache: dict[str, Any]) -> None:
    """Whole last chunks, shorter ones, of one token, and prompts that are shorter than a chunk."""
    model = tiny("llama", "sdpa")
    model.config.num_hidden_layers = 1
    del model.model.layers[1:]
    compiled = optimize(copy.deepcopy(model), key_ratio=0, window=4, inner="eager", strict=True)
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    graphs = counters["stats"]["unique_graphs"]
    for length in (31, 25, 24, 5, 1):
        ids = torch.randint(1, 90, (1, length))
        chunked = {"prefill_chunk_size": 8, "return_dict_in_generate": True, **cache}
        made = compiled.generate(ids, **arguments, **chunked)
        assert torch.equal(made.sequences, model.generate(ids, **arguments)), length
        for layer in returned_cache(made).layers:
            assert isinstance(layer.keys, PrunedKeys), length
            assert isinstance(layer.values, StoredValues), length
    assert counters["stats"]["unique_graphs"] - graphs <= MOST_GRAPHS // 3
