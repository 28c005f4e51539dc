"""Caches with a capacity: transformers' static ones and preallocated buffers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from compiled import compiled
from handwritten import BATCH, DIM, VOCABULARY
from handwritten_caches import handwritten
from torch import Tensor
from zoo import CACHE, tiny

from spark_compile import PrunedKeys, StoredValues, kv_bytes, optimize
from spark_compile.report import collect_report

STATIC = {"cache_implementation": "static", "disable_compile": True}
OPTIONS = {"inner": "eager", "window": 4, "strict": True}


def generated(model: Any, ids: Tensor, tokens: int = 20, **how: Any) -> Any:
    with torch.no_grad():
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
            return_dict_in_generate=True, pad_token_id=0, **how,
        )  # fmt: skip


def prompt(length: int, batch: int = 2, vocabulary: int = 90) -> Tensor:
    return torch.randint(1, vocabulary, (batch, length))


def chunks(*lengths: int) -> list[Tensor]:
    """For the hand-written decoders."""
    return [prompt(length, BATCH, VOCABULARY) for length in lengths]


def layers_of(output: Any) -> list[Any]:
    return output[CACHE].layers


def assert_compressed(output: Any) -> None:
    for layer in layers_of(output):
        assert isinstance(layer.keys, PrunedKeys)
        assert isinstance(layer.values, StoredValues)
        assert layer.keys.static
        assert layer.values.static


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_static_cache_gives_the_eager_tokens(name: str) -> None:
    """One graph for the prefill and one for the decode; another prompt costs a prefill."""
    ids, shorter = prompt(13), prompt(7)
    expected = [generated(tiny(name, "sdpa"), each).sequences for each in (ids, shorter)]
    model = optimize(tiny(name, "sdpa"), key_ratio=0.0, **OPTIONS)
    with collect_report() as report:
        output = generated(model, ids, **STATIC)
    assert [graph.phase for graph in report.graphs] == ["prefill", "decode"]
    assert torch.equal(output.sequences, expected[0])
    assert_compressed(output)
    assert torch.equal(generated(model, shorter, **STATIC).sequences, expected[1])


def test_a_static_cache_is_stored_smaller() -> None:
    ids, how = prompt(60), {"key_ratio": 0.8, "key_dtype": "int8", "value_dtype": "int8"}
    dense = kv_bytes(generated(tiny("llama", "sdpa"), ids, **STATIC)[CACHE])
    output = generated(optimize(tiny("llama", "sdpa"), **how, **OPTIONS), ids, **STATIC)
    assert_compressed(output)
    assert kv_bytes(output[CACHE]) < 0.7 * dense


@pytest.mark.parametrize(
    ("length", "batch"), [(13, 2), (30, 2), (13, 1)], ids=["grows_full", "starts_full", "alone"]
)
def test_a_static_sliding_window_rolls(length: int, batch: int) -> None:
    """Alternating sliding and full layers; the prompt is shorter or longer than the window."""
    ids = prompt(length, batch)
    expected = generated(tiny("gemma3_sliding", "sdpa"), ids, tokens=24).sequences
    model = optimize(tiny("gemma3_sliding", "sdpa"), key_ratio=0.0, **OPTIONS)
    output = generated(model, ids, tokens=24, **STATIC)
    assert torch.equal(output.sequences, expected)
    assert_compressed(output)


def test_layers_that_share_a_rolling_window_are_compressed() -> None:
    """The last two of four layers read the keys and values of the first two."""
    ids = prompt(16)
    expected = generated(tiny("gemma4_shared", "sdpa"), ids).sequences
    model = optimize(tiny("gemma4_shared", "sdpa"), key_ratio=0.0, **OPTIONS)
    output = generated(model, ids, **STATIC)
    assert torch.equal(output.sequences, expected)
    for layer in layers_of(output)[:2]:
        assert isinstance(layer.keys, PrunedKeys)
        assert layer.keys.static


@pytest.mark.filterwarnings("ignore::spark_compile.SparkWarning")
def test_eager_steps_over_a_compressed_cache_are_right() -> None:
    """What runs when Dynamo has given a function up."""
    ids = prompt(22)
    model = optimize(tiny("gemma3_sliding", "sdpa"), key_ratio=0.0, **OPTIONS | {"strict": False})
    cache = transformers.StaticCache(config=model.config, max_cache_len=60)
    logits = []
    with torch.no_grad():
        for number, part in enumerate(ids.split([10, *[1] * 12], dim=1)):
            with torch.compiler.set_stance("force_eager" if 2 < number < 9 else "default"):
                logits.append(model(input_ids=part, **{CACHE: cache}).logits)
        expected = tiny("gemma3_sliding", "sdpa")(ids).logits
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-4, rtol=1e-4)


def test_a_buffer_that_is_written_in_an_unknown_way_is_dense_again() -> None:
    """In a graph that knows nothing of attention; the model goes on with it."""
    model, (first, then) = handwritten("gpt_fast"), chunks(13, 2)
    call = compiled(model)
    zero, last = torch.zeros(BATCH, 2, 1, DIM), torch.tensor([12])
    forget = torch.compile(
        lambda cache: cache.index_copy_(2, last, zero), backend="spark", options={"inner": "eager"}
    )
    logits, buffers = [], []
    for forward, change in ((model, lambda c: c.index_copy_(2, last, zero)), (call, forget)):
        for attention in model.attentions:
            attention.reset()
        with torch.no_grad():
            forward(first, torch.arange(13))
            buffer = model.attentions[0].k_cache
            assert isinstance(buffer, PrunedKeys) == (forward is call)
            with warnings.catch_warnings(action="ignore"):
                change(buffer)
            assert type(buffer) is Tensor
            assert model.attentions[0].k_cache is buffer
            buffers.append(buffer.clone())
            logits.append(forward(then, torch.arange(13, 15)))
    torch.testing.assert_close(*buffers)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_decode_alone_is_compiled_with_a_compile_config() -> None:
    """transformers' prefill is eager then: the buffers it leaves are taken over."""
    ids = prompt(13)
    expected = generated(tiny("llama", "sdpa"), ids).sequences
    config = transformers.CompileConfig(
        backend="spark", mode=None, options={"key_ratio": 0.0, **OPTIONS}
    )
    config._compile_all_devices = True
    model = tiny("llama", "sdpa")
    how = {"cache_implementation": "static", "compile_config": config}
    output = generated(model, ids, **how)
    assert torch.equal(output.sequences, expected)
    assert_compressed(output)


def test_reset_forgets_the_tokens() -> None:
    ids = prompt(13)
    model = optimize(tiny("llama", "sdpa"), key_ratio=0.0, **OPTIONS)
    cache = generated(model, ids, **STATIC)[CACHE]
    cache.reset()
    for layer in cache.layers:
        assert not layer.keys.dense().any()
        assert not layer.values.dense().any()


def test_stored_tensors_keep_their_addresses() -> None:
    """No growth, no new buffer and no new graph in five hundred steps of decoding."""
    model = optimize(tiny("llama", "sdpa"), **OPTIONS)
    cache = transformers.StaticCache(config=model.config, max_cache_len=540)
    ids, seen = prompt(13), set()
    with torch.no_grad(), collect_report() as report:
        model(input_ids=ids, **{CACHE: cache})
        for _ in range(500):
            model(input_ids=ids[:, :1], **{CACHE: cache})
            stored = [
                (t.pages, t.head) for layer in cache.layers for t in (layer.keys, layer.values)
            ]
            seen.add(tuple(part.data_ptr() for pair in stored for part in pair))
    assert len(report.graphs) == 2
    assert len(seen) == 1
    assert cache.layers[0].keys.packed_tokens() >= 500


@pytest.mark.parametrize("eagerly", [False, True], ids=["made_in_the_graph", "made_before"])
def test_other_capacities_and_batches_are_compressed_too(eagerly: bool) -> None:
    """Dynamo has symbols for such sizes from the second one on."""
    model = optimize(tiny("llama", "sdpa"), key_ratio=0.0, **OPTIONS)
    for batch, length, capacity in ((1, 13, 30), (3, 11, 42)):
        ids = prompt(length + 9, batch)
        cache = transformers.StaticCache(config=model.config, max_cache_len=capacity)
        if eagerly:
            cache.early_initialization(batch, 2, 16, torch.float32, torch.device("cpu"))
        parts = ids.split([length, *[1] * 9], dim=1)
        with torch.no_grad():
            logits = [model(input_ids=part, **{CACHE: cache}).logits for part in parts]
            expected = tiny("llama", "sdpa")(ids).logits
        torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-4, rtol=1e-4)
        for layer in cache.layers:
            assert isinstance(layer.keys, PrunedKeys)
            assert layer.keys.shape[2] == capacity


@pytest.mark.parametrize("name", ["gpt_fast", "litgpt", "slice_writes"])
def test_a_buffer_of_the_module_becomes_the_state(name: str) -> None:
    """The object that the module holds is the state from then on: nothing dense stays beside it."""
    model, tokens = handwritten(name), chunks(13, *[1] * 9)
    exact, _ = model.feed(tokens)
    logits, cache = model.feed(tokens, compiled(model))
    torch.testing.assert_close(logits, exact, atol=1e-4, rtol=1e-4)
    for attention, (key, value) in zip(model.attentions, cache, strict=True):
        assert attention.k_cache is key
        assert isinstance(key, PrunedKeys)
        assert isinstance(value, StoredValues)


def test_writing_again_from_an_earlier_position_forgets_what_came_after() -> None:
    model = handwritten("gpt_fast")
    call = compiled(model)
    first, other = chunks(13, 5)
    for attention in model.attentions:
        attention.reset()
    with torch.no_grad():
        call(first, torch.arange(13))
        again = call(other, torch.arange(6, 11))
        for attention in model.attentions:
            attention.reset()
        model(first[:, :6], torch.arange(6))
        expected = model(other, torch.arange(6, 11))
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4)
