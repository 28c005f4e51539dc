"""The doors to the backend: by name, options, warnings, training."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from compiled import EXACT, compiled, is_compressed
from decoders import Decoder, KeyValue, SdpaCausal, decode, decoder, prompt
from torch import Tensor, fx, nn

import spark_compile
from spark_compile import SparkError, SparkWarning
from spark_compile.report import collect_report


class NoAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.linear(x), dim=-1)


def test_a_model_without_attention_runs_with_one_warning() -> None:
    model = NoAttention().requires_grad_(False)
    model_c = compiled(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rows in (3, 5, 7):
            x = torch.randn(rows, 4)
            torch.testing.assert_close(model_c(x), model(x))
    messages = [str(w.message) for w in caught if issubclass(w.category, SparkWarning)]
    assert messages == ["spark found no attention in the graph: nothing was rewritten"]


def test_an_attention_that_a_graph_break_cuts_says_where() -> None:
    def attention(x: Tensor) -> Tensor:
        scores = x @ x.mT
        torch._dynamo.graph_break()
        return scores.softmax(-1) @ x

    x = torch.randn(1, 2, 5, 4)
    with (
        collect_report() as report,
        pytest.warns(SparkWarning, match=rf"at a graph break, .* at {__file__}:\d+: nothing"),
    ):
        torch.testing.assert_close(compiled(attention)(x), attention(x))
    assert [bool(graph.graph_break) for graph in report.graphs] == [True, False]
    assert "the graph ends at a graph break" in report.summary()


class BehindABreak(nn.Module):
    """Parts without attention before a decoder and after it, each in a graph of its own."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        x = x.clone()
        torch._dynamo.graph_break()
        result = self.inner(x)
        torch._dynamo.graph_break()
        return result, x + 1


def test_parts_of_a_model_without_attention_are_no_failure() -> None:
    model = BehindABreak(decoder(layers=1))
    with collect_report() as report, warnings.catch_warnings(action="error"):
        model_c = compiled(model, strict=True)
        for _ in range(2):
            assert is_compressed(model_c(prompt(13))[0][1])
    assert [graph.phase for graph in report.graphs] == ["no attention", "prefill", "no attention"]


def test_a_model_none_of_whose_parts_has_attention_is_told_when_it_runs_again() -> None:
    model, x = BehindABreak(nn.Linear(4, 4)).requires_grad_(False), torch.randn(3, 4)
    model_c = compiled(model, strict=True)
    model_c(x)
    with pytest.raises(SparkError, match=rf"ends at a graph break, .* at {__file__}:\d+: nothing"):
        model_c(x)


def encoded(frames: Tensor) -> Tensor:
    keys = frames * 2
    return nn.functional.scaled_dot_product_attention(frames, keys, keys)


class WithEncoder(nn.Module):
    """What is encoded is attended to without a cache, in the graph of the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = decoder(layers=1)

    def forward(self, frames: Tensor, tokens: Tensor) -> Any:
        return encoded(frames), *self.decoder(tokens)


def test_an_encoder_keeps_no_cache_which_is_no_failure() -> None:
    frames, model_c = torch.randn(1, 2, 9, 4), compiled(WithEncoder(), strict=True)
    for _ in range(2):
        assert is_compressed(model_c(frames, prompt(13))[2])
    alone = compiled(encoded, strict=True)
    alone(frames)
    with pytest.raises(SparkError, match="no cache is kept"):
        alone(frames)


def test_training_is_left_alone() -> None:
    model, tokens = decoder(layers=1).requires_grad_(True), prompt(13)
    model(tokens)[0].square().mean().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    with pytest.warns(SparkWarning, match="gradients are enabled"):
        logits, past = compiled(model)(tokens)
    logits.square().mean().backward()
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, expected)
    assert type(past[0][0]) is Tensor
    with torch.no_grad():  # the same model, now for inference
        assert is_compressed(compiled(model)(tokens)[1])


def test_optimize_compiles_in_place_and_returns_the_model() -> None:
    model = decoder(layers=1)
    assert spark_compile.optimize(model, **EXACT) is model
    assert is_compressed(model(prompt(13))[1])


BY_NAME = """
import sys, torch
sys.path.insert(0, {support!r})
from decoders import decoder, prompt
assert "spark_compile" not in sys.modules
options = {{"window": 4, "inner": "eager"}}
compiled = torch.compile(decoder(layers=1), backend="spark", options=options)
in_place = decoder(layers=1)
in_place.compile(backend="spark", options=options)
for model in (compiled, in_place):
    print(type(model(prompt(13))[1][0][0]).__name__)
"""


def test_the_backend_works_by_name_without_an_import(request: pytest.FixtureRequest) -> None:
    code = BY_NAME.format(support=str(request.config.rootpath / "tests" / "support"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["PrunedKeys"] * 2, done.stderr[-2000:]


@pytest.mark.filterwarnings("ignore:spark found no attention:spark_compile.SparkWarning")
def test_the_backend_can_be_called_without_dynamo() -> None:
    graph, x = fx.symbolic_trace(lambda x: (x + 1,)), torch.randn(3, 4)
    torch.testing.assert_close(spark_compile.spark(graph, [x], options=EXACT)(x), (x + 1,))


WRONG = [
    ("key_ratio", 1.5, "0 <= key_ratio < 1"),
    ("key_ratio", "half", "a number"),
    ("window", 1, "from 2"),
    ("recovery", "exact", "degenerate"),
    ("key_ration", 0.5, "one of the options key_ratio"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), WRONG)
def test_a_wrong_option_is_named(name: str, value: Any, allowed: str) -> None:
    model = torch.compile(decoder(layers=1), backend="spark", options={name: value})
    for call in (
        lambda: spark_compile.optimize(decoder(layers=1), **{name: value}),
        lambda: model(prompt(13)),
    ):
        with pytest.raises(SparkError, match=f"^option '{name}' is {value!r}.*{allowed}") as caught:
            call()
        assert isinstance(caught.value, ValueError)


def test_options_and_modes_that_torch_hands_on_unread_are_named() -> None:
    model = torch.compile(decoder(layers=1), backend="spark", options="x")  # type: ignore[call-overload]
    with pytest.raises(SparkError, match=r"^options is 'x': allowed is a mapping"):
        model(prompt(13))
    graph, x = fx.symbolic_trace(lambda x: (x + 1,)), torch.randn(3, 4)
    for mode, options in (("quickly", {}), ("max-autotune", {"inner": "eager"})):
        with pytest.raises(SparkError, match=f"^mode is '{mode}': allowed "):
            spark_compile.spark(graph, [x], options=options, mode=mode)


@pytest.mark.parametrize("name", ["scaled_late", "key_norms"])
def test_strict_raises_where_a_warning_would_be_given(name: str) -> None:
    model_c = compiled(decoder(name, layers=1), strict=True)
    with pytest.raises(SparkError, match=r"^spark rewrote nothing") as raised:
        model_c(prompt(1), model_c(prompt(13))[1])
    assert "node" in str(raised.value)
    with pytest.raises(SparkError, match=r"^spark found no attention .* rewritten$"):
        compiled(NoAttention().requires_grad_(False), strict=True)(torch.randn(3, 4))


class NoNan(SdpaCausal):
    """Takes care of rows that are masked whole, by an operator that no matcher knows."""

    def forward(self, x: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:  # type: ignore[override]
        query, key, value = self.project(x)
        key, value = self.append(past, key, value)
        scores = query @ key.repeat_interleave(2, 1).mT
        weights = torch.softmax(scores.nan_to_num(), dim=-1)
        return self.finish(weights @ value.repeat_interleave(2, 1)), (key, value)


def test_an_attention_with_an_unknown_operator_is_refused_by_its_name() -> None:
    model, reason = Decoder(NoNan).eval().requires_grad_(False), "aten.nan_to_num.default between"
    with collect_report() as report, pytest.warns(SparkWarning, match=f"2 x {reason}"):
        decode(compiled(model), prompt(13), None, 1)
    assert [graph.phase for graph in report.graphs] == ["prefill", "decode"]
    torch._dynamo.reset()
    with pytest.raises(SparkError, match=f"2 x {reason}"):
        compiled(model, strict=True)(prompt(13))


def test_an_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(SparkError("a reason")))
    assert (type(error), str(error)) == (SparkError, "a reason")


def test_a_refusal_warns_once() -> None:
    model_c = compiled(decoder("scaled_late", layers=1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model_c(prompt(13))
    messages = [str(w.message) for w in caught if issubclass(w.category, SparkWarning)]
    assert len(messages) == 1
    assert "the keys are computed from what is cached, as in latent attention (node " in messages[0]
