"""Random attention programs behind the backend: rewritten or refused, and equal.

``make fuzz`` runs thousands (``SPARK_FUZZ_EXAMPLES``) and others each time.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from oracle import TOLERANCE
from program_model import Model, build, calls
from programs import Program, family, programs
from torch import Tensor

from spark_compile import SparkWarning, backend
from spark_compile.report import GraphReport, collect_report
from spark_compile.state import SparkTensor

OPTIONS = {"key_ratio": 0.0, "window": 4, "inner": "eager"}
# Without shrinking, which takes minutes: `make fuzz` shrinks.
GENERATED = (Phase.explicit, Phase.generate)
QUICK = settings(derandomize=True, deadline=None, database=None, phases=GENERATED)
FUZZ = int(os.environ.get("SPARK_FUZZ_EXAMPLES", "0"))


def outputs(model: Any, program: Program, nothing: Any) -> list[Tensor]:
    """Everything that the program returns, call for call, with the last caches made dense."""
    collected = []
    for inputs in calls(program):
        past = nothing(inputs[0].shape[0])
        for x in inputs:
            output, past, more = model(x, past)
            collected += [output, *more]
        collected += [state for states in past for state in states]
    return [_dense(value) for value in collected]


def _dense(value: Tensor) -> Tensor:
    return value.dense() if isinstance(value, SparkTensor) else value


def compiled_outputs(model: Model, program: Program) -> tuple[list[Tensor], list[GraphReport]]:
    """The same behind the backend, and what it did to each graph."""
    torch._dynamo.reset()
    backend._warned.clear()
    spark = torch.compile(model, backend="spark", options=OPTIONS, fullgraph=True)
    with collect_report() as report, warnings.catch_warnings():
        warnings.simplefilter("ignore", SparkWarning)
        return outputs(spark, program, model.nothing), report.graphs


def difference(actual: Tensor, expected: Tensor) -> float:
    """Relative root mean square, infinite where only one of the two has no number."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    if not torch.equal(actual.isnan(), expected.isnan()):
        return float("inf")
    actual, expected = actual.double().nan_to_num(0.0), expected.double().nan_to_num(0.0)
    error = float((actual - expected).norm())
    return error / float(expected.norm()) if error else 0.0


@torch.no_grad()
def check(program: Program) -> list[GraphReport]:
    """Assert that the backend changes nothing that can be seen, and that no pass failed."""
    model = build(program)
    expected = outputs(model, program, model.nothing)
    actual, graphs = compiled_outputs(model, program)
    failed = [graph.left_alone for graph in graphs if graph.left_alone]
    assert not failed, failed
    allowed = TOLERANCE.get(getattr(torch, program.dtype), 1e-4)
    for position, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        error = difference(ours, theirs)
        assert error <= allowed, f"output {position} is off by {error:.1e}, allowed {allowed:.0e}"
    return graphs


def refusals(program: Program, graphs: list[GraphReport]) -> list[str]:
    """Why the program is not wholly rewritten; nothing if it is."""
    found = []
    for graph in graphs:
        found += [str(site.refusal) for site in graph.sites if site.refusal is not None]
        if len(graph.sites) != program.layers:
            found.append(f"{len(graph.sites)} sites in a graph of {program.layers} layers")
    return found


@settings(QUICK, max_examples=20)
@given(family())
def test_what_has_to_be_rewritten_is(program: Program) -> None:
    """The property cannot pass by refusing everything: here nothing may be refused."""
    assert not refusals(program, check(program))


@settings(QUICK, max_examples=20)
@given(programs())
def test_rewritten_and_equal_or_refused_and_equal(program: Program) -> None:
    check_all(program)


@pytest.mark.slow
@settings(QUICK, max_examples=500)
@given(programs())
def test_many_programs(program: Program) -> None:
    check_all(program)


@pytest.mark.slow
@pytest.mark.skipif(not FUZZ, reason="needs SPARK_FUZZ_EXAMPLES, as `make fuzz` sets it")
@settings(max_examples=FUZZ or 1, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(programs())
def test_other_programs_each_time(program: Program) -> None:
    """Not the same ones each time; hypothesis's database keeps those that failed."""
    check_all(program)


def check_all(program: Program) -> None:
    graphs = check(program)
    assert program.excuses() or not refusals(program, graphs)
