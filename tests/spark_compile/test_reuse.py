"""Which graphs are taken for equal: names do not matter, anything that a result depends on does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from spark_compile.reuse import Signature, signature


def described(module: fx.GraphModule, *inputs: Any, options: Any = "options") -> Signature | None:
    return signature(module, inputs, inputs, options)


def graph(function: Callable[..., Any], name: str = "x") -> fx.GraphModule:
    traced = fx.symbolic_trace(function)
    for node in traced.graph.nodes:
        node.name = f"{name}_{node.name}"
    return traced


def scaled(factor: Any) -> fx.GraphModule:
    return graph(lambda x: torch.mul(x, factor))


def key(module: fx.GraphModule, *inputs: Any, **options: Any) -> Any:
    found = described(module, *inputs, **options)
    assert found is not None
    return found.key


X = torch.zeros(4, 4)


def test_names_do_not_matter() -> None:
    first, second = graph(lambda x: x + 1, "first"), graph(lambda x: x + 1, "second")
    assert key(first, X) == key(second, X)


OTHER_INPUTS: dict[str, Tensor] = {
    "shape": torch.zeros(4, 5),
    "stride": torch.zeros(4, 4).t(),
    "offset": torch.zeros(20)[4:].view(4, 4),
    "dtype": torch.zeros(4, 4, dtype=torch.bfloat16),
    "gradient": torch.zeros(4, 4, requires_grad=True),
    "parameter": nn.Parameter(torch.zeros(4, 4), False),
    "device": torch.zeros(4, 4, device="meta"),
    "negated": torch._neg_view(torch.zeros(4, 4)),
}


@pytest.mark.parametrize("name", OTHER_INPUTS)
def test_inputs_matter(name: str) -> None:
    module = scaled(2)
    assert key(module, X) != key(module, OTHER_INPUTS[name])


def test_whether_inputs_share_storage_matters() -> None:
    module = graph(lambda x, y: x + y)
    assert key(module, X, X.clone()) == key(module, X.clone(), X.clone())
    assert key(module, X, X.clone()) != key(module, X, X.view(4, 4))


def test_constants_operators_and_options_matter() -> None:
    keys = [key(scaled(factor), X) for factor in (1, 1.0, True, 0.0, -0.0, 2)]
    keys.append(key(graph(lambda x: torch.add(x, 1)), X))
    keys.append(key(graph(lambda x: x.mul(1)), X))
    keys.append(key(scaled(1), X, options="others"))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch._inductor.config.patch(max_autotune=True),
    ],
)
def test_modes_matter(mode: Any) -> None:
    module = scaled(2)
    with mode():
        assert key(module, X) != key_outside
    assert key(module, X) == key_outside


key_outside = key(scaled(2), X)


def test_what_cannot_be_compared_is_not() -> None:
    weights = fx.symbolic_trace(nn.Linear(4, 4))
    assert described(weights, X) is None
    assert described(scaled(2), torch.zeros(4, 4).to_sparse()) is None
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        assert described(scaled(2), X) is None
