"""States as arguments of functions that other backends compile: right, if not compressed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from states import dense, prefill
from torch import Tensor

from spark_compile import SparkConfig
from spark_compile.state import SparkTensor

FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "crop": lambda x, index: x[..., :-3, :],
    "index_select": lambda x, index: x.index_select(0, index),
    "repeat_interleave": lambda x, index: x.repeat_interleave(2, dim=0),
    "cat": lambda x, index: torch.cat((x, torch.ones(x.shape)[:, :, :2]), 2),
    "add": lambda x, index: x + index.sum(),
    "unchanged": lambda x, index: (x, index + 1),
    "unused": lambda x, index: index + x.shape[2],
    "several": lambda x, index: (x[1:], x.clone(), x[:, :, 3] * 2, x.detach()),
}


def states(length: int) -> tuple[SparkTensor, SparkTensor]:
    return prefill(SparkConfig(key_ratio=0.6, window=4, sink_tokens=1), length).states


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore::spark_compile.SparkWarning")
def test_a_compiled_function_of_a_state_is_that_of_the_dense_tensor(
    name: str, backend: str
) -> None:
    compiled = torch.compile(FUNCTIONS[name], backend=backend, fullgraph=True)
    index = torch.tensor([1, 0])
    for length in (21, 22, 25):
        for state in states(length):
            before = state.dense()
            result = compiled(state, index)
            expected = FUNCTIONS[name](before, index)
            if isinstance(result, Tensor):
                result, expected = (result,), (expected,)
            for own, tensor in zip(result, expected, strict=True):
                torch.testing.assert_close(dense(own), tensor)
            assert torch.equal(state.dense(), before)
