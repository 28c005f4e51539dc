"""States made and used with gradients enabled, disabled and in inference mode, in any mix."""

from __future__ import annotations

import pytest
import torch
from states import check_state, dense, model_of, new_rows, prefill, tokens

from spark_compile import SparkConfig
from spark_compile.state import SparkTensor

MODES = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
OPERATORS = {
    "crop": lambda x: x[..., :-3, :],
    "batch slice": lambda x: x[1:],
    "detach": lambda x: x.detach(),
    "clone": lambda x: x.clone(),
    "index_select": lambda x: x.index_select(0, torch.tensor([1, 0])),
    "cat": lambda x: torch.cat((x, torch.ones(x.shape)[:, :, :2]), 2),
    "transpose": lambda x: x.transpose(1, 2),
    "one token": lambda x: x[:, :, 3],
    "add": lambda x: x + 1,
}


def states(mode: str) -> tuple[SparkTensor, SparkTensor]:
    with MODES[mode]():
        return prefill(SparkConfig(key_ratio=0.6, window=4)).states


@pytest.mark.parametrize("made", MODES)
@pytest.mark.parametrize("used", MODES)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.filterwarnings("ignore::spark_compile.SparkWarning")
def test_operators_work_in_every_mode(name: str, used: str, made: str) -> None:
    for state in states(made):
        plain = state.dense().clone()
        with MODES[used]():
            result, expected = OPERATORS[name](state), OPERATORS[name](plain)
            assert torch.equal(dense(result), expected)


@pytest.mark.parametrize("made", MODES)
@pytest.mark.parametrize("used", MODES)
def test_states_can_be_continued_in_every_mode(used: str, made: str) -> None:
    for state in states(made):
        before, model, longer = state.dense(), model_of(state), state
        for count in (2, 2, 9):  # in place, on the verge of packing and beyond
            new = new_rows(state, count)
            model.append(new)
            with MODES[used]():
                longer = longer.appended(new)
            check_state(longer, model)
        assert torch.equal(state.dense(), before)


@pytest.mark.parametrize("mode", MODES)
def test_appends_copy_nothing_in_any_mode(mode: str) -> None:
    for state, new in zip(states(mode), tokens(1), strict=True):
        with MODES[mode]():
            longer = state.appended(new)
        assert longer.head.data_ptr() == state.head.data_ptr()
        assert longer.pages.data_ptr() == state.pages.data_ptr()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["crop", "batch slice", "detach", "clone"])
def test_results_do_not_keep_the_state_alive(name: str, mode: str) -> None:
    # A view's _base would: a cropped handle could then never append in place again.
    with MODES[mode]():
        assert [OPERATORS[name](state)._base for state in states(mode)] == [None, None]
