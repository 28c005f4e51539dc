"""The CPU kernels as a library for programs without Python."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spark_compile.kernels.cpu import build

WITHOUT_PYTHON = """
import sys, torch
torch.ops.load_library(sys.argv[1])
rows = torch.zeros(1, 2, 64, 16)
spec = f"layout=4;key={sys.argv[2]};value=dense:16:float32;"
spec += "window=32;recent=32;sinks=0;min_tokens=0"
if sys.argv[3] == "evict":
    torch.ops.spark.evict(rows, [rows], None, 0, spec)
stored = torch.ops.spark.build(rows, rows, [rows], spec, 200)
assert "spark_compile" not in sys.modules
print([tensor.shape[-1] for tensor in stored])
"""
SPARK = "spark(kept=8,stored=model,recovery={},saliency=squared):16:float32"


def test_its_schemas_are_those_of_python() -> None:
    source = (Path(build.__file__).parent / "spark.cpp").read_text()
    found = [
        "".join(re.findall(r'"([^"]*)"', text))
        for text in re.findall(r"m\.def\((.*?)\);", source, re.S)
    ]
    assert len(found) == 3
    for text in found:
        schema = torch._C.parse_schema(f"spark::{text}")
        assert schema == getattr(torch.ops.spark, text.partition("(")[0]).default._schema


@pytest.mark.slow
def test_it_runs_without_the_package_and_says_what_it_cannot_do() -> None:
    with build.library(build.supported()[0], standalone=True) as path:
        run = [sys.executable, "-c", WITHOUT_PYTHON, str(path)]
        good = subprocess.run(
            [*run, SPARK.format("degenerate"), "build"], capture_output=True, text=True, check=True
        )
        drawn, evicting = (
            subprocess.run([*run, SPARK.format(recovery), name], capture_output=True, text=True)
            for recovery, name in (("normal", "build"), ("degenerate", "evict"))
        )
    assert good.stdout.startswith("[")
    assert "no native kernel does what spark_reference::build does in Python" in drawn.stderr
    assert "recovery=normal" in drawn.stderr
    assert "no native kernel does what spark::evict does in Python" in evicting.stderr
