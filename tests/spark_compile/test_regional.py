"""Layers compiled one by one: all of them compressed at any depth, equal ones compiled once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils import compile_regions
from compiled import EXACT, is_compressed
from decoders import decode, decoder, prompt
from torch import Tensor, nn
from torch._dynamo.utils import counters
from zoo import CACHE

import spark_compile
from spark_compile import SparkError, SparkWarning
from spark_compile.regional import find_blocks
from spark_compile.report import collect_report


def llama(depth: int = 4) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, num_hidden_layers=depth, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(7)
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def generated(model: Any, ids: torch.Tensor, steps: int = 8) -> Any:
    return model.generate(
        ids, max_new_tokens=steps, do_sample=False, pad_token_id=0, return_dict_in_generate=True
    )


def optimized(model: Any) -> Any:
    return spark_compile.optimize(model, regional=True, strict=True, **EXACT)


def compiled_layers(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend="spark", options={**EXACT, "strict": True})
    return model


def regions(model: Any) -> Any:
    return compile_regions(model, backend="spark", options=EXACT)


def are_compressed(cache: Any) -> bool:
    return is_compressed([(layer.keys, layer.values) for layer in cache.layers])


def check_all_compressed(compile_it: Any, depth: int) -> None:
    ids = torch.randint(1, 90, (1, 20))
    expected = generated(llama(depth), ids).sequences
    model = compile_it(llama(depth))
    first = generated(model, ids)
    assert torch.equal(first.sequences, expected)
    assert are_compressed(first[CACHE])
    with collect_report() as report:
        assert torch.equal(generated(model, ids).sequences, expected)
    assert not report.graphs


def test_more_layers_than_dynamo_keeps_graphs() -> None:
    check_all_compressed(optimized, 12)


@pytest.mark.parametrize("compile_it", [compiled_layers, regions])
@pytest.mark.filterwarnings("ignore:spark found no attention:spark_compile.SparkWarning")
def test_layers_compiled_by_others(compile_it: Any) -> None:
    with torch._dynamo.config.patch(recompile_limit=3):
        check_all_compressed(compile_it, 4)


def test_prompts_of_other_lengths() -> None:
    """The third is too short to pack: what the second relied on must be a guard of every layer."""
    model, plain = optimized(llama(2)), llama(2)
    for length, batch in ((20, 1), (31, 1), (3, 1), (24, 2)):
        ids = torch.randint(1, 90, (batch, length))
        actual = generated(model, ids)
        assert torch.equal(actual.sequences, generated(plain, ids).sequences)
        assert are_compressed(actual[CACHE])


def test_layers_that_take_and_return_keys_and_values() -> None:
    model, tokens = optimized(decoder(layers=4)), prompt(13)
    exact, _ = decode(decoder_like(model), tokens, None, 9)
    logits, past = decode(model, tokens, None, 9)
    torch.testing.assert_close(logits, exact, atol=2e-5, rtol=2e-5)
    assert is_compressed(past)


def decoder_like(model: Any) -> Any:
    """The same weights, not compiled."""
    plain = decoder(layers=4)
    plain.load_state_dict(model.state_dict())
    return plain


class Recurrent(nn.Module):
    """A layer with a state and no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x: Tensor, past: Any) -> tuple[Tensor, tuple[Tensor]]:
        rows = x[:, None, :, :1]
        return self.inner(x), (rows if past is None else torch.cat([past[0], rows], 2),)


def test_blocks_without_attention_are_no_failure() -> None:
    """As in hybrid decoders: several, of which equal ones share a graph, before the first one."""
    model = decoder(layers=4)
    model.attentions = nn.ModuleList([Recurrent(), Recurrent(), *model.attentions[2:]])
    _, past = decode(optimized(model.requires_grad_(False)), prompt(13), None, 5)
    assert is_compressed(past[2:])


def test_equal_layers_are_compiled_once() -> None:
    model = optimized(llama())
    with collect_report() as report:
        generated(model, torch.randint(1, 90, (1, 20)))
    phases = [graph.phase for graph in report.graphs]
    assert phases == ["prefill"] * 4 + ["decode"] * 4
    assert [graph.phase for graph in report.graphs if graph.lower_ms] == ["prefill", "decode"]
    assert all(len(graph.rewritten) == 1 for graph in report.graphs)


def test_layers_that_differ_are_not_taken_for_one_another() -> None:
    def scaled() -> Any:
        model = llama()
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.scaling = 0.1 + index % 2
        return model

    ids = torch.randint(1, 90, (1, 20))
    assert torch.equal(
        generated(optimized(scaled()), ids).sequences, generated(scaled(), ids).sequences
    )


@pytest.mark.slow
def test_inductor_compiles_no_more_for_more_layers() -> None:
    compiled = []
    for depth in (2, 5):
        counters.clear()
        torch._dynamo.reset()
        model = spark_compile.optimize(llama(depth), regional=True, window=4)
        assert are_compressed(generated(model, torch.ones(1, 20, dtype=torch.long))[CACHE])
        compiled.append(counters["aot_autograd"]["total"])
    assert compiled == [2, 2]


def test_a_limit_is_said_of_a_frame_that_gave_no_graph() -> None:
    """As accelerate's hooks are, which break the graph before the module that they are of."""

    def hooked(number: int, x: torch.Tensor) -> torch.Tensor:
        before = list(range(number))  # what is guarded on
        torch._dynamo.graph_break()
        return x + len(before)

    compiled = torch.compile(hooked, backend="spark", options=EXACT, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled(0, torch.zeros(3))
        with pytest.warns(SparkWarning, match="Dynamo compiles no more graphs of 'hooked'"):
            compiled(1, torch.zeros(3))


LIMITS = [("recompile_limit", 1), ("accumulated_recompile_limit", 3)]


@pytest.mark.parametrize(("name", "limit"), LIMITS)
def test_a_limit_of_dynamo_that_is_met_is_said(name: str, limit: int) -> None:
    model, ids = llama(), torch.randint(1, 90, (1, 20))
    for layer in model.model.layers:
        layer.compile(backend="spark", options=EXACT)
    with torch._dynamo.config.patch({name: limit}):
        with pytest.warns(SparkWarning, match="Dynamo compiles no more graphs of 'forward"):
            generated(model, ids)
        torch._dynamo.reset()
        with pytest.raises(SparkError, match="Dynamo compiles no more graphs"):
            generated(compiled_layers(model), ids)


def test_a_model_without_blocks_raises() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)]))
    with pytest.raises(ValueError, match="Sequential has no repeated blocks"):
        spark_compile.optimize(model, regional=True)
    with pytest.raises(ValueError, match="option 'window' is 1"):
        spark_compile.optimize(llama(1), regional=True, window=1)


class _ReachesInto(nn.Module):
    """Calls parts of its blocks, never a block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"part": nn.Linear(4, 4)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["part"](x)
        return x


def test_blocks_that_are_not_called_are_said() -> None:
    model = spark_compile.optimize(_ReachesInto(), regional=True)
    with pytest.warns(SparkWarning, match=r"called none of its 2 blocks \(blocks.0, ...\)"):
        model(torch.ones(1, 4))
    with warnings.catch_warnings(action="error"):
        model(torch.ones(1, 4))


def test_blocks_are_the_elements_of_the_outermost_lists() -> None:
    block = nn.ModuleDict({"experts": nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])})
    heads = nn.ModuleList([nn.Linear(4, 4)])
    model = nn.ModuleDict(
        {"inner": nn.ModuleDict({"layers": nn.ModuleList([block])}), "out": heads}
    )
    assert find_blocks(model) == {"inner.layers.0": block}


def test_formats_by_layer_need_the_whole_model() -> None:
    with pytest.raises(ValueError, match=r"'key_format' has texts by layer.*regional=True"):
        spark_compile.optimize(llama(), regional=True, key_format={"*.0.*": "dense"})
