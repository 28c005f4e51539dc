"""``cleanup``: canonical nodes without a home, states as dense tensors and dead code go."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decoders import decoder, prompt
from torch import Tensor

from spark_compile.form import StateForm
from spark_compile.kernels.reference.store import ALL
from spark_compile.kernels.spec import SIDES
from spark_compile.passes.pipeline import PIPELINE
from spark_compile.passes.program import (
    GrownState,
    Growth,
    NewState,
    PlainInput,
    PlainOutput,
    StateInput,
)

CANONICAL = ("spark.attention", "spark.kv_append")
SDPA = F.scaled_dot_product_attention


def leftovers(program: Any, calls: Any) -> list[str]:
    return [name for name in calls(program) if name.startswith(CANONICAL)]


@pytest.mark.parametrize("name", ["manual", "empty_first", "sliding", "three_parts"])
def test_nothing_canonical_is_left(capture: Any, compressed: Any, calls: Any, name: str) -> None:
    model = decoder(name, layers=1)
    for inputs in ((prompt(), None), (prompt(1), compressed(model, prompt()))):
        program = capture(model, *inputs, passes=PIPELINE)
        assert leftovers(program, calls) == []
        placeholders = set(program.graph.find_nodes(op="placeholder"))
        assert not placeholders & set(program.states), "a state's placeholder is left"
        assert len(program.inputs) == len(program.arguments)
        program.graph.lint()


def test_refused_sites_get_back_what_the_model_computed(capture: Any, calls: Any) -> None:
    model = decoder("scaled_late")
    program = capture(model, prompt(), passes=PIPELINE)
    assert calls(program) == calls(capture(model, prompt(), passes=PIPELINE[:1]))
    assert all(isinstance(plan, PlainOutput) for plan in program.outputs)
    assert all(isinstance(plan, PlainInput) for plan in program.inputs)


def test_the_plan_of_a_prefill(capture: Any) -> None:
    program = capture(decoder(layers=1), prompt(13), passes=PIPELINE)
    logits, key, value = program.outputs
    assert logits == PlainOutput(0)
    spec = program.config.spec(
        *(program.config.format_for(side, 8, torch.float32) for side in SIDES)
    )
    assert key == NewState("key", (1, 2), 13, StateForm(spec))
    assert value == NewState("value", (3, 4), 13, StateForm(spec))
    assert len(program.returned()) == 5
    assert program.matches["Cleanup"] == 0


def test_the_plan_of_a_decode(capture: Any, compressed: Any) -> None:
    model = decoder(layers=1)
    program = capture(model, prompt(1), compressed(model, prompt(13)), passes=PIPELINE)
    logits, key, value = program.outputs
    assert logits == PlainOutput(0)
    assert isinstance(key, GrownState)
    assert isinstance(value, GrownState)
    plans = [program.inputs[plan.argument] for plan in (key, value)]
    assert plans == [StateInput(Growth(1, ALL, shared=False), True)] * 2
    assert len(program.returned()) == 1
    assert program.matches["Cleanup"] == 0


@pytest.mark.parametrize("name", ["key_norms", "scaled_late"])
def test_a_refused_decode_recovers_its_past(
    capture: Any, compressed: Any, count: Any, name: str
) -> None:
    model = decoder(name, layers=1)
    program = capture(model, prompt(1), compressed(model, prompt(13)), passes=PIPELINE)
    assert program.matches["Cleanup"] == len(program.states) == 2
    assert count(program, "spark.recover") == 2
    assert count(program, "spark.step") == 0
    assert count(program, "aten.scaled_dot_product_attention") == 1


def test_a_state_that_is_only_read_is_recovered(capture: Any, compressed: Any, count: Any) -> None:
    past = compressed(decoder(layers=1), prompt(13))[0]

    def cross(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, int]:
        return SDPA(query, key, value, enable_gqa=True), key.shape[2]

    program = capture(cross, torch.randn(1, 4, 1, 8), *past, passes=PIPELINE)
    assert count(program, "spark.recover") == 2
    assert [plan.growth for plan in program.inputs if isinstance(plan, StateInput)] == [None, None]


def test_a_state_whose_length_alone_is_read_is_not_recovered(
    capture: Any, compressed: Any, calls: Any
) -> None:
    key, _ = compressed(decoder(layers=1), prompt(13))[0]
    program = capture(lambda x, k: x * k.shape[2], torch.ones(3), key, passes=PIPELINE)
    assert program.matches["Cleanup"] == 0
    assert not [name for name in calls(program) if name.startswith("spark.")]


def test_one_value_that_is_returned_twice_is_one_state(capture: Any, compressed: Any) -> None:
    past = compressed(decoder(layers=1), prompt(13))[0]

    def twice(query: Tensor, new: Tensor, past_key: Tensor, past_value: Tensor) -> Any:
        key, value = torch.cat((past_key, new), dim=2), torch.cat((past_value, new), dim=2)
        return SDPA(query, key, value, enable_gqa=True), key, value, (key, value)

    one, new = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 1, 8)
    program = capture(twice, one, new, *past, passes=PIPELINE)
    grown = [plan for plan in program.outputs if isinstance(plan, GrownState)]
    assert len({id(plan) for plan in grown}) == 2


def test_a_write_into_a_compressed_past_is_not_lost(compressed: Any) -> None:
    """It raises, as it does without a compiler, or it reaches the state."""
    key, _ = compressed(decoder(layers=1), prompt(13))[0]
    before = key.dense()

    def doubled(past: Tensor) -> Tensor:
        return past.mul_(2).sum()

    compiled = torch.compile(doubled, backend="spark", options={"window": 4, "inner": "eager"})
    with contextlib.suppress(RuntimeError, TypeError):
        compiled(key)
        torch.testing.assert_close(key.dense(), 2 * before)
