"""Both oracles on decoders written by hand, and what becomes of each way to write one."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest
import torch
from compiled import EXACT, compiled
from handwritten import BATCH, HEADS, VOCABULARY, WITHOUT_TWIN, LayerCache
from handwritten_caches import DECODERS, handwritten
from oracle import SimulatedSpark, assert_close
from torch import Tensor

from spark_compile import PrunedKeys, SparkConfig, StoredValues
from spark_compile.report import GraphReport, collect_report

PROMPT, STEPS = 13, 12

OTHER_LAYOUT = "[B, H, S, D]"
EXPECTED = {
    "nanogpt": "rewritten",
    "chunked": "rewritten",
    "unbound": "rewritten",
    "einsum": "rewritten",
    "einsum_tokens_first": "rewritten",
    "bloom": "rewritten",
    "flat_bmm": "rewritten",
    "llama": "rewritten",
    "grouped": "rewritten",
    "grouped_einsum": "rewritten",
    "mask_first": "rewritten",
    "subtracted": "rewritten",
    "multiplied": "aten.mul.Tensor between queries, keys and softmax",
    "many_biases": "rewritten",
    "tensor_scale": "rewritten",
    "temperature": "rewritten",
    "softcap": "rewritten",
    "sinks": "rewritten",
    "stable_sinks": "rewritten",
    "submodule": "rewritten",
    "cache_object": "rewritten",
    "function": "rewritten",
    "in_attribute": "rewritten",
    "in_buffer": "rewritten",
    "gpt_fast": "rewritten",
    "litgpt": "rewritten",
    "slice_writes": "rewritten",
    "tokens_first": "rewritten",
    "einsum_over_tokens_first": "rewritten",
    "late_rotary": "the keys are computed from what is cached",
    "stacked": "the cache keeps the keys changed by aten.stack",
    "keys_transposed": OTHER_LAYOUT,
    "multi_query": "rewritten",
    "heads_late": "rewritten",
    "keys_merged": "keys and values are written in different ways",
    "channels_first": OTHER_LAYOUT,
    "flat_cache": OTHER_LAYOUT,
}
"""What becomes of every attention of a decoder: it is rewritten, or why it is not."""

ONE_GRAPH_PER_STEP = {"in_buffer"}
"""Dynamo holds the sizes of buffers for constant, and gives up after some steps."""

LESS_COMMON = {
    "chunked", "flat_bmm", "grouped_einsum", "subtracted", "multiplied", "temperature", "sinks",
    "submodule", "cache_object", "litgpt", "einsum_over_tokens_first", "keys_transposed",
    "multi_query", "flat_cache", *ONE_GRAPH_PER_STEP,
}  # fmt: skip
"""Left to the slow tests, each being a small change of another one."""

REWRITTEN = [name for name, fate in EXPECTED.items() if fate == "rewritten"]
HALF = {"nanogpt", "chunked", "einsum", "grouped", "temperature", "tensor_scale"}
"""What computes in bfloat16 throughout."""
WHOLE_BUFFERS = {"gpt_fast", "litgpt"}
"""Attend to all that there is room for, of which the oracle does not know what is a token."""
WITH_TWIN = set(REWRITTEN) - WITHOUT_TWIN - ONE_GRAPH_PER_STEP - WHOLE_BUFFERS
pytestmark = pytest.mark.filterwarnings("ignore::spark_compile.SparkWarning")


def chunks(*more: int) -> list[Tensor]:
    """A prompt, single tokens, and chunks of so many tokens."""
    return [torch.randint(VOCABULARY, (BATCH, n)) for n in (PROMPT, *[1] * STEPS, *more)]


def some_are_slow(names: Iterable[str], fast: Collection[str]) -> list[Any]:
    """Parameters for all of them."""
    return [
        pytest.param(name, marks=[] if name in fast else [pytest.mark.slow])
        for name in sorted(names)
    ]


def plain(state: Any) -> Tensor:
    """The dense form of a compressed tensor."""
    assert isinstance(state, PrunedKeys | StoredValues), "not rewritten"
    return state.dense()


def cached(cache: Any) -> list[tuple[Any, Any]]:
    """Key and value of every layer."""
    return [(one.k, one.v) if isinstance(one, LayerCache) else (one[0], one[1]) for one in cache]


def test_every_decoder_has_an_expected_fate() -> None:
    assert EXPECTED.keys() == DECODERS.keys()


def check_exact(name: str, layers: int, *more: int) -> None:
    """Ratio 0 equals the eager model, and every attention meets its expected fate."""
    model, tokens = handwritten(name, layers), chunks(*more)
    exact, _ = model.feed(tokens)
    with collect_report() as report:
        logits, cache = model.feed(tokens, compiled(model))
    assert_close(logits, exact, torch.float32)
    assert [graph.left_alone for graph in report.graphs] == [None] * len(report.graphs)
    if EXPECTED[name] == "rewritten":
        check_rewritten(report.graphs, layers, cached(cache))
    else:
        check_refused(report.graphs, layers, cached(cache), EXPECTED[name])


@pytest.mark.parametrize("name", some_are_slow(DECODERS, DECODERS.keys() - LESS_COMMON))
def test_ratio_zero_equals_eager(name: str) -> None:
    check_exact(name, 1)


@pytest.mark.parametrize("name", some_are_slow(DECODERS, {"bloom", "grouped"}))
def test_ratio_zero_with_two_layers_and_a_chunk(name: str) -> None:
    check_exact(name, 2, 3, 1)


@pytest.mark.parametrize("name", some_are_slow(HALF, {"nanogpt"}))
@pytest.mark.parametrize("ratio", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_bfloat16(name: str, ratio: float) -> None:
    """Against the eager model, at ratio 0.5 over the recovered form of the compiled one's cache."""
    model, tokens = handwritten(name).bfloat16(), chunks()
    model_c = compiled(model, key_ratio=ratio)
    exact = past = None
    with torch.no_grad():
        for step in tokens:
            if past is not None:
                exact = [tuple(map(plain, states)) for states in cached(past)]
            logits, past = model_c(step, past)
            assert_close(logits, model(step, exact)[0], torch.bfloat16)
    assert {key.dtype for key, _ in cached(past)} == {torch.bfloat16}


def check_rewritten(graphs: list[GraphReport], layers: int, cache: list[tuple[Any, Any]]) -> None:
    """Every site of every graph is rewritten, and every layer's cache is compressed."""
    assert [graph.refusals() for graph in graphs] == [""] * len(graphs)
    assert {graph.phase for graph in graphs} <= {"prefill", "decode"}
    assert {len(graph.rewritten) for graph in graphs} == {layers}
    for key, value in cache:
        assert isinstance(key, PrunedKeys)
        assert isinstance(value, StoredValues)
        assert key.shape == value.shape
        assert key.packed_tokens() >= PROMPT, "decoding packed nothing"


def check_refused(
    graphs: list[GraphReport], layers: int, cache: list[tuple[Any, Any]], reason: str
) -> None:
    """Every site of every graph is refused for this reason, and the cache is the model's own."""
    for graph in graphs:
        assert len(graph.sites) == layers, "an attention is not even reported"
        for site in graph.sites:
            assert site.refusal is not None, "rewritten"
            assert reason in site.refusal.reason
    assert {type(tensor) for layer in cache for tensor in layer} == {Tensor}


@pytest.mark.parametrize("name", some_are_slow(EXPECTED.keys() - REWRITTEN, {"late_rotary"}))
def test_what_is_refused_stays_exact_at_any_ratio(name: str) -> None:
    model, tokens = handwritten(name), chunks()
    exact, _ = model.feed(tokens)
    logits, _ = model.feed(tokens, compiled(model, key_ratio=0.5))
    assert_close(logits, exact, torch.float32)


@pytest.mark.parametrize("name", some_are_slow(WITH_TWIN, {"nanogpt", "bloom", "grouped"}))
def test_ratio_half_equals_the_simulated_method(name: str) -> None:
    model, twin, tokens = handwritten(name), handwritten(name, twin=True), chunks()
    exact, _ = model.feed(tokens)
    config = SparkConfig(**{**EXACT, "key_ratio": 0.5})
    with SimulatedSpark(config, HEADS, kv_heads(model)) as simulated:
        expected, _ = twin.feed(tokens, stepwise(twin, simulated))
    logits, _ = model.feed(tokens, compiled(model, key_ratio=0.5))
    assert_close(logits, expected, torch.float32)
    assert (expected - exact).abs().max() > 1e-3, "pruning changed nothing: the oracle is blind"


def kv_heads(model: Any) -> int:
    return model.attentions[0].kv_heads if len(model.attentions) else HEADS


def stepwise(model: Any, simulated: SimulatedSpark) -> Any:
    """The model with the oracle told of each forward."""

    def call(*args: Any) -> Any:
        simulated.begin_step()
        return model(*args)

    return call


@pytest.mark.parametrize("name", some_are_slow(WITHOUT_TWIN, {"sinks"}))
def test_ratio_half_equals_the_model_over_the_recovered_cache(name: str) -> None:
    """Each step attends to its cache as the eager model does to the dense form of that cache."""
    model, tokens = handwritten(name), chunks()
    exact, _ = model.feed(tokens)

    def compare(step: Tensor, past: Any) -> Any:
        logits, present = model_c(step, past)
        if past is not None:
            past = [(plain(key), plain(value)) for key, value in past]
        assert_close(logits, model(step, past)[0], torch.float32)
        return logits, present

    model_c = compiled(model, key_ratio=0.5)
    logits, _ = model.feed(tokens, compare)
    assert (logits - exact).abs().max() > 1e-3, "pruning changed nothing: the oracle is blind"
