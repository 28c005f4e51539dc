"""Calibration: what it measures, what it chooses, and that it leaves everything as it was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from states import KEY_DIM, VALUE_DIM, prefill
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import spark_compile
from spark_compile import OptionError, Plan, SparkConfig, SparkError, SparkWarning
from spark_compile.kernels.reference.store import query_stats
from spark_compile.kernels.spec import SIDES
from spark_compile.presets import TOKENS, share_of
from spark_compile.report import GraphReport, Refusal, Report, Site
from spark_compile.sensitivity import _layers, divergence, packed, site_spec
from spark_compile.transformers_names import cache_argument, returned_cache

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4,
         "num_key_value_heads": 2, "initializer_range": 0.3}  # fmt: skip
INT2 = "quantized(bits=2)"
SHORT: dict[str, Any] = {"windows": 2, "context": 96, "scored": 16, "progress": False}


def llama(layers: int = 2, **sizes: Any) -> Any:
    config = LlamaConfig(**SIZES | sizes, num_hidden_layers=layers)
    return LlamaForCausalLM(config).eval()


def text(tokens: int = 300) -> Tensor:
    return torch.randint(64, (tokens,))


def stored_share(plan: Plan, dtype: torch.dtype = torch.float32, dim: int = 16) -> float:
    """What the plan's formats take of dense bytes, from specs."""
    shares = []
    for layer in plan.layers:
        config = SparkConfig(key_format=layer.key, value_format=layer.value)
        spec = config.spec(*(config.format_for(s, dim, dtype) for s in SIDES))
        shares.append(share_of(spec))
    return sum(shares) / len(shares)


def test_a_layer_without_effect_gets_the_fewest_bits() -> None:
    model = llama(3)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    plan = spark_compile.calibrate(model, text(), budget=0.25, **SHORT)
    idle = plan.layers[1]
    assert (idle.key, idle.value) == (next(iter(idle.key_kl)), next(iter(idle.value_kl)))
    assert set(idle.key_kl.values()) | set(idle.value_kl.values()) == {0.0}
    assert idle.share < min(plan.layers[0].share, plan.layers[2].share)
    assert plan.kl > 0
    assert plan.budget == 0.25
    assert 0.18 < plan.share <= 0.25  # what the idle layer leaves is not enough for a dense side
    assert stored_share(plan) == pytest.approx(plan.share, rel=0.005)


def test_fewer_bits_do_more_and_more_bytes_do_less() -> None:
    model, ids = llama(), text()
    plans = [spark_compile.calibrate(model, ids, budget=b, **SHORT) for b in (0.22, 0.3, 1)]
    for layer in plans[0].layers:
        for kl in (layer.key_kl, layer.value_kl):
            values = list(kl.values())
            assert values[0] > 4 * values[-3]
            assert values[-2] > values[-1] == 0  # int8 and dense
            assert list(kl)[-1] == "dense"
    assert plans[0].kl > plans[1].kl > 100 * plans[2].kl
    assert plans[0].layers[0].key_kl == plans[1].layers[0].key_kl  # measuring repeats exactly
    assert {layer.key for layer in plans[2].layers} == {"dense"}  # what fits beside the slack


def test_bytes_are_those_of_the_dtype_that_is_asked_for() -> None:
    model, ids = llama(), text()
    plan = spark_compile.calibrate(model, ids, budget=0.4, dtype=torch.bfloat16, **SHORT)
    assert (plan.measured.dtype, plan.measured.computed_in) == ("bfloat16", "float32")
    assert 0.37 < plan.share <= 0.4
    assert stored_share(plan, torch.bfloat16) == pytest.approx(plan.share, rel=0.005)
    own = spark_compile.calibrate(model, ids, budget=0.4, **SHORT)
    assert own.layers[0].key_kl == plan.layers[0].key_kl
    assert own.kl < plan.kl


def test_a_model_in_16_bits_is_told_what_it_does_not_see() -> None:
    with pytest.warns(SparkWarning, match=r"in float32, with dtype=torch\.bfloat16"):
        plan = spark_compile.calibrate(llama(1).bfloat16(), text(), budget=0.5, **SHORT)
    assert (plan.measured.dtype, plan.measured.computed_in) == ("bfloat16", "bfloat16")


@pytest.mark.parametrize("side", SIDES)
def test_the_divergence_is_that_of_the_compiled_model(side: str) -> None:
    """One side of one layer in a format, in a cache that the backend has really packed."""
    model, ids = llama(1), text(112)
    plan = spark_compile.calibrate(model, ids, budget=1, **SHORT | {"windows": 1})
    past, chunk = ids[None, :96], ids[None, 96:]

    def logits(run: Any) -> Tensor:
        with torch.no_grad():
            cache = returned_cache(run(input_ids=past, use_cache=True))
            inputs = {"input_ids": chunk, cache_argument(model.forward): cache}
            return run(**inputs, use_cache=True).logits[0]  # type: ignore[no-any-return]

    layer = plan.layers[0]
    format, kl = next(iter(getattr(layer, f"{side}_kl").items()))
    options = {"key_format": "dense", "value_format": "dense", "inner": "eager"}
    options[f"{side}_format"] = format
    found = logits(torch.compile(model, backend="spark", options=options))
    assert divergence(logits(model), found) == pytest.approx(kl, rel=0.001)


@pytest.mark.parametrize("text", ["quantized(bits=3,scaled=True)", "spark(kept=3)", "int8"])
def test_what_packed_tokens_are_worth_is_what_a_state_is_worth(text: str) -> None:
    built = prefill(SparkConfig(key_format=text, value_format="int8"), 150)
    statistics = {each: query_stats(built.query, 3, 32, each=each) for each in (True, False)}
    worth = packed(built.key, "key", built.keys.spec, statistics)
    torch.testing.assert_close(worth, built.keys.dense())  # a native kernel's last bit
    assert torch.equal(packed(built.value, "value", built.keys.spec, {}), built.values.dense())


@pytest.mark.parametrize("slides", [False, True])
def test_the_first_tokens_stay_dense_as_in_a_cache(slides: bool) -> None:
    config, rows = SparkConfig(key_format="int8", value_format=INT2), torch.randn(1, 2, 100, 8)
    formats = [config.format_for(side, 8, torch.float32) for side in SIDES]
    for side, format in zip(SIDES, formats, strict=True):
        spec = site_spec(side, format, slides=slides)
        assert spec.sinks == config.spec(*formats, slides=slides).sinks
        worth = packed(rows, side, spec, {})
        same = (worth == rows).all(-1)[0, 0]
        assert same.sum() < 100
        assert torch.equal(same[: spec.sinks], torch.ones(spec.sinks, dtype=torch.bool))


def test_sliding_layers_are_measured_on_what_they_hold() -> None:
    config = MistralConfig(**SIZES, num_hidden_layers=1, sliding_window=200)
    model, window = MistralForCausalLM(config).eval(), SHORT | {"windows": 1, "context": 256}
    plan = spark_compile.calibrate(model, text(), budget=0.8, **window)
    assert min(plan.layers[0].key_kl[name] for name in list(plan.layers[0].key_kl)[:3]) > 0
    with pytest.raises(OptionError, match=r"budget is 0.25: allowed is 0\.\d+ or more") as caught:
        spark_compile.calibrate(model, text(), budget=0.25, **window)  # the tail is 64 of 199
    least = float(str(caught.value).split("allowed is ")[1].split()[0])
    assert spark_compile.calibrate(model, text(), budget=least, **window).share <= least


def test_the_model_is_as_it_was() -> None:
    model = llama().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: (t, t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    own = {name: dict(vars(module)) for name, module in model.named_modules()}
    spark_compile.calibrate(model, text(), budget="balanced", **SHORT)
    assert [module.training for module in model.modules()] == modes
    for name, t in model.state_dict(keep_vars=True).items():
        assert t is before[name][0]
        assert torch.equal(t, before[name][1])
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == own
    compiled = torch._dynamo.eval_frame._debug_get_cache_entry_list
    assert not compiled(type(model.model).forward)
    assert not compiled(type(model).forward)


def test_rows_are_texts_and_what_was_measured_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    ids = text(450).view(3, 150)
    plan = spark_compile.calibrate(llama(), ids, budget="near-lossless", **SHORT | {"progress": 1})
    measured = plan.measured
    assert measured.model == "LlamaForCausalLM"
    assert (measured.dtype, measured.computed_in) == ("float32", "float32")
    assert 0 <= measured.noise < 1e-6
    assert (measured.windows, measured.context, measured.scored) == (2, 96, 16)
    assert measured.head_sizes == ((16, 16),)
    assert measured.versions["torch"] == torch.__version__
    out, err = capfd.readouterr()
    assert (out, "calibrating" in err) == ("", True)
    assert TOKENS == 4096


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"windows": 0}, "windows is 0: allowed is an integer from 1"),
    ({"context": 63}, "context is 63: allowed is an integer from 68"),
    ({"scored": 1.5}, "scored is 1.5: allowed is an integer from 1"),
    ({"budget": 0}, "budget is 0: allowed is a number with 0 < budget <= 1"),
    ({"budget": None}, "budget is None: allowed is"),
    ({"budget": "half"}, "budget is 'half': allowed is .* one of 'near-lossless', "),
    ({"budget": 0.01}, r"budget is 0.01: allowed is 0\.\d+ or more for this model"),
    ({"dtype": torch.int8}, r"dtype is torch.int8: allowed is one of \[torch.float32, "),
    ({"tokens": "text"}, "tokens are .*str.*: allowed is a tensor of ids"),
    ({"tokens": torch.zeros(300)}, r"tokens are torch.float32 \[300\]: allowed is a tensor of ids"),
    ({"tokens": torch.zeros(5, 60).long()}, r"tokens are \[5, 60\]: 2 windows of 112 tokens are"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"tokens": text(), "budget": 0.5, **SHORT, **change}
    with pytest.raises(OptionError, match=message):
        spark_compile.calibrate(llama(1), **arguments)


@pytest.mark.parametrize("compiling", [spark_compile.optimize, torch.compile])
def test_a_compiled_model_is_refused(compiling: Any) -> None:
    model = compiling(llama(1))
    with pytest.raises(OptionError, match="the model is compiled: allowed is one as it was before"):
        spark_compile.calibrate(model, text(), budget=0.5, **SHORT)


class NoCache(torch.nn.Module):
    """Returns logits alone."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama(1)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        return self.model(input_ids=input_ids).logits  # type: ignore[no-any-return]


def test_a_model_without_a_cache_is_named() -> None:
    with pytest.raises(SparkError, match="NoCache returned NoneType for its cache"):
        spark_compile.calibrate(NoCache(), text(), budget=0.5, **SHORT)


def test_layers_that_share_a_cache_are_named() -> None:
    built = prefill(SparkConfig(), 40)
    cache = SimpleNamespace(layers=[SimpleNamespace(keys=built.keys, values=built.values)])
    sites = tuple(Site(f"layers.{n}.attn", 6, 3, KEY_DIM, VALUE_DIM, 1, 1) for n in range(2))
    with pytest.raises(
        SparkError, match=r"2 attentions use 1 .*: layers\.0\.attn, layers\.1\.attn"
    ):
        _layers(Report([GraphReport("prefill", sites)]), cache, 40)
    assert len(_layers(Report([GraphReport("prefill", sites[:1])]), cache, 40)) == 1


def test_a_model_of_which_nothing_is_compressed_says_why() -> None:
    site = Site("attn", 6, 3, 8, 8, 1, 1, Refusal("the keys are latent", "cat"))
    for graphs, reason in (
        ([GraphReport("prefill", (site,))], "1 x the keys are latent"),
        ([GraphReport("left alone", left_alone="pass Lower failed")], "pass Lower failed"),
        ([GraphReport("no attention")], "no attention was found"),
    ):
        with pytest.raises(SparkError, match=f"nothing of the model is compressed: {reason}"):
            _layers(Report(graphs), SimpleNamespace(layers=[]), 40)
