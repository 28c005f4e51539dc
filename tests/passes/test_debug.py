"""``SPARK_COMPILE_DEBUG``: what is written for each graph, and that it never stops a model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import decode, decoder, prompt
from torch import nn

from spark_compile import SparkWarning
from spark_compile.passes.debug import VARIABLE, GraphDump
from spark_compile.passes.insert_spark import InsertSpark
from spark_compile.passes.program import Program
from spark_compile.report import collect_report

OPTIONS = {"window": 4, "inner": "eager", "key_ratio": 0.0}
PASSES = ["Lower", "Normalize", "FindAttention", "FindKVAppend", "InsertSpark", "Cleanup"]
FILES = [f"{number}-{name}.py" for number, name in enumerate(PASSES)]


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="spark", options=OPTIONS)


def written(folder: Path) -> list[Path]:
    """The folders of the graphs, in the order in which they were compiled."""
    return sorted(folder.iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))


def test_every_graph_is_written_after_every_pass(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "new"))
    with collect_report() as report:
        decode(compiled(decoder(layers=1)), prompt(13), None, 2)
    folders = written(tmp_path / "new")
    assert len(folders) == len(report.graphs) == 2
    for folder, graph in zip(folders, report.graphs, strict=True):
        assert sorted(path.name for path in folder.iterdir()) == [*FILES, "summary.txt"]
        before, after = (
            (folder / name).read_text() for name in ("1-Normalize.py", "2-FindAttention.py")
        )
        assert "spark.attention" in after
        assert "spark.attention" not in before
        assert "f32[1, 13, 32]" in before or graph.phase == "decode"
        config, _, *lines = (folder / "summary.txt").read_text().splitlines()
        assert config.startswith("SparkConfig(key_ratio=0.0,")
        assert [line.split()[0] for line in lines] == PASSES
        assert [int(line.split()[-1]) for line in lines[1:]] == list(graph.matches.values())


def test_the_graph_of_a_pass_that_fails_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(_self: Any, program: Program) -> int:
        raise KeyError("oops")

    monkeypatch.setattr(InsertSpark, "__call__", broken)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.warns(SparkWarning, match="pass InsertSpark failed"):
        compiled(decoder(layers=1))(prompt(13))
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [*FILES[:-1], "summary.txt"]
    assert (folder / "summary.txt").read_text().endswith("failed: KeyError: 'oops'\n")


def test_a_folder_that_cannot_be_written_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    model, tokens = decoder(layers=1), prompt(13)
    exact, _ = decode(model, tokens, None, 2)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always", SparkWarning)
        logits, _ = decode(compiled(model), tokens, None, 2)
    torch.testing.assert_close(logits, exact, atol=2e-5, rtol=2e-5)
    told = [str(warning.message) for warning in given if warning.category is SparkWarning]
    assert len(told) == 1
    assert told[0].startswith(f"{VARIABLE}={tmp_path / 'file'}: a graph could not be written: Not")


def test_a_home_folder_of_nobody_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capture: Any
) -> None:
    monkeypatch.setenv(VARIABLE, "~nobody-of-that-name/graphs")
    with pytest.warns(SparkWarning, match="a graph could not be written: .*home"):
        assert GraphDump.open(capture(torch.sin, torch.ones(3))) is None


def test_a_graph_without_code_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capture: Any
) -> None:
    program = capture(torch.sin, torch.ones(3))
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    dump = GraphDump.open(program)
    assert dump is not None
    monkeypatch.setattr(type(program.module), "print_readable", lambda *_a, **_k: 1 / 0)
    with pytest.warns(SparkWarning, match="could not be written: division by zero"):
        dump.write("Broken")


def test_nothing_is_written_unless_asked_for(monkeypatch: pytest.MonkeyPatch, capture: Any) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert GraphDump.open(capture(torch.sin, torch.ones(3))) is None
