"""The command line: what it prints, and one-line errors with exit code 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    PreTrainedTokenizerFast,
    T5Config,
)
from typer.testing import CliRunner

from spark_compile import Plan, Report, SparkConfig
from spark_compile.cli import app
from spark_compile.demo.worker import Result

RUNNER = CliRunner()
LAYERS = 2


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config.save_pretrained(tmp_path)
    return tmp_path


def test_explain_of_a_model_that_takes_images(llama_folder: Path) -> None:
    text = LlamaConfig.from_pretrained(llama_folder)
    LlavaConfig(text_config=text).save_pretrained(llama_folder)
    result = RUNNER.invoke(app, ["explain", str(llama_folder), "--tokens", "70", "--json"])
    assert result.exit_code == 0, result.output
    graphs = json.loads(result.output)["graphs"]
    assert [(graph["phase"], graph["rewritten"]) for graph in graphs] == [
        ("prefill", LAYERS), ("decode", LAYERS),
    ]  # fmt: skip


@pytest.mark.parametrize("arguments", [[], ["explain"], ["demo"]])
def test_help_names_the_options(arguments: list[str]) -> None:
    result = RUNNER.invoke(app, [*arguments, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "Usage" in result.output
    hints = get_type_hints(SparkConfig, include_extras=True) if arguments else {}
    hints.pop("context_parallel", None)  # a command is one process
    for name, hint in hints.items():
        assert f"--{name.replace('_', '-')} " in result.output
        assert get_args(hint)[1].split(";")[0] in result.output


OTHERS = {"key_ratio": 0.25, "value_ratio": 0.5, "key_dtype": "int8", "value_dtype": "int8",
          "window": 4, "recovery": "none", "saliency": "absolute", "sink_tokens": 1,
          "recent_tokens": 3, "min_tokens": 9, "inner": "eager", "strict": True,
          "key_format": "int8", "value_format": "dense"}  # fmt: skip


EVICT = {"evict": "knorm(tokens=64)"}
"""Does not go with min_tokens."""
BUDGETS: list[dict[str, Any]] = [{"budget": 0.25}, {"budget": "balanced"}]


@pytest.mark.parametrize("given", [{}, OTHERS, {"min_tokens": 0}, EVICT, *BUDGETS])
@pytest.mark.parametrize("command", ["explain", "demo"])
def test_every_option_reaches_the_command(
    monkeypatch: pytest.MonkeyPatch, llama_folder: Path, command: str, given: dict[str, Any]
) -> None:
    got: list[dict[str, Any]] = []

    def explain(*_args: Any, compile: bool, **options: Any) -> Report:
        got.append(options)
        return Report()

    def run_demo(*args: Any) -> list[Result]:
        got.append(args[-1])
        return []

    monkeypatch.setattr("spark_compile.explain", explain)
    monkeypatch.setattr("spark_compile.demo.comparison.run_demo", run_demo)
    # None is left out but what a command, one process, has no use for.
    assert {*OTHERS, *EVICT, "budget", "context_parallel"} == vars(SparkConfig()).keys()
    pairs = ([f"--{name.replace('_', '-')}", str(value)] for name, value in given.items())
    words = [word for pair in pairs for word in pair if word != "True"]
    model = [str(llama_folder)] if command == "explain" else []
    result = RUNNER.invoke(app, [command, *model, *words])
    assert result.exit_code == 0, result.output
    assert got == [given]


def test_explain_json_reports_every_layer(llama_folder: Path) -> None:
    result = RUNNER.invoke(app, ["explain", str(llama_folder), "--json", "--key-ratio", "0.8"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    prefill = next(graph for graph in report["graphs"] if graph["phase"] == "prefill")
    assert prefill["rewritten"] == LAYERS
    assert all(site["refusal"] is None for site in prefill["sites"])
    site = prefill["sites"][0]
    assert site["stored_token_bytes"] < site["dense_token_bytes"]


def test_explain_follows_a_budget(llama_folder: Path) -> None:
    result = RUNNER.invoke(app, ["explain", str(llama_folder), "--json", "--budget", "smallest"])
    assert result.exit_code == 0, result.output
    sites = json.loads(result.stdout)["graphs"][0]["sites"]
    assert all(site["formats"][0].startswith("quantized(") for site in sites)


def test_explain_prints_a_table_and_a_summary(llama_folder: Path) -> None:
    result = RUNNER.invoke(app, ["explain", str(llama_folder)])
    assert result.exit_code == 0, result.output
    assert "Attention sites" in result.stdout
    assert f"{LAYERS} of {LAYERS} sites rewritten" in " ".join(result.stdout.split())


def test_strict_explain_ends_in_one_line(llama_folder: Path) -> None:
    error = _one_line_error(
        ["explain", str(llama_folder), "--strict", "--key-format", "spark(kept=99)"], code=1
    )
    assert "spark rewrote nothing: 2 x option 'kept' of format 'spark' is 99" in error


def _one_line_error(arguments: list[str], code: int = 2) -> str:
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("key-ratio", "1.5"),
        ("window", "0"),
        ("window", str(10**30)),
        ("recovery", "magic"),
        ("saliency", "loud"),
        ("value-dtype", "fp8"),
        ("recent-tokens", "-1"),
        ("budget", "2.0"),
        ("budget", "tiny"),
    ],
)
def test_bad_option_is_named_with_its_value(llama_folder: Path, option: str, value: str) -> None:
    error = _one_line_error(["explain", str(llama_folder), f"--{option}", value])
    assert option.replace("-", "_") in error
    assert value in error
    assert "allowed is" in error


def test_missing_model_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    error = _one_line_error(["explain", missing])
    assert missing in error
    assert "hub id" in error


def test_folder_with_two_ggufs_is_refused(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    assert "2 .gguf files" in _one_line_error(["explain", str(tmp_path)])


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.touch()
    assert "model.bin" in _one_line_error(["explain", str(file)])


def test_unknown_model_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    assert str(tmp_path) in _one_line_error(["explain", str(tmp_path)])


def test_encoder_decoder_is_no_causal_language_model(tmp_path: Path) -> None:
    T5Config(vocab_size=64, d_model=32, num_layers=1).save_pretrained(tmp_path)
    assert "no causal language model" in _one_line_error(["explain", str(tmp_path)])


@pytest.mark.parametrize(
    ("option", "value"), [("dtype", "float8"), ("inner", "gcc"), ("key-ratio", "2")]
)
def test_demo_refuses_a_bad_option_before_any_download(option: str, value: str) -> None:
    error = _one_line_error(["demo", f"--{option}", value])
    assert value in error
    assert "allowed is" in error


def test_tune_writes_a_plan(tmp_path: Path) -> None:
    folder, plan = tiny_model(tmp_path), tmp_path / "plan.json"
    (tmp_path / "text.txt").write_text("a b c d e f g h " * 60)
    words = ["tune", str(folder), "--budget", "0.3", "--text", str(tmp_path / "text.txt"),
             "-o", str(plan), "--context", "96", "--windows", "1"]  # fmt: skip
    result = RUNNER.invoke(app, words, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    for told in ("model.layers.1.self_attn", "quantized(", "LlamaForCausalLM, float32, budget 30"):
        assert told in result.stdout
    found = Plan.load(plan)
    assert found.share <= 0.3
    assert (found.measured.context, found.measured.windows) == (96, 1)
    result = RUNNER.invoke(app, [*words, "--json", "--dtype", "bfloat16"])
    assert json.loads(result.stdout)["measured"]["dtype"] == "bfloat16"
    assert json.loads(plan.read_text()) == json.loads(result.stdout)
    for change, told in (
        ({"--text": "none.txt"}, "text none.txt cannot be read"),
        ({"--budget": "2"}, "option 'budget' is 2.0"),
        ({"--context": "9"}, "context is 9: allowed is"),
        ({"-o": str(tmp_path / "no" / "plan.json")}, "there is no folder"),
        ({"--dtype": "int8"}, "option 'dtype' is 'int8'"),
        ({"--context": "4000"}, "1 windows of 4128 tokens are needed"),
    ):
        wrong = [*words, "--dtype", "auto"]
        for option, value in change.items():
            wrong[wrong.index(option) + 1] = value
        assert told in _one_line_error(wrong)


def tiny_model(folder: Path) -> Path:
    """A random Llama with a tokenizer of single words."""
    words = {word: index for index, word in enumerate(["?", *"abcdefgh"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=16, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder / "model"


def test_tune_names_a_model_without_weights(llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a b")
    words = ["--budget", "0.3", "--text", str(tmp_path / "text.txt"), "-o", str(tmp_path / "p")]
    error = _one_line_error(["tune", str(llama_folder), *words])
    assert f"model '{llama_folder}' cannot be loaded: " in error
