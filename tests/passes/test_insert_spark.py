"""``insert_spark``: canonical attention becomes operators on the pruned cache, or a refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decoders import ATTENTIONS, Decoder, SdpaMasked, causal_mask, decoder, prompt
from torch import Tensor, nn

from spark_compile.adoption import adopt as adopt_buffer
from spark_compile.config import SparkConfig
from spark_compile.form import StateForm
from spark_compile.kernels.reference.store import ALL
from spark_compile.kernels.spec import SIDES, parse_spec
from spark_compile.passes.find_attention import FindAttention
from spark_compile.passes.find_kv_append import FindKVAppend
from spark_compile.passes.insert_spark import InsertSpark
from spark_compile.passes.normalize import Normalize
from spark_compile.passes.program import Growth
from spark_compile.passes.states import adopt

FIND = (Normalize(), FindAttention(), FindKVAppend())
PASSES = (*FIND, InsertSpark())
LENGTH, LAYERS = 13, 2
STEP = torch.ops.spark.step.default


class Padded(SdpaMasked):
    """The first two tokens are padding."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, is_prompt: bool) -> Tensor:
        mask = causal_mask(query, key) & (torch.arange(key.shape[2]) > 1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def refusals(program: Any) -> list[str]:
    return [site.refusal.reason if site.refusal else "" for site in program.sites]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_prefill_attends_exactly_and_then_stores(capture: Any, name: str) -> None:
    program = capture(decoder(name), prompt(LENGTH), passes=PASSES)
    assert program.matches["InsertSpark"] == LAYERS
    assert refusals(program) == [""] * LAYERS
    order = [str(node.target) for node in program.graph.nodes]
    attentions = [i for i, t in enumerate(order) if t.startswith(("aten.scaled", "aten.softmax"))]
    builds = [i for i, target in enumerate(order) if target == "spark.build.default"]
    assert len(attentions) == len(builds) == LAYERS
    assert attentions[0] < builds[0] < attentions[1] < builds[1], "the next layer comes first"
    assert [replaced.side for replaced in program.replaced.values()] == ["key", "value"] * LAYERS
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
    assert count(program, "spark.step") == LAYERS
    assert count(program, "spark.attention", "spark.recover", "aten.scaled") == 0
    assert set(program.growth.values()) == {Growth(1, ALL, shared=False)}
    pasts = [replaced.past for replaced in program.replaced.values()]
    assert set(pasts) == set(program.states)


@pytest.mark.parametrize("name", ["manual", "sdpa_masked", "padded"])
def test_a_mask_stays_bound(capture: Any, compressed: Any, name: str) -> None:
    """A causal one as a number."""
    model = Decoder(Padded).eval() if name == "padded" else decoder(name)
    program = capture(model, prompt(3), compressed(model, prompt(LENGTH)), passes=PASSES)
    nodes = program.graph.find_nodes(op="call_function", target=STEP)
    assert len(nodes) == LAYERS
    for node in nodes:
        mask, _, causal_offset = node.args[7:10]
        if name == "padded":
            assert mask.meta["val"].shape[-2] == 3
            assert causal_offset is None
        else:
            assert mask is None
            assert str(causal_offset.meta["val"]) in {
                str(past.meta["val"].shape[2]) for past in program.states
            }
        assert parse_spec(node.args[12]).scale == pytest.approx(8**-0.5)
    assert set(program.growth.values()) == {Growth(3, ALL, shared=False)}


def test_a_plain_past_is_compressed_after_an_exact_attention(capture: Any, count: Any) -> None:
    model = decoder()
    past = model(prompt(LENGTH))[1]
    program = capture(model, prompt(1), past, passes=PASSES)
    assert refusals(program) == [""] * LAYERS
    assert count(program, "aten.scaled_dot_product_attention") == LAYERS
    assert count(program, "spark.step") == 0
    assert {int(replaced.length) for replaced in program.replaced.values()} == {LENGTH + 1}


EXPECTED = {  # for a prefill and a decode; None: either way will do, "": for any reason
    "tokens_first": (None, "in another layout"),
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
    assert all(made.length == 8 and not made.form.spec.sinks for made in prefill.replaced.values())
    with_past = capture(model, prompt(3), compressed(model, prompt(LENGTH)), passes=PASSES)
    assert refusals(with_past) == [""]
    assert set(with_past.growth.values()) == {Growth(3, 8, shared=False)}


@pytest.mark.parametrize("merged", [False, True])
def test_a_full_buffer_rolls_unless_its_heads_are_merged(capture: Any, merged: bool) -> None:
    shape = (2, 8, 12) if merged else (2, 8, 3, 4)

    def step(query: Tensor, new: list[Tensor], buffers: list[Tensor]) -> Tensor:
        rows = []
        for token, buffer in zip(new, buffers, strict=True):
            rolled = torch.cat((buffer[:, 1:], token), 1)
            buffer.copy_(rolled)
            rows.append(rolled.reshape(2, 8, 3, 4).transpose(1, 2))
        mask = torch.ones(1, 8, dtype=torch.bool)
        return F.scaled_dot_product_attention(query, *rows, attn_mask=mask)

    tokens, buffers = ([torch.randn(shape)[:, :n] for _ in range(2)] for n in (1, 8))
    program = capture(step, torch.randn(2, 3, 1, 4), tokens, buffers, passes=PASSES)
    reason = "the buffer of the keys has heads and channels in one dimension" if merged else ""
    assert [refusal.partition(" (")[0] for refusal in refusals(program)] == [reason]
    assert len(program.adopted) == (0 if merged else 2)


def test_a_stacked_buffer_is_told_as_one(capture: Any) -> None:
    """Keys and values in one buffer, as moshi has them: not an attention without a cache."""

    def step(query: Tensor, key: Tensor, value: Tensor, cache: Tensor, at: Tensor) -> Tensor:
        cache[0].index_copy_(2, at, key)
        cache[1].index_copy_(2, at, value)
        mask = torch.arange(cache.shape[3]) <= at
        return F.scaled_dot_product_attention(query, cache[0], cache[1], attn_mask=mask[None])

    rows = [torch.randn(2, 3, 1, 4) for _ in range(3)]
    program = capture(step, *rows, torch.zeros(2, 2, 3, 8, 4), torch.tensor([5]), passes=PASSES)
    (refusal,) = refusals(program)
    assert "the keys are written into a buffer by aten.select_scatter.default" in refusal


def test_a_cache_that_layers_share_grows_once(capture: Any, compressed: Any, count: Any) -> None:
    model = decoder("shared_cache", layers=1)
    program = capture(model, prompt(1), compressed(model, prompt(LENGTH)), passes=PASSES)
    assert refusals(program) == [""] * 2
    assert len(program.replaced) == 2
    first, second = program.graph.find_nodes(op="call_function", target=STEP)
    assert first.args[1] is second.args[1], "both attend to the new tokens"
    assert [call.args[10] for call in (first, second)] == [None, ALL], "the last one appends"
    assert set(program.growth.values()) == {Growth(1, ALL, shared=True)}


def test_cross_attention_without_a_cache_is_refused(capture: Any) -> None:
    def cross(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key * 2, value * 2)

    program = capture(cross, *(torch.randn(1, 2, n, 8) for n in (3, 7, 7)), passes=PASSES)
    assert refusals(program) == ["the keys are not returned by the graph: no cache is kept"]


@pytest.mark.parametrize(("length", "phase"), [(7, "prefill"), (9, "decode")])
def test_keys_that_come_from_another_graph_are_told_so(
    capture: Any, length: int, phase: str
) -> None:
    """As where the cache breaks the graph: it is written before this one, and read in it."""
    rows = [torch.randn(1, n, 2, 8) for n in (7, length, length)]

    def attends(*rows: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in rows))

    program = capture(attends, *rows, passes=PASSES)
    reason = "the keys are an argument of the graph: how they are cached is not part of it"
    assert (refusals(program), program.phase) == ([reason], phase)


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
    same = SparkConfig(window=4, inner="aot_eager", strict=True, key_ratio=0.5)
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


class Paged(nn.Module):
    """The cache of transformers' continuous batching: rows of one buffer, found by index."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.reads = reads
        self.register_buffer("keys", torch.zeros(20, 2, 8))
        self.register_buffer("values", torch.zeros(20, 2, 8))

    def forward(self, x: Tensor, write_index: Tensor, read_index: Tensor) -> Tensor:
        tokens = []
        for buffer in (self.keys, self.values):
            new, rows = x.squeeze(0).transpose(0, 1), None
            if self.reads == "window":
                rows = torch.index_select(buffer, 0, read_index)
                rows.masked_scatter_((read_index == 7)[:, None, None], new)
            buffer.index_copy_(0, write_index, new)
            if self.reads == "all":
                rows = torch.index_select(buffer, 0, read_index)
            rows = new if rows is None else rows
            tokens.append(rows.transpose(0, 1).unsqueeze(0))
        return F.scaled_dot_product_attention(x, *tokens)


@pytest.mark.parametrize(
    ("reads", "operator"),
    [("nothing", "index_copy"), ("all", "index_copy"), ("window", "masked_scatter")],
)
def test_a_paged_cache_is_told_as_a_buffer(capture: Any, reads: str, operator: str) -> None:
    x, index = torch.randn(1, 2, 3, 8), torch.arange(3)
    program = capture(Paged(reads), x, index, torch.arange(7), passes=PASSES)
    (reason,) = refusals(program)
    assert reason.startswith(f"the keys are written into a buffer by aten.{operator}.default, ")


def test_a_buffer_is_traced_in_the_shapes_that_it_is_adopted_in(capture: Any) -> None:
    buffer = torch.randn(2, 3, 64, 16)
    program = capture(torch.neg, buffer)
    (node,) = program.graph.find_nodes(op="placeholder")
    config = SparkConfig(window=4, min_tokens=40)
    formats = (config.format_for(side, 16, torch.float32) for side in SIDES)
    adopt(program, node, "key", StateForm(config.spec(*formats), True), None)
    fake, real = program.states[node], adopt_buffer(buffer, program.adopted[node], ())
    assert fake.pages.shape == real.pages.shape
    assert fake.head.shape == real.head.shape
