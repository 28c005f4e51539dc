"""Random attention programs behind the backend: rewritten or refused, and equal.

At ratio 0 to the eager program; at another ratio each step to the eager program over what the cache
before it recovers to.

``make fuzz`` runs thousands (``SPARK_FUZZ_EXAMPLES``) and others each time.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from oracle import TOLERANCE
from program_model import Model, build, calls
from programs import Program, family, programs
from torch import Tensor

from spark_compile import SparkWarning
from spark_compile.report import GraphReport, collect_report, forget_warnings
from spark_compile.state import SparkTensor

OPTIONS = {"window": 4, "inner": "eager"}
RATIOS = (0.0, 0.5)
# Without shrinking, which takes minutes: `make fuzz` shrinks.
GENERATED = (Phase.explicit, Phase.generate)
QUICK = settings(derandomize=True, deadline=None, database=None, phases=GENERATED)
FUZZ = int(os.environ.get("SPARK_FUZZ_EXAMPLES", "0"))


Pair = tuple[Tensor, Tensor]


def run_exact(model: Model, spark: Any, program: Program) -> list[Pair]:
    """Everything that both return, call for call, with the last caches made dense."""
    pairs: list[Pair] = []
    for inputs in calls(program):
        past, exact_past = (model.nothing(inputs[0].shape[0]) for _ in range(2))
        for x in inputs:
            output, past, more = spark(x, past)
            exact, exact_past, exact_more = model(x, exact_past)
            pairs += zip((output, *more), (exact, *exact_more), strict=True)
        pairs += zip(map(_dense, flat(past)), flat(exact_past), strict=True)
    return pairs


def run_pruned(model: Model, spark: Any, program: Program) -> list[Pair]:
    """The same step by step, the model over a dense copy of the cache."""
    pairs: list[Pair] = []
    for inputs in calls(program):
        past, kinds = model.nothing(inputs[0].shape[0]), []
        for x in inputs:
            dense = past and [tuple(_dense(state).clone() for state in states) for states in past]
            output, past, more = spark(x, past)
            exact, _, exact_more = model(x, dense)
            both = zip((output, *more), (exact, *exact_more), strict=True)
            # What is returned as a state is the cache once more.
            pairs += ((ours, theirs) for ours, theirs in both if type(ours) is Tensor)
            kinds.append([type(state).__name__ for state in flat(past)])
        assert all(map(settles, zip(*kinds, strict=True))), kinds
    return pairs


def settles(kinds: Iterable[str]) -> bool:
    """Whether a cache does not go back and forth: each time it would lose something."""
    runs = [kind for kind, _ in itertools.groupby(kinds)]
    return len(runs) <= 2 + (runs[0] == "Tensor")


def flat(past: Any) -> list[Tensor]:
    return [state for states in past for state in states]


def _dense(value: Tensor) -> Tensor:
    return value.dense() if isinstance(value, SparkTensor) else value


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
def check(program: Program, key_ratio: float) -> list[GraphReport]:
    """Assert that the backend changes nothing that can be seen, and that no pass failed."""
    torch._dynamo.reset()
    forget_warnings()
    model, options = build(program), {**OPTIONS, "key_ratio": key_ratio}
    spark = torch.compile(model, backend="spark", options=options, fullgraph=True)
    run = run_pruned if key_ratio else run_exact
    with collect_report() as report, warnings.catch_warnings():
        warnings.simplefilter("ignore", SparkWarning)
        pairs = run(model, spark, program)
    failed = [graph.left_alone for graph in report.graphs if graph.left_alone]
    assert not failed, failed
    allowed = TOLERANCE.get(getattr(torch, program.dtype), 1e-4)
    for position, (ours, theirs) in enumerate(pairs):
        error = difference(ours, theirs)
        assert error <= allowed, f"output {position} is off by {error:.1e}, allowed {allowed:.0e}"
    return report.graphs


def refusals(program: Program, graphs: list[GraphReport]) -> list[str]:
    """Why the program is not wholly rewritten; nothing if it is."""
    found = []
    for graph in graphs:
        found += [str(site.refusal) for site in graph.sites if site.refusal is not None]
        if len(graph.sites) != program.layers:
            found.append(f"{len(graph.sites)} sites in a graph of {program.layers} layers")
    return found


@settings(QUICK, max_examples=3)
@given(family(), st.sampled_from(RATIOS))
def test_what_has_to_be_rewritten_is(program: Program, key_ratio: float) -> None:
    """The property cannot pass by refusing everything: here nothing may be refused."""
    assert not refusals(program, check(program, key_ratio))


@settings(QUICK, max_examples=3)
@given(programs(), st.sampled_from(RATIOS))
def test_rewritten_and_equal_or_refused_and_equal(program: Program, key_ratio: float) -> None:
    check_all(program, key_ratio)


@pytest.mark.slow
@settings(QUICK, max_examples=500)
@given(programs(), st.sampled_from(RATIOS))
def test_many_programs(program: Program, key_ratio: float) -> None:
    check_all(program, key_ratio)


@pytest.mark.slow
@pytest.mark.skipif(not FUZZ, reason="needs SPARK_FUZZ_EXAMPLES, as `make fuzz` sets it")
@settings(max_examples=FUZZ or 1, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(programs(), st.sampled_from(RATIOS))
def test_other_programs_each_time(program: Program, key_ratio: float) -> None:
    """Not the same ones each time; hypothesis's database keeps those that failed."""
    check_all(program, key_ratio)


def check_all(program: Program, key_ratio: float) -> None:
    graphs = check(program, key_ratio)
    assert program.excuses() or not refusals(program, graphs)
