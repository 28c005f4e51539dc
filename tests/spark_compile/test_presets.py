"""The option ``budget``: what it chooses, and that the bytes that are really stored keep to it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from states import prefill, tokens
from transformers import LlamaConfig, LlamaForCausalLM

import spark_compile
from spark_compile import OptionError, SparkConfig, SparkWarning, kv_bytes
from spark_compile.kernels.eviction import parse_scorer
from spark_compile.kernels.formats import Dense
from spark_compile.kernels.spec import SIDES, Spec
from spark_compile.presets import LADDER, SHARES, TOKENS, dense_bytes, share_of, side_bytes
from spark_compile.transformers_names import returned_cache

DIMS = (64, 80, 96, 128, 256)


def spec_for(budget: float | str, dim: int = 64, **options: Any) -> Spec:
    config = SparkConfig(budget=budget, **options)
    return config.spec(*(config.format_for(side, dim, torch.bfloat16) for side in SIDES))


def rungs(dim: int, dtype: torch.dtype) -> list[Spec]:
    configs = [SparkConfig(key_format=key, value_format=value) for key, value in LADDER]
    return [config.spec(*(config.format_for(s, dim, dtype) for s in SIDES)) for config in configs]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", DIMS)
def test_the_ladder_rises_in_bytes(dim: int, dtype: torch.dtype) -> None:
    shares = [share_of(spec) for spec in rungs(dim, dtype)]
    assert shares == sorted(set(shares))


@pytest.mark.parametrize("dim", DIMS)
def test_a_budget_takes_the_best_rung_that_fits(dim: int) -> None:
    specs = rungs(dim, torch.bfloat16)
    for spec, above in zip(specs, [*specs[1:], None], strict=True):
        assert spec_for(share_of(spec), dim) == spec
        if above is not None:
            assert spec_for(share_of(above) - 1e-6, dim) == spec


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", SHARES)
def test_each_name_has_formats_for_usual_head_sizes(name: str, dim: int) -> None:
    spec = spec_for(name, dim)
    assert share_of(spec) <= SHARES[name]
    assert spec == spec_for(SHARES[name], dim)


def test_the_readme_has_the_names() -> None:
    told = (Path(__file__).parents[2] / "README.md").read_text()
    assert all(f'`"{name}"` ({share})' in told for name, share in SHARES.items())


def test_longer_caches_take_a_smaller_share() -> None:
    for spec in rungs(64, torch.bfloat16):
        shares = [share_of(spec, tokens) for tokens in (TOKENS, 6000, 30_000, 10**6)]
        assert shares == sorted(shares, reverse=True)
        stored = sum(spec.pages(side).token_bytes for side in SIDES)
        assert shares[-1] == pytest.approx(stored / (2 * 64 * 2) * 33 / 32, rel=0.01)


def test_a_head_size_that_does_not_divide_takes_another_rung() -> None:
    spec = spec_for(0.42, 65)  # neither quarters nor halves
    assert spec.key.text.startswith("quantized(bits=6,")
    assert share_of(spec) <= 0.42


def test_a_budget_that_nothing_fits_names_the_least() -> None:
    with pytest.raises(ValueError, match=r"'budget' is 0.05: for head sizes 64/64 .* 0\.\d+ or mor") as caught:  # fmt: skip  # noqa: E501
        spec_for(0.05)
    least = float(str(caught.value).split(" or more")[0].split()[-1])
    assert spec_for(least) == rungs(64, torch.bfloat16)[0]
    assert least < share_of(spec_for(least)) + 1e-4


def test_a_site_without_fitting_formats_is_refused_with_the_reason() -> None:
    model, ids = llama(), torch.randint(64, (1, 70))
    model_c = torch.compile(model, backend="spark", options={"budget": 0.01, "inner": "eager"})
    with torch.no_grad(), pytest.warns(SparkWarning, match="option 'budget' is 0.01: for head"):
        model_c(input_ids=ids, use_cache=True)


@pytest.mark.parametrize(("name", "value"), [
    ("key_ratio", 0.8), ("value_ratio", 0.5), ("key_dtype", "int8"), ("value_dtype", "int8"),
    ("recovery", "none"), ("saliency", "absolute"),
])  # fmt: skip
def test_a_budget_takes_no_other_choice_of_formats(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=rf"'budget' \(0.5\) and '{name}' \({value!r}\)"):
        SparkConfig(budget=0.5, **{name: value})


def test_named_formats_go_before_a_budget_and_count() -> None:
    dense = (("*.0.*", "dense"),)
    config = SparkConfig(budget=0.65, key_format=dense)
    key, value = (config.format_for(s, 64, torch.bfloat16, "layers.0.attn") for s in SIDES)
    assert key.text == "dense"
    assert share_of(config.spec(key, value)) <= 0.65
    others = [config.format_for(s, 64, torch.bfloat16, "layers.1.attn").text for s in SIDES]
    last = rungs(64, torch.bfloat16)[-1]
    assert others == [last.key.text, last.value.text]
    assert value.text != last.value.text  # what is left beside dense keys
    with pytest.raises(ValueError, match=r"allowed is 0\.5"):
        SparkConfig(budget=0.5, key_format="dense").format_for("value", 64, torch.bfloat16)
    both = SparkConfig(budget=0.2, key_format="dense", value_format="dense")
    assert both.format_for("value", 64, torch.bfloat16).text == "dense"


def test_sides_of_different_sizes_share_a_budget() -> None:
    config, sizes = SparkConfig(budget=0.25), [(128, torch.bfloat16), (64, torch.bfloat16)]
    pairs = zip(SIDES, sizes, reversed(sizes), strict=True)
    spec = config.spec(*(config.format_for(s, *own, other=other) for s, own, other in pairs))
    assert (spec.key.head_dim, spec.value.head_dim) == (128, 64)
    assert share_of(spec) <= 0.25
    assert (spec.key.text, spec.value.text) in [
        (key.key.text, value.value.text)
        for key, value in zip(rungs(128, torch.bfloat16), rungs(64, torch.bfloat16), strict=True)
    ]


@pytest.mark.parametrize("change", [{"sinks": 64}, {"recent": 128}, {"window": 128}])
def test_dense_tokens_count(change: dict[str, int]) -> None:
    spec = spec_for(0.5)
    assert share_of(replace(spec, **change)) > share_of(spec)  # type: ignore[arg-type]


def test_positions_beside_evicted_tokens_count() -> None:
    plain = spec_for(0.3)
    exactly = share_of(plain)
    assert spec_for(exactly) == plain
    spec = spec_for(exactly, evict="snapkv(tokens=256)")
    assert (spec.key, spec.value) != (plain.key, plain.value)
    assert share_of(replace(spec, evict=parse_scorer("snapkv(tokens=256)"))) <= exactly


def test_the_default_knows_the_layer_of_a_scorer() -> None:
    config = SparkConfig(evict="pyramidkv(tokens=256,layers=4)")
    format = config.format_for("key", 64, torch.bfloat16, "model.layers.3.self_attn")
    assert format == SparkConfig(budget="near-lossless").format_for("key", 64, torch.bfloat16)


def test_a_cache_that_is_dense_at_that_length_takes_all() -> None:
    with pytest.raises(ValueError, match="allowed is 1"):
        spec_for(1, min_tokens=2 * TOKENS)


def llama(dim: int = 64) -> Any:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=dim,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8192,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("name", SHARES)
def test_a_real_cache_keeps_to_its_budget(name: str) -> None:
    model = llama().bfloat16()
    ids = torch.randint(64, (1, TOKENS))
    options = {"budget": name, "inner": "eager"}
    with torch.no_grad():
        dense = kv_bytes(returned_cache(model(input_ids=ids, use_cache=True, logits_to_keep=1)))
        spark_compile.optimize(model, **options)
        cache = returned_cache(model(input_ids=ids, use_cache=True, logits_to_keep=1))
    assert dense == 2 * dense_bytes(Dense(64, torch.bfloat16))
    assert 0.8 * SHARES[name] < kv_bytes(cache) / dense <= SHARES[name]


@pytest.mark.parametrize("options", [
    {"budget": 0.9, "window": 4}, {"budget": 0.9, "window": 4, "sink_tokens": 3},
    {"key_ratio": 0.5, "window": 2},
])  # fmt: skip
def test_no_growing_cache_takes_more_than_is_counted(options: dict[str, Any]) -> None:
    built = prefill(SparkConfig(**options), 300)
    keys, values = built.states
    for count in (1, 7, 90, 2, 1, 1, 60):
        keys, values = (state.appended(rows) for state, rows in
                        zip((keys, values), tokens(count), strict=True))  # fmt: skip
        for state, side in ((keys, "key"), (values, "value")):
            heads = state.shape[0] * state.shape[1]
            assert state.stored_bytes() <= heads * side_bytes(state.spec, side, state.tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize("dim", [16, 64])
def test_a_static_cache_takes_no_more_than_a_growing_one(dim: int) -> None:
    for spec in rungs(dim, torch.bfloat16):
        for side in SIDES:
            room = spec.room(TOKENS, TOKENS)
            shapes = spec.stored_shapes(side, (1, 1), *room)
            assert sum(map(math.prod, shapes)) <= side_bytes(spec, side)
