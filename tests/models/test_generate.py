"""``generate`` in its ways, on an unmodified model: ratio 0 gives the eager model's tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from zoo import ARCHITECTURES, CACHE, tiny

from spark_compile import PrunedKeys, StoredValues, kv_bytes, optimize

OPTIONS: dict[str, Any] = {"window": 4, "inner": "eager", "strict": True}


def llama() -> Any:
    """One layer: how a model generates has nothing to do with their number."""
    return tiny("llama", "sdpa", layers=1)


def exact(model: Any) -> Any:
    """A compiled copy that stores every channel."""
    return optimize(copy.deepcopy(model), key_ratio=0.0, **OPTIONS)


def prompts(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 90, (batch, length))


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "beam groups of returned sequences": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 8},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_way_of_generating(way: str) -> None:
    model, ids = llama(), prompts(1, 20)
    if way == "prompt lookup":
        ids = ids[:, :10].repeat(1, 2)
    arguments = {"max_new_tokens": 25, "min_new_tokens": 25, **WAYS[way]}
    torch.manual_seed(3)
    expected = model.generate(ids, **arguments)
    torch.manual_seed(3)
    assert torch.equal(exact(model).generate(ids, **arguments), expected)


def test_assisted_decoding_crops_both_caches() -> None:
    model, assistant = llama(), tiny("gpt2", "sdpa", layers=1)
    arguments = {"max_new_tokens": 20, "do_sample": False}
    ids = prompts(1, 12)
    expected = model.generate(ids, assistant_model=assistant, **arguments)
    actual = exact(model).generate(ids, assistant_model=exact(assistant), **arguments)
    assert torch.equal(actual, expected)


def test_a_left_padded_batch_twice_with_other_lengths() -> None:
    model = tiny("qwen3", "sdpa")
    compiled = exact(model)
    for batch, length in ((2, 19), (3, 31)):
        ids, mask = prompts(batch, length), torch.ones(batch, length, dtype=torch.long)
        mask[0, :5] = 0
        arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
        assert torch.equal(compiled.generate(ids, **arguments), model.generate(ids, **arguments))


@pytest.mark.slow
def test_padding_over_several_chunks() -> None:
    """Rows of queries that see nothing at all do not spoil the others."""
    model, ids = llama(), prompts(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 8, "prefill_chunk_size": 4}
    expected = model.generate(ids, **arguments)
    assert torch.equal(exact(model).generate(ids, **arguments), expected)


@pytest.mark.slow
def test_one_model_again_and_again() -> None:
    """The same prompt, another batch size, and the first prompt again."""
    model = llama()
    compiled, first = exact(model), prompts(1, 15)
    for ids in (first, first, prompts(3, 15), first):
        arguments = {"max_new_tokens": 12, "do_sample": False}
        assert torch.equal(compiled.generate(ids, **arguments), model.generate(ids, **arguments))


@pytest.mark.slow
def test_models_take_turns() -> None:
    """Step by step in one process, each with a cache of its own."""
    models = [llama(), tiny("gpt2", "eager")]
    runs = [(model, exact(model)) for model in models]
    caches = [[transformers.DynamicCache(config=m.config) for m in run] for run in runs]
    steps = [[prompts(1, length) for _ in models] for length in (13, *[1] * 9)]
    with torch.no_grad():
        for step in steps:
            for ids, run, cache in zip(step, runs, caches, strict=True):
                expected, actual = (
                    model(input_ids=ids, **{CACHE: past}).logits
                    for model, past in zip(run, cache, strict=True)
                )
                torch.testing.assert_close(actual, expected)


def in_threads(*calls: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """The results of calls that run at the same time."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(timeout=300) for future in [pool.submit(call) for call in calls]]


def test_two_threads_generate_at_once() -> None:
    models, ids = [llama(), tiny("qwen3", "sdpa", layers=1)], [prompts(2, 15), prompts(1, 22)]
    arguments = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
    expected = [model.generate(i, **arguments) for model, i in zip(models, ids, strict=True)]
    compiled = [exact(model) for model in models]
    for _ in range(2):  # compiling at once, and running at once
        actual = in_threads(
            *(
                lambda m=model, i=tokens: m.generate(i, **arguments)
                for model, tokens in zip(compiled, ids, strict=True)
            )
        )
        assert all(map(torch.equal, actual, expected))


def test_one_model_in_one_thread_after_another() -> None:
    model, arguments = llama(), {"max_new_tokens": 15, "do_sample": False}
    compiled = exact(model)
    for ids in (prompts(1, 15), prompts(1, 15)):
        (actual,) = in_threads(lambda tokens=ids: compiled.generate(tokens, **arguments))
        assert torch.equal(actual, model.generate(ids, **arguments))


@pytest.mark.slow
def test_turns_hand_their_cache_on() -> None:
    """A conversation: each turn gets the cache of the one before, and what the user adds."""
    model = llama()
    compiled = exact(model)
    arguments = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
    added = [prompts(1, length) for length in (14, 5, 5)]
    histories = []
    for speaker in (model, compiled):
        history = torch.empty((1, 0), dtype=torch.long)
        cache = transformers.DynamicCache(config=model.config)
        for turn in added:
            ids = torch.cat((history, turn), dim=1)
            output = speaker.generate(ids, **{CACHE: cache}, **arguments)
            history, cache = output.sequences, output[CACHE]
        histories.append(history)
    assert torch.equal(*histories)
    assert isinstance(cache.layers[0].keys, PrunedKeys)


@pytest.mark.slow
def test_a_prefix_becomes_a_batch() -> None:
    """A cache of one sequence, repeated for three that go on in different ways."""
    model, prefix, rest = llama(), prompts(1, 20), prompts(3, 4)
    whole = torch.cat((prefix.expand(3, -1), rest), dim=1)
    arguments = {"max_new_tokens": 10, "do_sample": False}
    compiled, cache = exact(model), transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        compiled(input_ids=prefix, **{CACHE: cache})
    cache.batch_repeat_interleave(3)
    assert isinstance(cache.layers[0].keys, PrunedKeys)
    actual = compiled.generate(whole, **{CACHE: cache}, **arguments)
    assert torch.equal(actual, model.generate(whole, **arguments))


@pytest.mark.parametrize("filler", ["dense", "compressed"])
@pytest.mark.filterwarnings("ignore::spark_compile.SparkWarning")
def test_a_cache_made_of_tuples(filler: str) -> None:
    """Keys and values of each layer, as older code hands them on, filled by either model."""
    model, ids = llama(), prompts(1, 18)
    compiled, cache = exact(model), transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        (model if filler == "dense" else compiled)(input_ids=ids, **{CACHE: cache})
    legacy = tuple((layer.keys, layer.values) for layer in cache.layers)
    whole = torch.cat((ids, prompts(1, 3)), dim=1)
    arguments = {"max_new_tokens": 12, "do_sample": False}
    again = transformers.DynamicCache(legacy)
    actual = compiled.generate(whole, **{CACHE: again}, **arguments)
    assert torch.equal(actual, model.generate(whole, **arguments))
    assert isinstance(again.layers[0].keys, PrunedKeys)


def test_turns_share_a_prefix() -> None:
    """Two continuations of one cache, one through deepcopy, do not see each other's tokens."""
    model, ids = llama(), prompts(1, 20)
    compiled = exact(model)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        compiled(input_ids=ids, **{CACHE: cache})
    for continuation in (prompts(1, 6), prompts(1, 6)):
        whole = torch.cat((ids, continuation), dim=1)
        arguments = {"max_new_tokens": 10, "do_sample": False}
        expected = model.generate(whole, **arguments)
        copied = copy.deepcopy(cache)
        assert torch.equal(compiled.generate(whole, **{CACHE: copied}, **arguments), expected)
    assert isinstance(cache.layers[0].keys, PrunedKeys)
    assert cache.get_seq_length() == 20


def test_the_cache_holds_states_that_store_less() -> None:
    model, ids = tiny("llama", "sdpa"), prompts(1, 200)
    compiled = optimize(copy.deepcopy(model), key_ratio=0.8, **OPTIONS)
    arguments = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    dense = model.generate(ids, **arguments)[CACHE]
    pruned = compiled.generate(ids, **arguments)[CACHE]
    assert isinstance(pruned.layers[1].keys, PrunedKeys)
    assert isinstance(pruned.layers[1].values, StoredValues)
    assert pruned.layers[0].keys.shape == dense.layers[0].keys.shape
    assert kv_bytes(pruned) < 0.78 * kv_bytes(dense)


def test_few_graphs_for_two_thousand_tokens() -> None:
    """A prompt and 2,000 tokens take at most three graphs, however the storage grows."""
    model = optimize(llama(), key_ratio=0.8, **{**OPTIONS, "window": 32})
    model.config.max_position_embeddings = 4096
    counters.clear()
    cache = transformers.DynamicCache(config=model.config)
    ids = prompts(1, 50)
    with torch.no_grad():
        for step in range(2001):
            ids = model(input_ids=ids, **{CACHE: cache}).logits[:, -1:].argmax(-1)
            if step == 3:
                graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 3
    assert counters["stats"]["unique_graphs"] == graphs, "a later step compiled again"
    assert cache.get_seq_length() == 2050
    assert cache.layers[0].keys.packed_tokens() >= 2050 - 64


TRANSLATORS: dict[str, tuple[type, dict[str, Any]]] = {
    "t5": (transformers.T5Config, {
        "vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0, "initializer_factor": 3.0,
    }),
    "bart": (transformers.BartConfig, {
        "vocab_size": 96, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96, "max_position_embeddings": 128, "init_std": 0.2,
        "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    }),
}  # fmt: skip


@pytest.mark.parametrize("how", [
    {}, {"cache_implementation": "static"}, pytest.param({"num_beams": 2}, marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.parametrize("name", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::spark_compile.SparkWarning")
def test_encoder_and_decoder(name: str, how: dict[str, Any]) -> None:
    """The cache of the cross-attention, which nothing is appended to, stays as it is."""
    kind, fields = TRANSLATORS[name]
    torch.manual_seed(7)
    model = transformers.AutoModelForSeq2SeqLM.from_config(kind(**fields)).eval()
    ids, mask = prompts(2, 17), torch.ones(2, 17, dtype=torch.long)
    mask[0, 12:] = 0
    compiled = optimize(copy.deepcopy(model), key_ratio=0.0, **{**OPTIONS, "strict": False})
    arguments = {
        "attention_mask": mask, "max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False,
        "no_repeat_ngram_size": 2, "return_dict_in_generate": True, "disable_compile": True, **how,
    }  # fmt: skip
    expected = model.generate(ids, **arguments)
    actual = compiled.generate(ids, **arguments)
    assert torch.equal(actual.sequences, expected.sequences)
    assert len(expected.sequences.unique()) > 3, "the model repeats itself: compares little"
    crossed = actual[CACHE].cross_attention_cache.layers
    assert {type(states) for layer in crossed for states in (layer.keys, layer.values)} == {
        torch.Tensor
    }


def test_output_attentions_are_left_alone_with_a_reason() -> None:
    model, ids = tiny("llama", "eager"), prompts(1, 12)
    compiled = optimize(copy.deepcopy(model), **{**OPTIONS, "strict": False})
    call = {"input_ids": ids, "output_attentions": True}
    with pytest.warns(UserWarning, match="attention weights are also used"):
        actual = torch.no_grad()(compiled)(**call)
    expected = torch.no_grad()(model)(**call)
    torch.testing.assert_close(actual.attentions, expected.attentions)
    torch.testing.assert_close(actual.logits, expected.logits)


def test_sliding_layers_and_full_ones_are_rewritten() -> None:
    kind, fields = ARCHITECTURES["gemma3"]
    layers = ["sliding_attention", "full_attention"]
    config = getattr(transformers, kind)(**{**fields, "layer_types": layers, "sliding_window": 16})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    arguments = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    compiled = exact(model)
    for batch, length in ((1, 30), (2, 23)):
        ids = prompts(batch, length)
        expected = model.generate(ids, **arguments)
        actual = compiled.generate(ids, **arguments)
        assert torch.equal(actual.sequences, expected.sequences)
        keys = [layer.keys for layer in actual[CACHE].layers]
        assert all(isinstance(key, PrunedKeys) for key in keys)
        assert [key.tokens for key in keys] == [15, length + 19]
