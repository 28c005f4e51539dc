"""Exported folders: the same tokens as the model, and nothing half done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from handwritten import BATCH, LONGEST
from handwritten_caches import GptFast, LitGpt, PositionDecoder
from transformers import AutoModelForCausalLM
from zoo import tiny

import spark_compile
from spark_compile import SparkError, SparkWarning
from spark_compile.exported.decoder import PHASES, ExportError, Phase
from spark_compile.exported.folder import Manifest, read_manifest
from spark_compile.exported.model import ExportedCache, ExportedModel
from spark_compile.exported.running import Runner
from spark_compile.passes.program import PassFailed

CAPACITY = 200
PROMPT, NEW = 70, 40
Exported = tuple[Any, Path, Manifest]


@pytest.fixture
def exact(folder: Path) -> Exported:
    """A Llama with caches that store every bit."""
    return tiny("llama", "sdpa"), folder, read_manifest(folder)


def _exported(name: str, folder: Path, **options: Any) -> Exported:
    model = tiny(name, "sdpa")
    manifest = spark_compile.export(model, folder / "out", max_tokens=CAPACITY, **options)
    return model, folder / "out", manifest


def _prompt(batch: int = 1, length: int = PROMPT) -> torch.Tensor:
    return torch.randint(2, 90, (batch, length), generator=torch.Generator().manual_seed(3))


def _generated(model: Any, ids: torch.Tensor, new: int = NEW, **options: Any) -> Any:
    options = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, **options}
    return model.generate(ids, **options)


def test_it_generates_what_the_model_does(exact: Exported) -> None:
    model, folder, manifest = exact
    loaded, ids = spark_compile.load(folder, inner="eager"), _prompt()
    assert torch.equal(_generated(loaded, ids), _generated(model, ids))
    assert manifest.verified is not None
    assert manifest.verified["equal"] == manifest.verified["scored"]
    assert manifest.verified["kl"] < 1e-6
    sites = [site for graph in manifest.reported().graphs for site in graph.sites]
    assert [site.refusal for site in sites] == [None] * 4


def test_logits_of_every_token_are_there(exact: Exported) -> None:
    model, folder, _ = exact
    ids, loaded = _prompt(), spark_compile.load(folder, inner="eager")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("length", [1, 2, 31, 64, CAPACITY - 1])
def test_prompts_of_any_length(exact: Exported, length: int) -> None:
    model, folder, _ = exact
    ids, new = _prompt(length=length), min(3, CAPACITY - length)
    loaded = spark_compile.load(folder, inner="eager")
    assert torch.equal(_generated(loaded, ids, new), _generated(model, ids, new))


def test_a_prompt_that_fills_the_cache_is_read_at_once(
    exact: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder, _ = exact
    loaded, ids = spark_compile.load(folder, inner="eager"), _prompt(length=CAPACITY)
    phases = _phases(loaded, monkeypatch)
    with torch.no_grad():
        wanted, close = model(ids).logits, {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(loaded(ids).logits, wanted, **close)
    torch.testing.assert_close(loaded(ids, last=True).logits, wanted[:, -1:], **close)
    assert phases == ["prefill", "decode"] * 2


@pytest.mark.parametrize("last", [False, True])
def test_many_tokens_for_a_filled_cache_are_read_with_those_before(
    last: bool, exact: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder, _ = exact
    loaded, cache = spark_compile.load(folder, inner="eager"), ExportedCache(exact[2])
    phases, close = _phases(loaded, monkeypatch), {"atol": 1e-4, "rtol": 1e-4}
    ids = _prompt(length=CAPACITY)
    loaded(_prompt(length=50), cache=cache)  # of which some are forgotten again
    cache.crop(0)
    loaded(ids[:, :50], cache=cache)
    cache.crop(40)
    phases.clear()
    with torch.no_grad():
        wanted = model(ids).logits
    for start, end in ((40, 90), (90, 91), (91, CAPACITY)):
        found = loaded(ids[:, start:end], cache=cache, last=last).logits
        first = end - 1 if last else start
        torch.testing.assert_close(found, wanted[:, first:end], **close)
    assert phases == ["prefill", "decode", "prefill", "decode"]


def _phases(loaded: ExportedModel, monkeypatch: pytest.MonkeyPatch) -> list[Phase]:
    """A list that gets the phase of each call of a graph from now on."""
    phases: list[Phase] = []

    def runner(phase: Phase) -> Any:
        phases.append(phase)
        return ExportedModel._runner(loaded, phase)

    monkeypatch.setattr(loaded, "_runner", runner)
    return phases


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_what_asks_for_no_length_ends_with_the_capacity(exact: Exported) -> None:
    loaded = spark_compile.load(exact[1], inner="eager")
    assert loaded.config.max_position_embeddings == CAPACITY
    ids = _prompt(length=CAPACITY - 5)
    assert loaded.generate(ids, eos_token_id=[]).shape[1] == CAPACITY


def test_a_cache_goes_on_and_steps_back(exact: Exported) -> None:
    model, folder, _ = exact
    loaded = spark_compile.load(folder, inner="eager")
    first = _generated(loaded, _prompt(), 8, return_dict_in_generate=True)
    cache = getattr(first, loaded.cache_name)
    longer = torch.cat([first.sequences, _prompt(length=5)], 1)
    seen = {"attention_mask": torch.ones_like(longer)}
    with pytest.warns(SparkWarning, match="one at a time"):
        again = _generated(loaded, longer, 8, **{loaded.cache_name: cache}, **seen)
    assert torch.equal(again, _generated(model, longer, 8, **seen))
    cache.crop(PROMPT)
    ids = torch.cat([_prompt(), _prompt(length=2)], 1)
    back = _generated(loaded, ids, 8, **{loaded.cache_name: cache})
    assert torch.equal(back, _generated(model, ids, 8))
    with pytest.raises(ValueError, match="max_length is 999: allowed is up to"):
        cache.crop(999)


def test_the_folder_is_a_model_folder_too(exact: Exported) -> None:
    model, folder, _ = exact
    again = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(again(_prompt()).logits, model(_prompt()).logits)


def test_pruned_caches_are_smaller_and_change_a_little(tmp_path: Path) -> None:
    model, folder, manifest = _exported("llama", tmp_path, key_ratio=0.5)
    assert manifest.stored_token_bytes < manifest.dense_token_bytes
    assert manifest.verified is not None
    assert manifest.verified["equal"] == manifest.verified["scored"]
    assert 1e-6 < manifest.verified["kl"] < 1
    found = _generated(spark_compile.load(folder, inner="eager"), _prompt())
    assert not torch.equal(found, _generated(model, _prompt()))


def test_a_batch_with_padding_and_beams(tmp_path: Path) -> None:
    model, _, _ = _exported("llama", tmp_path, batch=2, key_ratio=0, check=False)
    loaded = spark_compile.load(tmp_path / "out", inner="eager")
    ids, mask = _prompt(2), torch.ones(2, PROMPT, dtype=torch.int64)
    ids[0, :9], mask[0, :9] = 0, 0
    _contiguous(loaded)
    wanted = _generated(model, ids, attention_mask=mask)
    assert torch.equal(_generated(loaded, ids, attention_mask=mask), wanted)
    one, beams = ids[1:], {"num_beams": 2}
    assert torch.equal(_generated(loaded, one, 12, **beams), _generated(model, one, 12, **beams))
    with pytest.raises(ValueError, match=r"input_ids are \[1, 70\]: allowed is \[2, tokens\]"):
        loaded(one)


def _contiguous(loaded: ExportedModel) -> None:
    """Compiled graphs go by the strides that they were compiled for."""
    for phase in PHASES:
        runner = loaded._runner(phase)

        def checked(states: Any, inputs: Any, runner: Runner = runner) -> torch.Tensor:
            assert all(tensor.is_contiguous() for tensor in (*states, *inputs))
            return runner(states, inputs)

        loaded._runners[phase] = checked


def test_what_does_not_fit_is_refused(exact: Exported) -> None:
    _, folder, _ = exact
    loaded = spark_compile.load(folder, inner="eager")
    with pytest.raises(ValueError, match=f"{CAPACITY + 1} tokens do not fit: allowed are"):
        loaded(_prompt(length=CAPACITY + 1))
    with pytest.raises(ValueError, match="attention_mask has zeros"):
        loaded(_prompt(), attention_mask=torch.zeros(1, PROMPT))
    with pytest.raises(ExportError, match="inner is 'fast': allowed is"):
        spark_compile.load(folder, inner="fast")


@pytest.mark.parametrize("attention", [GptFast, pytest.param(LitGpt, marks=pytest.mark.slow)])
def test_handwritten_decoders(attention: type[GptFast], tmp_path: Path) -> None:
    model = PositionDecoder(attention, 2).eval()
    for module in model.attentions:
        module.reset()
    manifest = spark_compile.export(
        model, tmp_path / "out", max_tokens=LONGEST, batch=BATCH, key_ratio=0
    )
    assert manifest.verified is not None
    assert manifest.verified["equal"] == manifest.verified["scored"]
    assert all(graph.rewritten for graph in manifest.reported().graphs)
    ids = torch.randint(0, 16, (BATCH, 20))
    wanted, _ = model.feed([ids])
    torch.testing.assert_close(
        spark_compile.load(tmp_path / "out", inner="eager")(ids).logits, wanted
    )


@pytest.mark.slow
def test_a_model_that_cannot_be_rewritten_is_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spark_compile.exported.tracing.run_passes", _fails)
    with pytest.warns(SparkWarning, match="the exported graphs are dense: .*no reason"):
        model, folder, manifest = _exported("llama", tmp_path, check=False)
    assert [s.dtype for s in manifest.states] == ["float32"] * 4
    loaded, ids = spark_compile.load(folder, inner="eager"), _prompt()
    assert torch.equal(_generated(loaded, ids), _generated(model, ids))
    with pytest.raises(ExportError, match="no reason"):
        _exported("llama", tmp_path / "strict", strict=True)
    assert not list((tmp_path / "strict").iterdir())


def _fails(*_args: Any) -> None:
    raise PassFailed("no reason")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 1}, "max_tokens is 1: allowed is 4 to 256"),
        ({"max_tokens": 257}, "max_tokens is 257: allowed is 4 to 256"),
        ({"batch": 0}, "batch is 0: allowed is"),
        ({"key_ratio": 2}, "option 'key_ratio' is 2"),
        ({"budgets": 2}, "option 'budgets' is 2"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SparkError, match=message):
        spark_compile.export(tiny("llama", "sdpa"), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_model_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="the model is on meta: allowed is cpu"):
        spark_compile.export(tiny("llama", "sdpa").to("meta"), tmp_path / "out")


def test_a_failed_check_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spark_compile.exported.verify.MOST_KL", -1.0)
    with pytest.raises(ExportError, match="do not predict what the model does"):
        _exported("llama", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_an_interrupted_export_leaves_what_was_there(
    stop: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_args: Any) -> None:
        raise stop

    monkeypatch.setattr("spark_compile.exported.export.decoder_of", interrupted)
    (tmp_path / "out").mkdir()
    with pytest.raises(stop):
        _exported("llama", tmp_path, check=False)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert not list((tmp_path / "out").iterdir())


def test_nothing_but_an_export_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ExportError, match="exists and is not empty"):
            _exported("llama", tmp_path, overwrite=overwrite)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
