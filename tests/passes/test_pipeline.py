"""``pipeline``: the order of the passes, the checks between them, and what a broken one does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from decoders import decode, decoder, prompt

from spark_compile import SparkError, SparkWarning
from spark_compile.passes import dataflow
from spark_compile.passes.cleanup import Cleanup
from spark_compile.passes.find_attention import FindAttention
from spark_compile.passes.insert_spark import InsertSpark
from spark_compile.passes.pipeline import PIPELINE
from spark_compile.passes.program import PassFailed, Program

OPTIONS = {"window": 4, "inner": "eager", "key_ratio": 0.0}
aten = torch.ops.aten


@dataclass(frozen=True)
class Raises:
    """A pass that has a bug."""

    def __call__(self, program: Program) -> int:
        raise KeyError("oops")


@dataclass(frozen=True)
class ClaimsAnotherShape:
    """Adds a node whose fake value is not what its operator makes."""

    def __call__(self, program: Program) -> int:
        (linear, *_) = program.graph.find_nodes(op="call_function", target=aten.linear.default)
        with program.graph.inserting_after(linear):
            node = dataflow.call(program, aten.neg.default, (linear,))
        node.meta["val"] = node.meta["val"].new_empty((1, 2))
        return 1


@dataclass(frozen=True)
class ChangesAnotherShape:
    """Hands old nodes a value of another shape, or of another dtype."""

    target: Any
    rest: tuple[Any, ...]

    def __call__(self, program: Program) -> int:
        logits = program.returned()[0]
        with program.graph.inserting_after(logits):
            node = dataflow.call(program, self.target, (logits, *self.rest))
        logits.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
        return 1


@dataclass(frozen=True)
class ReadsBeforeWriting:
    """Leaves a graph that does not pass lint."""

    def __call__(self, program: Program) -> int:
        last = program.returned()[0]
        with program.graph.inserting_before(next(iter(program.graph.nodes))):
            program.graph.call_function(aten.neg.default, (last,))
        return 1


def test_the_order_of_the_passes() -> None:
    names = [type(step).__name__ for step in PIPELINE]
    assert names == ["Normalize", "FindAttention", "FindKVAppend", "InsertSpark", "Cleanup"]


def test_matches_count_what_each_pass_did(capture: Any, compressed: Any) -> None:
    model = decoder("empty_first")
    program = capture(model, prompt(), passes=PIPELINE)
    assert list(program.matches) == [type(step).__name__ for step in PIPELINE]
    assert program.matches["FindAttention"] == program.matches["InsertSpark"] == 2
    assert program.matches["FindKVAppend"] == 4


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Raises(), r"pass Raises failed: KeyError.*oops"),
        (ClaimsAnotherShape(), r"pass ClaimsAnotherShape failed.*neg"),
        (ReadsBeforeWriting(), r"pass ReadsBeforeWriting failed"),
        (ChangesAnotherShape(aten.sum.default, ()), r"pass ChangesAnotherShape failed"),
        (
            ChangesAnotherShape(aten.to.dtype, (torch.float64,)),
            r"pass ChangesAnotherShape failed",
        ),
    ],
    ids=["raises", "claims", "lint", "shape", "dtype"],
)
def test_a_broken_pass_is_named(capture: Any, broken: Any, message: str) -> None:
    failure = pytest.raises(Exception, match=message)
    with failure as raised:
        capture(decoder(), prompt(), passes=(PIPELINE[0], broken))
    assert isinstance(getattr(raised.value, "inner_exception", raised.value), PassFailed)


@pytest.mark.parametrize("kind", [FindAttention, InsertSpark, Cleanup])
def test_the_untouched_graph_runs_when_a_pass_fails(
    monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    model, tokens = decoder(), prompt()
    exact = decode(model, tokens, None, 4)
    work = kind.__call__

    def broken(self: Any, program: Program) -> int:
        work(self, program)
        raise ZeroDivisionError("halfway")

    monkeypatch.setattr(kind, "__call__", broken)
    compiled = torch.compile(model, backend="spark", options=OPTIONS)
    with pytest.warns(SparkWarning, match=rf"left a graph alone: pass {kind.__name__} failed"):
        logits, past = decode(compiled, tokens, None, 4)
    torch.testing.assert_close((logits, past), exact)
    assert {type(tensor) for states in past for tensor in states} == {torch.Tensor}


def test_so_it_does_with_compressed_states(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = decoder(), prompt(13)
    exact, exact_past = decode(model, tokens, None, 6)
    compiled = torch.compile(model, backend="spark", options=OPTIONS)
    logits, past = decode(compiled, tokens, None, 2)
    monkeypatch.setattr(InsertSpark, "__call__", Raises.__call__)
    torch._dynamo.reset()
    with pytest.warns(SparkWarning, match="pass InsertSpark failed"):
        more, dense_past = decode(compiled, logits[:, -1:].argmax(-1), past, 3)
    torch.testing.assert_close(torch.cat((logits, more), dim=1), exact)
    torch.testing.assert_close(dense_past, exact_past)


def test_strict_raises_and_names_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InsertSpark, "__call__", Raises.__call__)
    compiled = torch.compile(decoder(), backend="spark", options={**OPTIONS, "strict": True})
    with pytest.raises(SparkError, match="pass InsertSpark failed"):
        compiled(prompt())


@pytest.mark.parametrize("strict", [False, True])
def test_a_length_that_no_argument_tells_leaves_the_graph_alone(
    monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    def unknown(symbol: object, fakes: object) -> None:
        raise KeyError(f"no argument of the graph has the size {symbol}")

    model, tokens = decoder(), prompt(13)
    exact, exact_past = decode(model, tokens, None, 3)
    monkeypatch.setattr("spark_compile.runtime._find_symbol", unknown)
    compiled = torch.compile(
        model, backend="spark", options={**OPTIONS, "strict": strict}, dynamic=True
    )
    reason = "spark left a graph alone: the wrapper failed: KeyError: 'no argument"
    if strict:
        with pytest.raises(SparkError, match=reason):
            compiled(tokens)
        return
    with pytest.warns(SparkWarning, match=reason):
        logits, past = decode(compiled, tokens, None, 3)
    torch.testing.assert_close((logits, past), (exact, exact_past))
