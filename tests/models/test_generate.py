"""``generate`` in its ways, on an unmodified model: ratio 0 gives the eager model's tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from zoo import ARCHITECTURES, tiny

from spark_compile import PrunedKeys, StoredValues, kv_bytes, optimize

OPTIONS: dict[str, Any] = {"window": 4, "inner": "eager", "strict": True}


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
    model, ids = tiny("llama", "sdpa"), prompts(1, 20)
    if way == "prompt lookup":
        ids = ids[:, :10].repeat(1, 2)
    arguments = {"max_new_tokens": 25, "min_new_tokens": 25, **WAYS[way]}
    torch.manual_seed(3)
    expected = model.generate(ids, **arguments)
    torch.manual_seed(3)
    assert torch.equal(exact(model).generate(ids, **arguments), expected)


def test_assisted_decoding_crops_both_caches() -> None:
    model, assistant = tiny("llama", "sdpa"), tiny("gpt2", "sdpa")
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


def test_turns_share_a_prefix() -> None:
    """Two continuations of one cache, one through deepcopy, do not see each other's tokens."""
    model, ids = tiny("llama", "sdpa"), prompts(1, 20)
    compiled = exact(model)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        compiled(input_ids=ids, past_key_values=cache)
    for continuation in (prompts(1, 6), prompts(1, 6)):
        whole = torch.cat((ids, continuation), dim=1)
        arguments = {"max_new_tokens": 10, "do_sample": False}
        expected = model.generate(whole, **arguments)
        copied = copy.deepcopy(cache)
        assert torch.equal(compiled.generate(whole, past_key_values=copied, **arguments), expected)
    assert isinstance(cache.layers[0].keys, PrunedKeys)
    assert cache.get_seq_length() == 20


def test_the_cache_holds_states_that_store_less() -> None:
    model, ids = tiny("llama", "sdpa"), prompts(1, 200)
    compiled = optimize(copy.deepcopy(model), key_ratio=0.8, **OPTIONS)
    arguments = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    dense = model.generate(ids, **arguments).past_key_values
    pruned = compiled.generate(ids, **arguments).past_key_values
    assert isinstance(pruned.layers[1].keys, PrunedKeys)
    assert isinstance(pruned.layers[1].values, StoredValues)
    assert pruned.layers[0].keys.shape == dense.layers[0].keys.shape
    assert kv_bytes(pruned) < 0.78 * kv_bytes(dense)


def test_few_graphs_for_two_thousand_tokens() -> None:
    """A prompt and 2,000 tokens take at most three graphs, however the storage grows."""
    model = optimize(tiny("llama", "sdpa"), key_ratio=0.8, **{**OPTIONS, "window": 32})
    model.config.max_position_embeddings = 4096
    counters.clear()
    cache = transformers.DynamicCache(config=model.config)
    ids = prompts(1, 50)
    with torch.no_grad():
        for step in range(2001):
            ids = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            if step == 3:
                graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 3
    assert counters["stats"]["unique_graphs"] == graphs, "a later step compiled again"
    assert cache.get_seq_length() == 2050
    assert cache.layers[0].keys.packed_tokens() >= 2050 - 64


def test_transformers_compile_config_knows_the_backend() -> None:
    """A static cache is compiled by transformers itself; its sites are refused for now, aloud."""
    model, ids = tiny("llama", "sdpa"), prompts(1, 12)
    options = {k: v for k, v in OPTIONS.items() if k != "strict"}
    config = transformers.CompileConfig(backend="spark", options=options, mode=None)
    config._compile_all_devices = True
    arguments = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(ids, **arguments)
    with pytest.warns(UserWarning, match="written into a buffer by aten.index_copy"):
        actual = tiny("llama", "sdpa").generate(ids, compile_config=config, **arguments)
    assert torch.equal(actual, expected)


def test_output_attentions_are_left_alone_with_a_reason() -> None:
    model, ids = tiny("llama", "eager"), prompts(1, 12)
    compiled = optimize(copy.deepcopy(model), **{**OPTIONS, "strict": False})
    call = {"input_ids": ids, "output_attentions": True}
    with pytest.warns(UserWarning, match="attention weights are also used"):
        actual = torch.no_grad()(compiled)(**call)
    expected = torch.no_grad()(model)(**call)
    torch.testing.assert_close(actual.attentions, expected.attentions)
    torch.testing.assert_close(actual.logits, expected.logits)


def test_sliding_layers_are_refused_and_full_ones_rewritten() -> None:
    kind, fields = ARCHITECTURES["gemma3"]
    layers = ["sliding_attention", "full_attention"]
    config = kind(**{**fields, "layer_types": layers, "sliding_window": 16})
    model, ids = transformers.AutoModelForCausalLM.from_config(config).eval(), prompts(1, 30)
    compiled = optimize(
        copy.deepcopy(model), key_ratio=0.0, **{**OPTIONS, "strict": False, "window": 8}
    )
    arguments = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(ids, **arguments)
    with pytest.warns(UserWarning, match="as a sliding window does"):
        actual = compiled.generate(ids, **arguments)
    assert torch.equal(actual.sequences, expected.sequences)
    assert [type(layer.keys) for layer in actual.past_key_values.layers] == [
        torch.Tensor,
        PrunedKeys,
    ]
