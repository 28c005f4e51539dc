"""The quality benchmark on a tiny random Llama: what is measured, results, going on."""

from __future__ import annotations

import copy
import functools
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
import typer

from benchmarks import measure, quality, quality_run
from benchmarks.quality_methods import OURS, PEER, Peer, ours
from benchmarks.quality_peers import PerChannel, PerToken, Rounded
from benchmarks.quality_report import mean_and_error, summary, with_front
from benchmarks.quality_run import LAST_TOKENS, SCORED_TOKENS, QualityError, prepared, read_window
from benchmarks.quality_run import measure as measure_window
from benchmarks.results import Result
from spark_compile import kv_bytes

CONTEXT = 200
"""136 tokens are read eagerly; 160 are packed, 40 stay dense."""
DENSE, INT8 = ours("dense"), ours("int8", key_dtype="int8", value_dtype="int8")
SPARK = ours("spark", key_ratio=0.5, value_dtype="int8")
KIVI = Peer("KIVI-4", PerChannel(4), PerToken(4))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97, max_position_embeddings=1024,
    )  # fmt: skip
    # Sharp attention, so that a wrong key is seen.
    model = transformers.LlamaForCausalLM(config).float().eval().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(10)
        layer.self_attn.k_proj.weight.mul_(10)
    return model


@pytest.fixture(scope="module")
def window(model):
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(97, (1, CONTEXT + SCORED_TOKENS + 1), generator=draw)
    return read_window(model, ids)


def measured(model, method, window):
    return measure_window(prepared(model, method, "eager"), method, window)


@pytest.fixture(scope="module")
def row(model, window):
    """The row of a method, measured once: compiling takes seconds."""
    return functools.cache(lambda method: measured(model, method, window))


def test_window_is_what_the_model_says_at_once(model, window):
    ids = torch.cat((window.prompt, window.scored), dim=1)
    logits = model(ids).logits[0, CONTEXT:-1]
    assert torch.allclose(window.logits, logits, atol=1e-5)
    nll = -logits.log_softmax(-1)[torch.arange(SCORED_TOKENS), ids[0, CONTEXT + 1 :]].mean()
    assert window.nll == pytest.approx(float(nll), abs=1e-5)


def test_dense_changes_nothing_and_int8_little(window, row):
    dense, int8 = row(DENSE), row(INT8)
    assert abs(dense["kl"]) < 1e-9
    assert dense["nll"] == pytest.approx(window.nll, abs=1e-6)
    assert dense["packed_share"] == 1
    assert 1e-8 < int8["kl"] < 1e-3
    assert int8["packed_share"] == (32 + 2) / 64


def test_bytes_are_those_of_a_bfloat16_cache(model, window, row):
    half = copy.deepcopy(model).bfloat16()
    cache = transformers.DynamicCache(config=half.config)
    quality_run.read(prepared(half, SPARK, "eager"), window.prompt, cache)
    dense_bytes = CONTEXT * 2 * 2 * 32 * 2  # sides, heads, channels, item size
    assert row(SPARK)["whole_share"] == pytest.approx(kv_bytes(cache) / dense_bytes)


def test_equals_a_whole_compiled_prefill(model, window, row):
    reader = prepared(model, SPARK, "eager")
    cache = transformers.DynamicCache(config=model.config)
    quality_run.read(reader, window.prompt, cache)
    logits = quality_run.read(reader, window.scored[:, :-1], cache)
    assert row(SPARK)["kl"] > 1e-5
    found = quality_run.divergence(window.logits, logits)
    assert found == pytest.approx(row(SPARK)["kl"], rel=1e-3)


def test_peer_is_put_in_the_place_of_the_packed_tokens(model, window):
    row = measured(model, KIVI, window)
    assert row["packed_share"] == 5 / 16
    assert row["whole_share"] == pytest.approx((160 * 5 / 16 + 40) / 200)
    assert row["kl"] > 1e-5
    cache = transformers.DynamicCache(config=model.config)
    quality_run.read(model, window.prompt, cache)
    before = [layer.keys.clone() for layer in cache.layers]
    quality_run.simulate(cache, KIVI)
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, :160], PerChannel(4).recover(keys[:, :, :160]))
        assert torch.equal(layer.keys[:, :, 160:], keys[:, :, 160:])


def test_models_share_weights_and_the_eager_one_stays_eager(model):
    reader = prepared(model, DENSE, "eager")
    assert reader.lm_head.weight is model.lm_head.weight
    assert model._compiled_call_impl is None


def test_what_is_not_compressed_is_no_result(model, window):
    with pytest.raises(QualityError, match="the keys of layer 0 are not packed"):
        measured(model, ours("short", min_tokens=10_000), window)
    with pytest.raises(QualityError, match="window is 128: allowed is 2 to 64"):
        measured(model, ours("wide", window=128), window)
    # In float32 the planes are small beside the channels that they save.
    with pytest.raises(QualityError, match="but dense in torch"):
        measured(model, ours("other", key_ratio=0.16), window)


def test_divergence_in_exact_arithmetic():
    reference, other = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert quality_run.divergence(reference, other) == pytest.approx(expected, abs=1e-7)


def test_statistics_over_windows():
    assert mean_and_error([1.0]) == (1.0, None)
    assert mean_and_error([1.0, 3.0]) == (2.0, pytest.approx(1.0))
    shares = {"packed_share": 0.5, "whole_share": 0.6, "seconds": 1.0, "commit": "c"}
    shares["machine"] = {"cpu": "one"}
    rows = {
        str(number): {"kl": 0.1, "nll": nll, "dense_nll": 3.0, **shares}
        for number, nll in enumerate((3.1, 3.3))
    }
    found = summary("m", {"family": OURS, "what": "", "windows": rows})
    assert found["perplexity_change"] == pytest.approx(math.exp(0.2) - 1)
    assert found["perplexity_change_se"] == pytest.approx(math.exp(0.2) * 0.1)
    assert found["perplexity"] == pytest.approx(math.exp(3.2))


def test_pareto_front():
    points = {"a": (0.5, 0.1, 2), "b": (0.5, 0.2, 2), "c": (0.3, 0.1, 2), "d": (0.2, 0.4, 2)}
    points["few windows"] = (0.1, 0.0, 1)
    rows = [
        {"method": name, "packed_share": share, "kl": kl, "windows": windows}
        for name, (share, kl, windows) in points.items()
    ]
    marked = with_front(rows)
    assert [row["method"] for row in marked] == ["a", "b", "c", "d", "few windows"]
    assert [row["method"] for row in marked if row["front"]] == ["c", "d"]


class Tokenizer:
    """One token per character."""

    def __call__(self, text):
        return SimpleNamespace(input_ids=[ord(letter) % 97 for letter in text])


@pytest.fixture
def on_a_tiny_model(monkeypatch, tmp_path, model):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(quality, "load", lambda name: (model, Tokenizer()))
    monkeypatch.setattr(quality, "essays", lambda: "What is written well is read with joy. " * 60)
    monkeypatch.setattr(quality, "methods", lambda _: (INT8, KIVI))
    return tmp_path / f"quality-smollm2-{CONTEXT}.jsonl"


def run(windows, only="*", fresh=False):
    quality.main(
        model="smollm2", context=str(CONTEXT), windows=windows, only=only, fresh=fresh,
        inner="eager", threads=1,
    )  # fmt: skip


def test_results_are_written_and_gone_on_with(on_a_tiny_model, monkeypatch, capsys):
    path, asked = on_a_tiny_model, []

    def watched(reader, method, window):
        asked.append(method.name)
        return measure_window(reader, method, window)

    monkeypatch.setattr(quality_run, "measure", watched)
    run(1)
    assert asked == ["int8", "int8", "KIVI-4"]  # the first time to compile
    run(2, only="KIVI*")
    assert asked[3:] == ["KIVI-4"]
    result = Result.read(path)
    assert [(r["method"], len(r["measured"])) for r in result.rows] == [("int8", 1), ("KIVI-4", 2)]
    assert result.machine["torch"] == torch.__version__
    assert path.with_suffix(".png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "53.1%" in shown
    assert "31.2%" in shown
    run(2, only="KIVI*", fresh=True)
    assert asked[4:] == ["KIVI-4", "KIVI-4"]
    changed = Peer("KIVI-4", Rounded(), Rounded())
    monkeypatch.setattr(quality, "methods", lambda _: (changed,))
    run(1)
    assert asked[6:] == ["KIVI-4"]
    (row,) = Result.read(path).rows
    assert row["method"] == "KIVI-4"
    assert row["packed_share"] == 1


def test_a_method_that_fails_is_told_and_tried_again(on_a_tiny_model, monkeypatch, capsys):
    odd = Peer("odd", PerToken(4, group=7), Rounded())
    monkeypatch.setattr(quality, "methods", lambda _: (odd, KIVI))
    with pytest.raises(typer.Exit):
        run(1)
    failed, done = Result.read(on_a_tiny_model).rows
    assert (failed["method"], done["method"]) == ("odd", "KIVI-4")
    assert failed["error"]
    assert not failed["measured"]
    assert "odd" in capsys.readouterr().out
    monkeypatch.setattr(quality, "methods", lambda _: (KIVI,))
    run(1)


def test_options_are_checked():
    with pytest.raises(typer.BadParameter, match="allowed are patterns of dense"):
        quality.chosen("none such", quality.methods(64))
    found = quality.chosen("dense,KIVI-?", quality.methods(64))
    assert [method.name for method in found][:2] == ["dense", "KIVI-4"]
    assert all(method.family in (OURS, PEER) for method in quality.methods(64))
    with pytest.raises(typer.BadParameter, match="--model is 'gpt5'"):
        quality.main(model="gpt5")
    with pytest.raises(typer.BadParameter, match=f"allowed is {2 * LAST_TOKENS} up"):
        quality.main(context="100")
