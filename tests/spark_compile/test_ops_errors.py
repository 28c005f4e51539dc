"""Operators that are given what does not fit: they say so and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spark_compile import ops
from spark_compile.kernels.formats import parse
from spark_compile.kernels.reference.store import ALL
from spark_compile.kernels.spec import Spec

NAMES = (
    "query", "new_key", "new_value", "key_pages", "key_head", "value_pages", "value_head",
    "attn_mask", "sinks", "causal_offset", "keep", "position", "spec",
)  # fmt: skip


def spec_of(**numbers: int) -> Spec:
    key, value = (parse(text, dim, torch.float32) for text, dim in (("spark(kept=5)", 12),
                                                                    ("int8", 10)))  # fmt: skip
    return Spec(key, value, **{"window": 4, "recent": 3, **numbers}, scale=0.3)


def arguments(spec: Spec, length: int = 20, capacity: int | None = 28) -> dict[str, Any]:
    """Those of a step of two tokens, by name."""
    query, key, value = (
        torch.randn(2, heads, length + 2, dim) for heads, dim in ((6, 12), (3, 12), (3, 10))
    )
    before, new = ([t[part] for t in (query, key, value)]
                   for part in ((..., slice(length), slice(None)),
                                (..., slice(length, None), slice(None))))  # fmt: skip
    stored = ops.build(before[1], before[2], before[:1], spec.text, capacity)
    how = (None, None, None, ALL, None, spec.text)
    return dict(zip(NAMES, (*new, *stored, *how), strict=True))


def refuse(given: dict[str, Any], match: str, error: Any = ValueError) -> None:
    before = {name: t.clone() for name, t in given.items() if isinstance(t, Tensor)}
    with pytest.raises(error, match=match):
        ops.step(*given.values())
    assert all(torch.equal(given[name], old) for name, old in before.items())


@pytest.mark.parametrize("capacity", [28, 20])
@pytest.mark.parametrize("start", [None, 17])
def test_a_step_without_room_raises_and_writes_nothing(start: int | None, capacity: int) -> None:
    """One page more than there is room for, or many, also after tokens that are forgotten."""
    given = arguments(spec_of(), capacity=capacity)
    count = 16 if start is None else 20
    for name, heads, dim in (("query", 6, 12), ("new_key", 3, 12), ("new_value", 3, 10)):
        given[name] = torch.randn(2, heads, count, dim)
    given["position"] = None if start is None else torch.arange(start, start + count)
    refuse(given, "do not fit into")


def test_a_tail_without_room_raises_and_writes_nothing() -> None:
    given = arguments(spec_of(min_tokens=100), capacity=None)
    for name in ("query", "new_key", "new_value"):
        given[name] = given[name].repeat(1, 1, 9, 1)
    refuse(given, "38 dense tokens do not fit into a tail of 24")


def test_the_room_of_a_capacity_can_be_filled() -> None:
    given = arguments(spec_of())
    for length in range(20, 28, 2):
        ops.step(*given.values())
        dense = ops.recover(given["key_pages"], given["key_head"], given["spec"], True, length + 2)
        assert torch.equal(dense[:, :, -2:], given["new_key"])


Change = Callable[[Tensor], Any]
WRONG: list[tuple[str, Change, str]] = [
    ("new_key", lambda t: t[:1], r"new_key is .*\[1, 3, 2, 12\]: allowed is .*\[2, 3, 2, 12\]"),
    ("new_key", lambda t: t[:, :2], r"new_key is .*\[2, 2, 2, 12\]: allowed is"),
    ("new_key", lambda t: t[..., :7], "new_key is .*: allowed is"),
    ("new_key", lambda t: t.double(), "new_key is torch.*: allowed is torch.float32"),
    ("new_key", lambda t: t[:, :, 0], "new_key is"),
    ("new_value", lambda t: t[:, :, :1], "new_value is"),
    ("new_value", lambda t: t.bfloat16(), "new_value is torch.bfloat16"),
    ("new_value", lambda t: torch.cat((t, t), 3), "new_value is"),
    ("query", lambda t: t[:, :5], "query is"),
    ("query", lambda t: t[:1], "query is"),
    ("query", lambda t: t[..., :8], "query is"),
    ("query", lambda t: t[:, :0], r"query is .*\[2, 0, 2, 12\]: allowed is .*\[2, 3, 2, 12\]"),
    ("query", lambda t: t.cfloat(), "query is .*: allowed is a floating-point dtype"),
    ("key_pages", lambda t: t[:, :, :0], r"key_pages is .*\[2, 3, 0, .*: allowed is .*\[2, 3, 1, "),
    ("value_pages", lambda t: t[:, :2], "value_pages is"),
    ("value_head", lambda t: t[:, :, :40], "value_head is"),
    ("attn_mask", lambda _: torch.ones(1, 40, dtype=torch.cfloat), "attn_mask is torch.complex64"),
    ("sinks", lambda _: torch.zeros(6, dtype=torch.cfloat), "sinks is .*: allowed is a floating"),
    ("sinks", lambda _: torch.zeros(6, dtype=torch.long), "sinks is .*: allowed is a floating"),
    (
        "position",
        lambda _: torch.tensor([19.5]),
        "position is torch.float32.*: allowed is torch.int",
    ),
    ("keep", lambda _: -1, "keep is -1: allowed is 0 or more, or None"),
    ("key_pages", lambda t: t[..., :-8], "key_pages is"),
    (
        "key_pages",
        lambda t: t.view(torch.int8),
        "key_pages is torch.*: allowed is torch.uint8",
    ),
    ("key_head", lambda t: t[..., :32], "key_head is"),
    ("key_head", lambda t: t[..., :-3], "key_head is"),
    ("value_pages", lambda t: t[:, :, :, :8], "value_pages is"),
    ("value_head", lambda t: t[:1], "value_(head|pages) is|of other heads"),
    ("spec", lambda t: t.replace("int8:10", "int8:11"), "(value_pages|value_head|new_value) is"),
    ("spec", lambda t: t.replace("int8", "int9"), "format 'int9' is not known"),
    ("spec", lambda t: t.replace("window=4", "window=8"), "key_pages is"),
]


@pytest.mark.parametrize(("name", "change", "match"), WRONG, ids=range(len(WRONG)))
def test_an_operand_that_does_not_fit_is_named(name: str, change: Change, match: str) -> None:
    given = arguments(spec_of())
    given[name] = change(given[name])
    refuse(given, match)


WRONG_BUILDS: list[tuple[str, Change, str]] = [
    ("key", lambda t: t[..., :11], r"key is .*\[2, 3, 20, 11\]: allowed is .*\[2, 3, 20, 12\]"),
    ("key", lambda t: t[0], "key is"),
    ("key", lambda t: t.double(), "key is torch.float64.*: allowed is torch.float32"),
    ("value", lambda t: t[:1], r"value is .*\[1, 3, 20, 10\]: allowed is .*\[2, 3, 20, 10\]"),
    ("value", lambda t: t[:, :1], "value is"),
    ("value", lambda t: t[:, :, 1:], "value is"),
    ("value", lambda t: t.bfloat16(), "value is torch.bfloat16"),
    ("queries", lambda t: [t, t[:1]], r"queries\[1\] is .*\[1, 6, 20, 12\]: allowed is .*\[2, 6, "),
    ("queries", lambda t: [t[:, :5]], r"queries\[0\] is .*\[2, 5, 20, 12\]: allowed is .*\[2, 3, "),
    ("queries", lambda t: [t[:, :0]], r"queries\[0\] is"),
    ("queries", lambda t: [t[..., 1:]], r"queries\[0\] is"),
    ("queries", lambda t: [t[0]], r"queries\[0\] is"),
    ("capacity", lambda _: -1, "capacity is -1: allowed is 0 to"),
    ("capacity", lambda _: 2**61, "capacity is .*: allowed is 0 to"),
]


@pytest.mark.parametrize("keys", ["spark(kept=5)", "int8"])
@pytest.mark.parametrize(("name", "change", "match"), WRONG_BUILDS, ids=range(len(WRONG_BUILDS)))
def test_a_prompt_that_does_not_fit_is_named(
    name: str, change: Change, match: str, keys: str
) -> None:
    query, key, value = (torch.randn(2, h, 20, d) for h, d in ((6, 12), (3, 12), (3, 10)))
    text = spec_of().text.replace(spec_of().key.text, parse(keys, 12, torch.float32).text)
    given = {"key": key, "value": value, "queries": query, "spec": text, "capacity": None}
    given[name] = change(given[name])
    given["queries"] = [given["queries"]] if name != "queries" else given["queries"]
    for build in (torch.ops.spark.build, torch.ops.spark_reference.build):
        with pytest.raises(ValueError, match=match):
            build(**given)


@pytest.mark.parametrize("start", [None, 9])
@pytest.mark.parametrize(
    "shape", [(2, 6, 2, 8), (3, 1, 2, 30), (2, 4, 2, 30), (3, 30), (1, 2, 1, 2, 30), (2, 10)]
)
def test_a_mask_that_does_not_fit_changes_nothing(
    shape: tuple[int, ...], start: int | None
) -> None:
    given = arguments(spec_of())
    given["attn_mask"] = torch.ones(shape, dtype=torch.bool)
    given["position"] = None if start is None else torch.arange(start, start + 2)
    refuse(given, r"attn_mask is \[.*\]: allowed is what broadcasts to \[2, 6, 2, ")


@pytest.mark.parametrize("shape", [(2, 6, 2, 22), (1, 30), (2, 1, 1, 40), (2, 1), ()])
def test_a_mask_that_broadcasts_or_is_longer_is_taken(shape: tuple[int, ...]) -> None:
    given = arguments(spec_of())
    expected = ops.step(*{**given, **{n: t.clone() for n, t in given.items()
                                      if isinstance(t, Tensor)}}.values())  # fmt: skip
    given["attn_mask"] = torch.ones(shape, dtype=torch.bool)
    assert torch.equal(ops.step(*given.values()), expected)


@pytest.mark.parametrize("shape", [(5,), (12,), (2, 6), (1, 6), (6, 1), (1,), ()])
def test_sinks_of_other_heads_change_nothing(shape: tuple[int, ...]) -> None:
    given = arguments(spec_of())
    given["sinks"] = torch.zeros(shape)
    refuse(given, r"sinks is .*: allowed is .*\[6\]")


@pytest.mark.parametrize("position", [[21, 22], [-1, 0], [4, 6], [4, 4], [5, 4]])
def test_a_wrong_position_changes_nothing(position: list[int]) -> None:
    given = arguments(spec_of())
    given["position"] = torch.tensor(position)
    refuse(given, "position")


def test_keys_and_values_of_other_lengths_change_nothing() -> None:
    given, other = arguments(spec_of()), arguments(spec_of(), 19)
    refuse({**given, **{name: other[name] for name in ("value_pages", "value_head")}}, "lengths")


def test_more_tokens_than_the_length_are_not_recovered() -> None:
    given = arguments(spec_of())
    with pytest.raises(ValueError, match="length is 19: the cache has 20 tokens"):
        ops.recover(given["key_pages"], given["key_head"], given["spec"], True, 19)
    with pytest.raises(ValueError, match="value_pages is"):
        ops.recover(given["key_pages"], given["key_head"], given["spec"], False, 20)
