"""Weights that are tensor subclasses: the cache is compressed as with plain ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled import EXACT, is_compressed
from decoders import decode, decoder, prompt
from quantized import Int8Weight, quantized
from torch import Tensor, nn
from zoo import CACHE, tiny

import spark_compile
from spark_compile.report import collect_report

ARGUMENTS = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


class Nested(Int8Weight):
    """Its scale is a subclass, too."""

    def __init__(self, levels: Any, scale: Any, context: Any) -> None:
        super().__init__(levels, scale, context)
        if not isinstance(scale, Int8Weight):
            levels, inner = torch.ones_like(scale, dtype=torch.int8), {**context, "factor": 1.0}
            self.scale = Int8Weight(levels, scale, inner)


def check(model: Any, expected: Any, **options: Any) -> Any:
    """Generate twice: the eager model's tokens, a compressed cache, and the report of the first."""
    ids = torch.arange(1, 21).reshape(1, 20)
    tokens = expected.generate(ids, **ARGUMENTS)
    spark_compile.optimize(model, strict=True, **{**EXACT, **options})
    with collect_report() as report:
        output = model.generate(ids, return_dict_in_generate=True, **ARGUMENTS)
    assert torch.equal(output.sequences, tokens)
    assert is_compressed([(layer.keys, layer.values) for layer in output[CACHE].layers])
    assert torch.equal(model.generate(ids, **ARGUMENTS), tokens)
    return report


@pytest.mark.parametrize("kind", [Int8Weight, Nested])
def test_quantized_weights(kind: Any) -> None:
    report = check(*(quantized(tiny("llama", "sdpa"), kind) for _ in range(2)))
    assert [graph.phase for graph in report.graphs] == ["prefill", "decode"]
    assert report.graphs[0].sites[0].layer == "model.layers.0.self_attn"


@pytest.mark.parametrize("kind", [Int8Weight, Nested])
def test_quantized_weights_that_stay_in_the_module(kind: Any) -> None:
    """Inductor's freezing, which low bits need for their kernels, asks Dynamo for that."""
    models = [quantized(tiny("llama", "sdpa"), kind) for _ in range(2)]
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        report = check(*models)
    assert [graph.phase for graph in report.graphs] == ["prefill", "decode"]


@pytest.mark.slow
def test_quantized_weights_with_inductor() -> None:
    model, tokens = quantized(decoder(layers=1)), prompt(13)
    exact, _ = decode(model, tokens, None, 8)
    options = {**EXACT, "inner": "inductor", "strict": True}
    logits, past = decode(torch.compile(model, backend="spark", options=options), tokens, None, 8)
    torch.testing.assert_close(logits, exact, atol=2e-5, rtol=2e-5)
    assert is_compressed(past)


def test_equal_quantized_layers_are_compiled_once() -> None:
    report = check(*(quantized(tiny("llama", "sdpa")) for _ in range(2)), regional=True)
    assert [graph.phase for graph in report.graphs if graph.lower_ms] == ["prefill", "decode"]


def test_layers_whose_weights_differ_outside_of_their_tensors() -> None:
    models = [quantized(tiny("llama", "sdpa"), factors=(1.0, 1.5)) for _ in range(2)]
    report = check(*models, regional=True)
    assert sum(graph.lower_ms > 0 for graph in report.graphs) == 4


class Cached(nn.Module):
    """An attention over a cache whose projections use a quantized weight in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24, bias=False).requires_grad_(False)

    def forward(self, x_BHLD: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            query, key, value = self.project(x_BHLD).chunk(3, -1)
        for part in self.project.weight.split(8):  # a tuple, some of whose elements are used
            query = query + (x_BHLD @ part.t()).to(query.dtype)
        key = key if past is None else torch.cat((past[0], key), 2)
        value = value if past is None else torch.cat((past[1], value), 2)
        return nn.functional.scaled_dot_product_attention(query, key, value), (key, value)


def test_operators_that_return_several_tensors_and_autocast_regions() -> None:
    model, steps = quantized(Cached()), torch.randn(12, 1, 2, 1, 8)
    steps = [torch.randn(1, 2, 9, 8), *steps]
    compiled = torch.compile(model, backend="spark", options={**EXACT, "strict": True})
    past = expected_past = None
    with torch.no_grad():
        for x in steps:
            expected, expected_past = model(x, expected_past)
            actual, past = compiled(x, past)
            torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)
    assert actual.dtype == past[0].dtype == torch.bfloat16
    assert is_compressed([past])


@pytest.mark.filterwarnings("ignore::spark_compile.SparkWarning")
def test_a_subclass_that_is_returned_is_said() -> None:
    model = quantized(nn.Linear(8, 8, bias=False).requires_grad_(False))

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return model(x), model.weight.detach()

    x = torch.randn(3, 8)
    with torch.no_grad(), collect_report() as report:
        actual = torch.compile(forward, backend="spark", options=EXACT)(x)[0]
    assert report.graphs[0].left_alone == (
        "pass Lower failed: NotImplementedError: the graph returns a tensor subclass"
    )
    torch.testing.assert_close(actual, model(x))


class Hiding(Int8Weight):
    """A multiple has the factor in a tensor outside of those that it is flattened to."""

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.mul.Tensor:
            factor = torch.full_like(args[0].scale, args[1])
            return cls(args[0].levels, args[0].scale, {**args[0].context, "hidden": factor})
        return super().__torch_dispatch__(func, types, args, kwargs)

    def dense(self) -> Tensor:
        return super().dense() * self.context.get("hidden", 1.0)


@pytest.mark.filterwarnings("ignore::spark_compile.SparkWarning")
@pytest.mark.parametrize("apart", [False, True])
def test_what_a_subclass_hides_is_known_to_operators_that_are_traced_at_once(apart: bool) -> None:
    model = quantized(nn.Linear(8, 8, bias=False).requires_grad_(False), Hiding)

    def forward(x: Tensor) -> Tensor:
        double = model.weight * 2.0
        y = x @ double
        return (y + 1.0) @ double if apart else y

    x = torch.randn(3, 8)
    with torch.no_grad(), collect_report() as report:
        actual = torch.compile(forward, backend="spark", options=EXACT)(x)
        torch.testing.assert_close(actual, forward(x))
    reason = report.graphs[0].left_alone
    assert (reason is not None) == apart
    if apart:
        assert "a subclass keeps a tensor that it does not show" in str(reason)
