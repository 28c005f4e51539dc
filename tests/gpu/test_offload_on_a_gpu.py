"""A cache that waits on the CPU for its layer's turn, whose moves need a GPU's streams."""

from __future__ import annotations

import pytest
import torch
from compiled import is_compressed
from zoo import CACHE, tiny

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from spark_compile import optimize


@pytest.mark.parametrize("regional", [False, True])
def test_an_offloaded_cache(regional: bool) -> None:
    ids = torch.arange(1, 21, device="cuda")[None]
    arguments = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = tiny("llama", "sdpa").cuda().generate(ids, **arguments)
    model = optimize(
        tiny("llama", "sdpa").cuda(), regional=regional, strict=True, key_ratio=0.0, window=4,
        inner="eager",
    )  # fmt: skip
    output = model.generate(
        ids, cache_implementation="offloaded", return_dict_in_generate=True, **arguments
    )
    assert torch.equal(output.sequences, expected)
    layers = output[CACHE].layers
    assert is_compressed([(layer.keys, layer.values) for layer in layers])
    assert layers[-1].keys.device.type == "cpu"
