"""What TensorRT would run of an exported graph: all but the cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from zoo import tiny

import spark_compile
from spark_compile.exported.graph import Graph
from spark_compile.exported.partition import SMALLEST, partition

LAYERS = 2


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Graph]:
    seen: dict[str, Graph] = {}
    folder = tmp_path_factory.mktemp("graphs")
    model = tiny("llama", "sdpa")
    spark_compile.export(model, folder / "out", max_tokens=64, check=False, seen=seen.update)
    return seen


def test_the_cache_stays_with_torch(graphs: Mapping[str, Graph]) -> None:
    found = partition(graphs["decode"].module)
    assert found.stays["spark.step.default"] == LAYERS
    assert not any("linear" in name or "softmax" in name for name in found.stays)
    # Before the first layer's cache, between the two, and after the last one.
    assert len(found.subgraphs) == LAYERS + 1
    assert min(found.subgraphs) >= SMALLEST
    prefill = partition(graphs["prefill"].module)
    assert prefill.stays["spark.build.default"] == LAYERS
    assert prefill.stays["aten.copy_.default"] == 4 * LAYERS


def test_nothing_is_counted_twice_or_lost(graphs: Mapping[str, Graph]) -> None:
    module = graphs["decode"].module
    before = [str(node) for node in module.graph.nodes]
    found = partition(module)
    targets = [getattr(n.target, "namespace", None) for n in module.graph.nodes]
    assert sum(found.subgraphs) + sum(found.stays.values()) == len(targets) - targets.count(None)
    assert [str(node) for node in module.graph.nodes] == before


def test_small_subgraphs_stay_with_torch() -> None:
    def few(x: Tensor) -> Tensor:
        return (x + 1).sum() * 2

    graph: fx.GraphModule = make_fx(few, tracing_mode="fake")(torch.ones(3))
    assert partition(graph).subgraphs == ()
    assert sum(partition(graph).stays.values()) == 3


def test_other_dtypes_stay_with_torch() -> None:
    def bytes_alone(x: Tensor) -> Tensor:
        for _ in range(SMALLEST + 1):
            x = x + 1
        return x

    graph = make_fx(bytes_alone, tracing_mode="fake")(torch.ones(3, dtype=torch.uint8))
    assert partition(graph).subgraphs == ()


def test_it_is_told(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from spark_compile.cli import app

    result = CliRunner().invoke(app, ["x", "-o", str(tmp_path / "o"), "--engine", "other"])
    assert result.exit_code == 2
    assert "option 'engine' is 'other': allowed is 'tensorrt'" in result.output
