"""That every figure of a step's overhead is found."""

from __future__ import annotations

import torch

from benchmarks.step_overhead import Options, measure
from spark_compile.runtime import SparkGraph


def test_figures_of_a_small_model():
    call = SparkGraph.__call__
    options = Options(context=80, steps=2, layers=1, dtype="float32", key_ratio=0.5)
    with torch.no_grad():
        found = measure(options)
    assert found["graphs"] == 2, "prefill and decode"
    assert found["tensors_per_layer"] == 4
    assert found["largest_operator"] == "spark.step.default"
    assert found["guards"] > 50
    # Which of them is the longest is a matter of the machine.
    assert all(found[f"{part}_ms"] > 0 for part in ("guards", "outside", "wrapper", "step"))
    assert SparkGraph.__call__ is call
