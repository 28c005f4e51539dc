"""``normalize``: ATen variants become few forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decoders import decoder, prompt
from torch import Tensor

from spark_compile.passes.normalize import Normalize

X = torch.ones(1, 2, 3, 4)
aten = torch.ops.aten


@pytest.mark.parametrize(
    ("function", "target", "place"),
    [
        (lambda x: torch.cat((x, x), dim=-2), aten.cat.default, 1),
        (lambda x: torch.softmax(x, dim=-1), aten.softmax.int, 1),
        (lambda x: x.transpose(-1, -2), aten.transpose.int, 1),
        (lambda x: x.transpose(2, -1), aten.transpose.int, 2),
    ],
)
def test_dimensions_count_from_the_front(
    capture: Any, function: Callable[[Tensor], Tensor], target: Any, place: int
) -> None:
    before = capture(function, X)
    (node,) = before.graph.find_nodes(op="call_function", target=target)
    assert node.args[place] < 0
    program = capture(function, X, passes=[Normalize()])
    (node,) = program.graph.find_nodes(op="call_function", target=target)
    assert all(dim >= 0 for dim in node.args[1:] if isinstance(dim, int))
    assert program.matches["Normalize"] == 1


def test_what_is_normal_stays_as_it_is(capture: Any, calls: Any) -> None:
    def normal(x: Tensor) -> Tensor:
        return torch.softmax(torch.cat((x, x), dim=2).transpose(2, 3), dim=3)

    program = capture(normal, X, passes=[Normalize()])
    assert program.matches["Normalize"] == 0
    assert calls(program) == calls(capture(normal, X))


def test_aliases_and_dropout_that_is_off_go(capture: Any, calls: Any) -> None:
    def idle(x: Tensor) -> Tensor:
        x = torch.dropout(x.detach(), 0.5, False)
        return torch.dropout(x, 0.0, True) + 1

    program = capture(idle, X, passes=[Normalize()])
    assert set(calls(program)) == {"aten.add.Tensor"}


@pytest.mark.parametrize(("cut", "slices"), [(slice(None), 0), (slice(1, None), 1), (slice(2), 1)])
def test_slices_of_everything_go(capture: Any, calls: Any, cut: slice, slices: int) -> None:
    def cropped(x: Tensor) -> Tensor:
        return torch.ops.aten.slice.Tensor(x, 0)[:, :, cut] + 1

    program = capture(cropped, X, passes=[Normalize()])
    assert calls(program)["aten.slice.Tensor"] == slices


def test_dropout_that_is_on_stays(capture: Any, calls: Any) -> None:
    program = capture(lambda x: F.dropout(x, 0.5, training=True), X, passes=[Normalize()])
    assert sum(n for name, n in calls(program).items() if "dropout" in name or "bernoulli" in name)


def test_the_empty_constant_of_a_first_append_is_bare(capture: Any, calls: Any) -> None:
    before = calls(capture(decoder("empty_first"), prompt()))
    assert before["aten.lift_fresh_copy.default"] == 4
    program = capture(decoder("empty_first"), prompt(), passes=[Normalize()])
    after = calls(program)
    assert not after["aten.lift_fresh_copy.default"]
    assert not after["aten.detach.default"]
    cats = program.graph.find_nodes(op="call_function", target=aten.cat.default)
    assert [node.args[0][0].op for node in cats] == ["get_attr"] * 4


def test_assertions_about_metadata_go(capture: Any, calls: Any) -> None:
    def to_float(x: Tensor) -> Tensor:
        return x.to(torch.float64) + 1

    program = capture(to_float, X, passes=[Normalize()])
    assert not calls(program)["aten._assert_tensor_metadata.default"]
    program.graph.lint()
