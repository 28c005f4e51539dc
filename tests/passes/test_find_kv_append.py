"""``find_kv_append``: every append that feeds an attention becomes one canonical operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decoders import decoder, prompt
from torch import Tensor

from spark_compile.passes.find_attention import ORIGINAL, FindAttention
from spark_compile.passes.find_kv_append import CANONICAL, FindKVAppend
from spark_compile.passes.normalize import Normalize

PASSES = (Normalize(), FindAttention(), FindKVAppend())
SDPA = F.scaled_dot_product_attention


def operands() -> tuple[Tensor, ...]:
    """Query [B, H, 1, D], past [B, H, S, D] and new [B, H, 1, D] keys and values."""
    one, past = (1, 2, 1, 8), (1, 2, 6, 8)
    return tuple(torch.randn(shape) for shape in (one, past, one, past, one))


def appended(append: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def attend(q: Tensor, past_k: Tensor, k: Tensor, past_v: Tensor, v: Tensor) -> Any:
        key, value = append(past_k, k), append(past_v, v)
        return SDPA(q, key, value), key, value

    return attend


APPENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cat": lambda past, new: torch.cat((past, new), dim=2),
    "cat_from_the_back": lambda past, new: torch.cat([past, new], -2),
    "concat": lambda past, new: torch.concat([past, new], dim=-2),
    "with_an_empty": lambda past, new: torch.cat((torch.tensor([]), past, new), dim=2),
}


@pytest.mark.parametrize("name", APPENDS)
def test_every_form_becomes_one_append(capture: Any, count: Any, name: str) -> None:
    program = capture(appended(APPENDS[name]), *operands(), passes=PASSES)
    nodes = program.graph.find_nodes(op="call_function", target=CANONICAL)
    assert program.matches["FindKVAppend"] == len(nodes) == 2
    assert count(program, "aten.cat") == 0
    for node in nodes:
        past, new, position, dim = node.args
        assert (position, dim) == (None, 2)
        assert past.meta["val"].shape[2] == 6
        assert new.meta["val"].shape[2] == 1
        assert node.meta["val"].shape == (1, 2, 7, 8)
        assert node.meta[ORIGINAL].target is torch.ops.aten.cat.default
        assert node in program.returned()


def test_the_first_append_has_no_past(capture: Any, count: Any) -> None:
    program = capture(decoder("empty_first"), prompt(), passes=PASSES)
    nodes = program.graph.find_nodes(op="call_function", target=CANONICAL)
    assert program.matches["FindKVAppend"] == len(nodes) == 4
    assert [node.args[0] for node in nodes] == [None] * 4
    assert count(program, "aten.cat") == 0


def test_tokens_handed_on_as_they_are_have_no_append(capture: Any, count: Any) -> None:
    program = capture(decoder("sdpa_causal"), prompt(), passes=PASSES)
    assert program.matches["FindAttention"] == 2
    assert program.matches["FindKVAppend"] == 0


def test_one_append_of_a_compressed_past_each(capture: Any, compressed: Any) -> None:
    model = decoder("manual")
    program = capture(model, prompt(1), compressed(model, prompt()), passes=PASSES)
    nodes = program.graph.find_nodes(op="call_function", target=CANONICAL)
    assert {node.args[0] for node in nodes} == set(program.states)
    assert len(nodes) == 4


def test_a_cache_that_two_attentions_read_is_appended_to_once(capture: Any) -> None:
    def shared(q: Tensor, past_k: Tensor, k: Tensor, past_v: Tensor, v: Tensor) -> Any:
        key, value = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
        return SDPA(q, key, value) + SDPA(q + 1, key, value), key, value

    program = capture(shared, *operands(), passes=PASSES)
    assert program.matches["FindAttention"] == 2
    assert program.matches["FindKVAppend"] == 2


NOT_APPENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "other_dimension": lambda past, new: torch.cat((past[:, :, :1], new), dim=1),
    "three_parts": lambda past, new: torch.cat((past, new, new), dim=2),
    "a_sum": lambda past, new: past + new,
}


@pytest.mark.parametrize("name", NOT_APPENDS)
def test_other_operators_stay(capture: Any, calls: Any, name: str) -> None:
    function = appended(NOT_APPENDS[name])
    if name == "other_dimension":
        q, *rest = operands()
        inputs = (torch.cat((q, q), dim=1), *rest)
    else:
        inputs = operands()
    program = capture(function, *inputs, passes=PASSES)
    before = capture(function, *inputs, passes=PASSES[:2])
    assert program.matches["FindKVAppend"] == 0
    assert calls(program) == calls(before)


def test_a_cat_that_no_attention_reads_stays(capture: Any, count: Any) -> None:
    program = capture(lambda x: torch.cat((x, x), dim=2), torch.ones(1, 2, 3, 4), passes=PASSES)
    assert program.matches["FindKVAppend"] == 0
    assert count(program, "aten.cat") == 1


@pytest.mark.parametrize(("cached", "length"), [(True, 3), (True, 1), (False, 3)])
def test_a_cat_of_three_dimensions_is_a_past_where_keys_are_a_view_of_it(
    capture: Any, cached: bool, length: int
) -> None:
    """Else it puts a prompt together, as of learned embeddings and tokens."""

    def attend(x: Tensor, before: Tensor, weight: Tensor) -> Tensor:
        whole = x if cached else torch.cat((before, x), 1)
        query, key, value = (whole @ weight).chunk(3, dim=2)
        if cached:
            key, value = torch.cat((before, key), 1), torch.cat((before, value), 1)
        heads = (rows.unflatten(2, (2, -1)).transpose(1, 2) for rows in (query, key, value))
        return F.scaled_dot_product_attention(*heads)

    given = torch.randn(2, length, 8), torch.randn(2, 4, 8), torch.randn(8, 24)
    assert capture(attend, *given, passes=PASSES).continues == cached
