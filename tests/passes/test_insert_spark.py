"""``insert_spark``: canonical attention becomes operators on the pruned cache, or a refusal."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decoders import ATTENTIONS, decoder, prompt
from torch import Tensor

from spark_compile.config import SparkConfig
from spark_compile.passes.find_attention import FindAttention
from spark_compile.passes.find_kv_append import FindKVAppend
from spark_compile.passes.insert_spark import InsertSpark, store_keys, store_values
from spark_compile.passes.normalize import Normalize

FIND = (Normalize(), FindAttention(), FindKVAppend())
PASSES = (*FIND, InsertSpark())
LENGTH, LAYERS = 13, 2


def refusals(program: Any) -> list[str]:
    return [site.refusal.reason if site.refusal else "" for site in program.sites]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_prefill_attends_exactly_and_prunes_behind_it(capture: Any, name: str) -> None:
    program = capture(decoder(name), prompt(LENGTH), passes=PASSES)
    assert program.matches["InsertSpark"] == LAYERS
    assert refusals(program) == [""] * LAYERS
    order = [str(node.target) for node in program.graph.nodes]
    attentions = [i for i, t in enumerate(order) if t.startswith(("aten.scaled", "aten.softmax"))]
    prunings = [i for i, target in enumerate(order) if target == "spark.prune.default"]
    assert len(attentions) == len(prunings) == LAYERS
    assert attentions[0] < prunings[0] < attentions[1] < prunings[1], "the next layer comes first"
    kinds = [replaced.is_key for replaced in program.replaced.values()]
    assert kinds == [True, False] * LAYERS
    assert all(replaced.past is None for replaced in program.replaced.values())
    assert all(replaced.length == LENGTH for replaced in program.replaced.values())
    assert set(program.replaced) <= set(program.returned())


@pytest.mark.parametrize("name", ATTENTIONS)
def test_decode_appends_and_attends_in_one_operator(
    capture: Any, compressed: Any, count: Any, name: str
) -> None:
    model = decoder(name)
    past = compressed(model, prompt(LENGTH))
    before = capture(model, prompt(1), past, passes=FIND)
    assert count(before, "spark.attention", "spark.kv_append") == 3 * LAYERS
    program = capture(model, prompt(1), past, passes=PASSES)
    assert program.matches["InsertSpark"] == LAYERS
    assert refusals(program) == [""] * LAYERS
    assert count(program, "spark.append_attend") == LAYERS
    assert count(program, "spark.attention", "spark.recover", "aten.scaled") == 0
    assert set(program.extra.values()) == {1}
    pasts = [replaced.past for replaced in program.replaced.values()]
    assert set(pasts) == set(program.states)


@pytest.mark.parametrize("name", ["manual", "sdpa_masked"])
def test_a_mask_stays_bound(capture: Any, compressed: Any, name: str) -> None:
    model = decoder(name)
    program = capture(model, prompt(3), compressed(model, prompt(LENGTH)), passes=PASSES)
    target = torch.ops.spark.append_attend.default
    for node in program.graph.find_nodes(op="call_function", target=target):
        mask, causal_offset = node.args[11:13]
        assert mask.meta["val"].shape[-2] == 3
        assert causal_offset is None
        assert node.args[13] == pytest.approx(8**-0.5)
    assert set(program.extra.values()) == {3}


def test_a_plain_past_is_compressed_after_an_exact_attention(capture: Any, count: Any) -> None:
    model = decoder()
    past = model(prompt(LENGTH))[1]
    program = capture(model, prompt(1), past, passes=PASSES)
    assert refusals(program) == [""] * LAYERS
    assert count(program, "aten.scaled_dot_product_attention") == LAYERS
    assert count(program, "spark.append_attend") == 0
    assert {int(replaced.length) for replaced in program.replaced.values()} == {LENGTH + 1}


EXPECTED = {  # for a prefill and a decode; None: either way will do, "": for any reason
    "tokens_first": ("in another layout", "in another layout"),
    "scaled_late": ("computed from what is cached", "computed from what is cached"),
    "one_tensor": ("same tensor", "keys and values"),
    "key_norms": (None, "the cache is also read by"),
    "past_reader": (None, "the cache is also read by"),
    "three_parts": (None, ""),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_refusals(capture: Any, compressed: Any, name: str) -> None:
    """Of a prefill, and of a decode whose past is compressed whatever became of its prefill."""
    model = decoder(name, layers=1)
    prefill = capture(model, prompt(LENGTH), passes=PASSES)
    with_past = capture(model, prompt(1), compressed(model, prompt(LENGTH)), passes=PASSES)
    for program, reason in zip((prefill, with_past), EXPECTED[name], strict=True):
        if reason is not None:
            assert program.matches["InsertSpark"] == 0
            assert program.replaced == {}
            assert all(reason in found for found in refusals(program))
            names = {node.name for node in program.graph.nodes}
            assert all(site.refusal.node in names for site in program.sites)


def test_a_sliding_window_lets_go_of_its_first_tokens(capture: Any, compressed: Any) -> None:
    model = decoder("sliding", layers=1)
    prefill = capture(model, prompt(LENGTH), passes=PASSES)
    assert refusals(prefill) == [""]
    assert all(made.slides and made.length == 8 for made in prefill.replaced.values())
    with_past = capture(model, prompt(3), compressed(model, prompt(LENGTH)), passes=PASSES)
    assert refusals(with_past) == [""]
    assert all(made.dropped == 3 for made in with_past.replaced.values())


def test_a_cache_that_layers_share_grows_once(capture: Any, compressed: Any, count: Any) -> None:
    model = decoder("shared_cache", layers=1)
    program = capture(model, prompt(1), compressed(model, prompt(LENGTH)), passes=PASSES)
    assert refusals(program) == [""] * 2
    assert count(program, "spark.append_attend") == 2
    assert len(program.replaced) == 2
    first, second = program.graph.find_nodes(
        op="call_function", target=torch.ops.spark.append_attend.default
    )
    assert [call.args[1].meta["val"].shape[2] for call in (first, second)] == [1, 0]
    assert second.args[10].target is operator.add


def test_cross_attention_without_a_cache_is_refused(capture: Any) -> None:
    def cross(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key * 2, value * 2)

    program = capture(cross, *(torch.randn(1, 2, n, 8) for n in (3, 7, 7)), passes=PASSES)
    assert refusals(program) == ["the keys are not returned by the graph: no cache is kept"]


@pytest.mark.parametrize("window", [0, 4])
def test_latents_written_into_a_passing_tensor_are_no_buffer(capture: Any, window: int) -> None:
    """Latent attention as DeepSeek has it: keys are put together of parts, in no cache."""

    def latent(query: Tensor, past: Tensor, new: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        cache = torch.cat((past, new), dim=2)
        key = query.new_empty(1, 2, cache.shape[2], 8)
        key[..., :6].copy_(cache @ up)
        key[..., 6:].copy_(cache[..., :2].expand(-1, 2, -1, -1))
        output = F.scaled_dot_product_attention(query, key, cache @ up)
        return output, cache[:, :, -window:] if window else cache

    inputs = (torch.randn(1, 2, 3, 8), torch.randn(1, 1, 5, 4), torch.randn(1, 1, 3, 4))
    program = capture(latent, *inputs, torch.randn(1, 2, 4, 6), passes=PASSES)
    (reason,) = refusals(program)
    assert "computed from what is cached" in reason


def test_a_cache_of_other_options_is_refused(capture: Any, compressed: Any) -> None:
    model = decoder()
    past = compressed(model, prompt(LENGTH))
    other = SparkConfig(window=4, inner="eager", key_ratio=0.75)
    program = capture(model, prompt(1), past, passes=PASSES, config=other)
    assert refusals(program) == ["the cache was compressed with other options"] * LAYERS
    same = SparkConfig(window=4, inner="aot_eager", strict=True)
    program = capture(model, prompt(1), past, passes=PASSES, config=same)
    assert refusals(program) == [""] * LAYERS


def test_keys_of_an_unknown_dtype_are_refused(capture: Any) -> None:
    program = capture(decoder().double(), prompt(LENGTH), passes=PASSES)
    assert refusals(program) == ["keys of torch.float64 cannot be pruned"] * LAYERS


def test_sites_tell_their_shapes_and_bytes(capture: Any) -> None:
    model = decoder(query_heads=6, kv_heads=3, dim=16)
    program = capture(model, prompt(LENGTH), passes=PASSES)
    for layer, site in enumerate(program.sites):
        assert site.layer == f"attentions.{layer}"
        assert (site.query_heads, site.kv_heads, site.key_dim, site.value_dim) == (6, 3, 16, 16)
        assert site.dense_token_bytes == 3 * (16 + 16) * 4
        assert site.stored_token_bytes == 3 * ((8 + 1) * 4 + 2 * 2 + 16 * 4)


@pytest.mark.parametrize(("length", "packed"), [(3, 0), (8, 0), (9, 4), (30, 25)])
def test_store_keeps_sinks_and_recent_tokens_dense(length: int, packed: int) -> None:
    config = SparkConfig(window=4, sink_tokens=1, inner="eager")
    key, query = torch.randn(2, 2, length, 8), torch.randn(2, 4, length, 8)
    kept, bits, scale, _, stats, tail = store_keys(
        key, torch.ops.spark.query_stats(query, 2, config.window), config
    )
    assert kept.shape[2] == bits.shape[2] == scale.shape[2] == (packed or config.window)
    assert tail.shape[2] == length - packed + config.window
    assert stats.any() == (packed == 0)
    torch.testing.assert_close(tail[:, :, :1], key[:, :, :1])
    torch.testing.assert_close(tail[:, :, 1 : length - packed], key[:, :, 1 + packed :])
    torch.testing.assert_close(store_values(key, config)[0][:, :, :length], key)


@pytest.mark.parametrize("name", ["sliding", "key_norms", "past_reader", "shared_cache"])
@pytest.mark.filterwarnings("ignore::spark_compile.SparkWarning")
def test_a_cache_never_goes_back_and_forth(name: str) -> None:
    """Once it is refused it stays dense: recovering and pruning again each step adds up errors."""
    model = decoder(name, layers=1)
    compiled = torch.compile(model, backend="spark", options={"window": 4, "inner": "eager"})
    kinds, past = [], None
    for tokens in (prompt(LENGTH), *(prompt(1) for _ in range(5))):
        _, past = compiled(tokens, past)
        kinds.append(type(past[0][0]).__name__)
    assert len(set(kinds[1:])) == 1, kinds
