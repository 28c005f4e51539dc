"""Models that evict tokens of their prompts equal eager ones that hide the same tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from compiled import compiled
from eviction import MaskedEager, Numbers
from handwritten import BATCH
from handwritten_caches import handwritten
from oracle import assert_close
from torch import Tensor
from zoo import CACHE, heads, tiny

from spark_compile import PrunedKeys, SparkError, SparkWarning, kv_bytes, optimize
from spark_compile.kernels.eviction import Scorer, parse_scorer
from spark_compile.kernels.reference.evict import kept_positions, take
from spark_compile.kernels.reference.store import Store
from spark_compile.report import collect_report

OPTIONS: dict[str, Any] = {"key_ratio": 0.0, "window": 4, "recent_tokens": 3, "inner": "eager"}
NUMBERS = Numbers(window=4, recent=3)
PROMPT, STEPS = 40, 14
SCORERS = [
    "snapkv(tokens=21,window=6)", "knorm(tokens=20)", "keydiff(tokens=20)",
    "streamingllm(tokens=18,n_sink=3)", "pyramidkv(tokens=22,window=6,layers=2,beta=4)",
]  # fmt: skip


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def scorers_of(text: str, layers: int = 2) -> list[Scorer]:
    return [parse_scorer(text).in_layer(f"layers.{layer}") for layer in range(layers)]


def prompt(batch: int = 2, length: int = PROMPT) -> Tensor:
    """Different tokens: equal ones have keys of equal norm in the first layer."""
    return torch.stack([torch.randperm(90)[:length] + 1 for _ in range(batch)])


def generated(model: Any, ids: Tensor, padding: int = 0, **how: Any) -> Any:
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    arguments = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False,
                 "output_logits": True, **how}  # fmt: skip
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, return_dict_in_generate=True,
                              pad_token_id=0, **arguments)  # fmt: skip


def expected_of(model: Any, text: str, ids: Tensor, padding: int = 0, **how: Any) -> Any:
    with MaskedEager(scorers_of(text), NUMBERS, *heads(model)):
        return generated(model, ids, padding, **how)


def assert_same(actual: Any, expected: Any) -> None:
    assert torch.equal(actual.sequences, expected.sequences)
    for mine, theirs in zip(actual.logits, expected.logits, strict=True):
        assert_close(mine, theirs, torch.float32)


@pytest.mark.parametrize("padding", [slow(0), 5])
@pytest.mark.parametrize("text", [SCORERS[0], *(slow(text) for text in SCORERS[1:])])
def test_the_eager_model_with_hidden_tokens(text: str, padding: int) -> None:
    """Grouped heads; more than three pages of generated tokens are packed."""
    model, ids = tiny("llama", "sdpa"), prompt()
    expected = expected_of(model, text, ids, padding)
    assert not torch.equal(expected.logits[5], generated(model, ids, padding).logits[5])
    actual = generated(
        optimize(copy.deepcopy(model), evict=text, strict=True, **OPTIONS), ids, padding
    )
    assert_same(actual, expected)
    for layer, scorer in zip(actual[CACHE].layers, scorers_of(text), strict=True):
        assert layer.keys.shape[2] == layer.values.shape[2] == PROMPT + STEPS - 1
        assert layer.keys._read_counts().dropped == PROMPT - scorer.tokens
        assert layer.keys.packed_tokens() >= scorer.tokens - 3 - 4 + 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_models(name: str, attention: str) -> None:
    ids, text = prompt(), SCORERS[0]
    expected = expected_of(tiny(name, "sdpa"), text, ids, 5)
    model = optimize(tiny(name, attention), evict=text, strict=True, sink_tokens=0, **OPTIONS)
    assert_same(generated(model, ids, 5), expected)


@pytest.mark.slow
def test_sinks_stay() -> None:
    ids, text, numbers = prompt(), "knorm(tokens=20)", Numbers(window=4, recent=3, sinks=2)
    model = tiny("llama", "sdpa")
    with MaskedEager(scorers_of(text), numbers, *heads(model)):
        expected = generated(model, ids)
    compiled = optimize(copy.deepcopy(model), evict=text, sink_tokens=2, strict=True, **OPTIONS)
    assert_same(generated(compiled, ids), expected)


@pytest.mark.slow
def test_beams() -> None:
    """The beams of a prompt have the same tokens of it, in whatever order they go on."""
    ids, text, how = prompt(), SCORERS[0], {"num_beams": 3, "output_logits": False}
    expected = expected_of(tiny("llama", "sdpa"), text, ids, **how)
    model = optimize(tiny("llama", "sdpa"), evict=text, strict=True, **OPTIONS)
    assert torch.equal(generated(model, ids, **how).sequences, expected.sequences)


@pytest.mark.slow
def test_prompt_lookup_crops_what_came_after_the_eviction() -> None:
    """The first drafted tokens come with the prompt: they are among its latest ones."""
    ids, text = prompt(1, 20).repeat(1, 2), SCORERS[0]
    how = {"prompt_lookup_num_tokens": 3, "output_logits": False}
    model = optimize(tiny("llama", "sdpa"), evict=text, strict=True, **OPTIONS)
    expected = expected_of(tiny("llama", "sdpa"), text, ids, **how)
    assert torch.equal(generated(model, ids, **how).sequences, expected.sequences)


@pytest.mark.slow
@pytest.mark.parametrize("padding", [0, 5])
def test_a_chunk_after_the_prompt(padding: int) -> None:
    text, ids = SCORERS[0], prompt(2, 60)

    def logits(model: Any) -> Tensor:
        mask, cache = torch.ones_like(ids), transformers.DynamicCache(config=model.config)
        mask[0, :padding] = 0
        parts = []
        for start, end in ((0, 40), (40, 41), (41, 52), (52, 53), (53, 60)):
            with torch.no_grad():
                output = model(ids[:, start:end], attention_mask=mask[:, :end], use_cache=True,
                               **{CACHE: cache})  # fmt: skip
            cache = output[CACHE]
            parts.append(output.logits[:, -1 if start == 0 else 0 :])
        return torch.cat(parts, 1)

    eager = tiny("llama", "sdpa")
    with MaskedEager(scorers_of(text), NUMBERS, *heads(eager)):
        expected = logits(eager)
    model = optimize(tiny("llama", "sdpa"), evict=text, strict=True, **OPTIONS)
    assert_close(logits(model), expected, torch.float32)


@pytest.mark.parametrize("padding", [slow(0), 5])
@pytest.mark.parametrize("text", [SCORERS[0], slow(SCORERS[3])])
def test_a_static_cache(text: str, padding: int) -> None:
    """The prompt is a step of an empty cache; the next prompt is one of the same cache."""
    ids, how = prompt(), {"cache_implementation": "static", "disable_compile": True}
    expected = expected_of(tiny("llama", "sdpa"), text, ids, padding)
    model = optimize(tiny("llama", "sdpa"), evict=text, strict=True, **OPTIONS)
    with collect_report() as report:
        output = generated(model, ids, padding, **how)
    assert "prompts are evicted by" in report.summary()
    assert_same(output, expected)
    assert output[CACHE].layers[0].keys.static
    assert_same(generated(model, ids, padding, **how), expected)


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"key_ratio": 0.5},
    {"key_ratio": 0.5, "key_dtype": "int8", "value_dtype": "int8"},
    {"key_format": "int8", "value_format": "pruned(kept=8)"},
])  # fmt: skip
def test_with_every_format(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Native kernels, whatever else is stored, give what the reference does."""
    ids, results = prompt(), []
    for operators in (torch.ops.spark, torch.ops.spark_reference):
        torch._dynamo.reset()
        monkeypatch.setattr(torch.ops, "spark", operators)
        model = optimize(tiny("llama", "sdpa"), evict=SCORERS[0], **{**OPTIONS, **options})
        results.append(generated(model, ids, 5))
        monkeypatch.undo()
    whole = optimize(tiny("llama", "sdpa"), **{**OPTIONS, **options})
    assert_same(*results)
    assert kv_bytes(results[0][CACHE]) < kv_bytes(generated(whole, ids, 5)[CACHE])


@pytest.mark.slow
def test_a_short_prompt_is_not_evicted() -> None:
    ids = prompt(length=15)
    model = optimize(tiny("llama", "sdpa"), evict=SCORERS[0], strict=True, **OPTIONS)
    output = generated(model, ids)
    assert_same(output, generated(tiny("llama", "sdpa"), ids))
    assert output[CACHE].layers[0].keys.dense().shape[2] == 15 + STEPS - 1
    # The same graphs evict a longer one.
    assert_same(
        generated(model, ids := prompt()), expected_of(tiny("llama", "sdpa"), SCORERS[0], ids)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral_sliding", "gemma3_sliding", "gemma4_shared"])
@pytest.mark.parametrize("length", [9, PROMPT])
def test_layers_that_slide_evict_by_their_window_alone(name: str, length: int) -> None:
    model = optimize(tiny(name, "sdpa"), evict="knorm(tokens=20)", strict=True, **OPTIONS)
    with collect_report() as report:
        output = generated(model, prompt(length=length))
    sites = [site for graph in report.graphs for site in graph.sites]
    kinds = getattr(model.config, "layer_types", None) or []
    assert any(site.evict for site in sites) == ("full_attention" in kinds)
    for layer in output[CACHE].layers:
        if (keys := layer.keys) is None:  # it reads the cache of another layer
            continue
        assert isinstance(keys, PrunedKeys)
        evicted = keys.spec.evict is not None and length > 20
        assert keys._read_counts().dropped == (length - 20 if evicted else 0)


@pytest.mark.slow
def test_inductor_and_regions() -> None:
    ids, text = prompt(), SCORERS[0]
    expected = expected_of(tiny("llama", "sdpa"), text, ids)
    model = optimize(tiny("llama", "sdpa"), regional=True, evict=text, strict=True,
                     **{**OPTIONS, "inner": "inductor"})  # fmt: skip
    assert_same(generated(model, ids), expected)


def test_a_scorer_by_layer_has_no_regions() -> None:
    for evict in (SCORERS[4], {"*.0.*": SCORERS[0]}):
        with pytest.raises(ValueError, match=r"option 'evict' (is|has) .*regional=True"):
            optimize(tiny("llama", "sdpa"), regional=True, evict=evict, **OPTIONS)


def test_a_graph_that_reads_the_cache_otherwise_says_what_it_cannot() -> None:
    model = optimize(tiny("llama", "sdpa"), evict=SCORERS[0], **OPTIONS)
    cache = generated(model, prompt())[CACHE]
    mean = torch.compile(lambda keys: keys.mean(), backend="spark", options={"inner": "eager"})
    with (
        pytest.warns(SparkWarning, match="found no attention"),
        pytest.raises(SparkError, match="evicted tokens cannot be recovered"),
    ):
        mean(cache.layers[0].keys)


@pytest.mark.parametrize("name", ["gpt_fast", slow("slice_writes")])
def test_a_buffer_of_the_model(name: str) -> None:
    """Written by a prefill that reads all of it under a mask, or its own tokens alone."""
    model, tokens = handwritten(name), [torch.randint(1, 30, (BATCH, n)) for n in (13, 1, 1, 4)]
    _, exact = model.feed(tokens[:1])
    _, cache = model.feed(tokens, compiled(model, evict="knorm(tokens=11)"))
    for (key, value), (dense_key, dense_value) in zip(cache, exact, strict=True):
        assert isinstance(key, PrunedKeys)
        stored = {side: Store(s.pages, s.head, s.spec, side)
                  for side, s in (("key", key), ("value", value))}  # fmt: skip
        heads_first = key.form.tokens_dim == 2
        rows = [t[:, :, :13] if heads_first else t[:, :13].transpose(1, 2)
                for t in (dense_key, dense_value)]  # fmt: skip
        positions = kept_positions(rows[0], [], None, 0, key.spec)
        assert torch.equal(stored["key"].positions()[:, :, :11], positions)
        assert (stored["key"].tokens, stored["key"].dropped) == (19, 2)
        for store, dense in zip(stored.values(), rows, strict=True):
            torch.testing.assert_close(store.rows()[:, :, :11], take(dense, positions))
