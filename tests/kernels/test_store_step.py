"""Building, stepping and rewinding a cache of two sides, by the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from side_model import SideModel
from torch import Tensor

from spark_compile.kernels.formats import parse
from spark_compile.kernels.reference.attend import attention
from spark_compile.kernels.reference.operators import build, rewind, step
from spark_compile.kernels.reference.store import ALL, Store, position_of, query_stats
from spark_compile.kernels.spec import SIDES, Spec

HEADS, KEY_DIM, VALUE_DIM = 2, 9, 6
FORMATS = [
    ("dense", "dense"),
    ("int8", "int8"),
    ("spark(kept=4)", "dense"),
    ("spark(kept=4,stored=int8,recovery=gaussian)", "pruned(kept=2)"),
]


def spec_of(formats: tuple[str, str], dtype: torch.dtype = torch.float32, **numbers: int) -> Spec:
    key, value = formats
    return Spec(
        parse(key, KEY_DIM, dtype), parse(value, VALUE_DIM, dtype),
        **{"window": 3, "recent": 2, **numbers}, scale=0.4, softcap=3.0,
    )  # fmt: skip


def tokens(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values."""
    query = torch.randn(2, 2 * HEADS, count, KEY_DIM, dtype=dtype)
    key, value = (torch.randn(2, HEADS, count, dim, dtype=dtype) for dim in (KEY_DIM, VALUE_DIM))
    return query, key, value


class Cache:
    """Both sides of a cache, and the models that they must be worth."""

    def __init__(
        self, spec: Spec, length: int, pages: int, dtype: torch.dtype = torch.float32
    ) -> None:
        query, key, value = tokens(length, dtype)
        self.spec = spec
        self.keys, self.values = (
            Store(side.pages[:, :, :pages], side.head, spec, side.side)
            for side in build(key, value, [query, query * 2], spec, 400)
        )
        self.models = [SideModel(spec, side, 2, HEADS) for side in SIDES]
        for model, rows in zip(self.models, (key, value), strict=True):
            model.observe(query)
            model.append(rows, ALL, query * 2)

    def stored(self) -> list[Tensor]:
        return [t.clone() for side in (self.keys, self.values) for t in (side.pages, side.head)]

    def check(self) -> None:
        for store, model in zip((self.keys, self.values), self.models, strict=True):
            again = Store(store.pages, store.head, self.spec, store.side)
            counts = again.length, again.packed, again.first
            assert counts == (model.length, model.packed, model.first)
            torch.testing.assert_close(again.rows(), model.rows, rtol=1e-6, atol=1e-6)
            if again.stats is not None:
                torch.testing.assert_close(again.stats[:, :, again.step % 2], model.stats)

    def step(
        self, count: int, keep: int | None = ALL, start: int | None = None,
        mask: Tensor | None = None, causal_offset: int | None = None, sinks: Tensor | None = None,
        query: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The output of one step, and what it must be."""
        given, key, value = tokens(count, self.spec.key.dtype)
        query = given if query is None else query
        position = None if start is None else torch.arange(start, start + count)
        output = step(
            query, key, value, self.keys, self.values, mask, sinks, causal_offset, keep, position
        )
        if start is not None:
            for model in self.models:
                model.crop(start)
        for model in self.models:
            if self.spec.rolls:
                model.first = max(model.first, model.length - self.spec.rolls)
        past = [model.rows for model in self.models]
        seen = [torch.cat((a, b.float()), dim=2) for a, b in zip(past, (key, value), strict=True)]
        cut = None if mask is None else mask[..., : seen[0].shape[2]]
        expected, _ = attention(query, *seen, cut, causal_offset, 0.4, 3.0, sinks)
        for model, rows in zip(self.models, (key, value), strict=True):
            if keep is None:
                model.observe(query)
            else:
                model.append(rows, keep, query)
        return output, expected.to(value.dtype)


STEPS = st.lists(
    st.tuples(st.integers(1, 9), st.none() | st.integers(3, 20), st.none() | st.integers(0, 9)),
    min_size=1, max_size=8,
)  # fmt: skip


@given(
    formats=st.sampled_from(FORMATS), length=st.integers(1, 25), steps=STEPS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), sinks=st.integers(0, 2),
    min_tokens=st.sampled_from([0, 15]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_steps_that_append_evict_and_rewind_are_those_of_dense_rows(
    formats: tuple[str, str], length: int, steps: list[tuple[int, int | None, int | None]],
    dtype: torch.dtype, sinks: int, min_tokens: int, seed: int,
) -> None:  # fmt: skip
    """Each step appends some tokens, keeps the last ones and may start some tokens back."""
    torch.manual_seed(seed)
    spec = spec_of(formats, dtype, sinks=sinks, min_tokens=min_tokens)
    cache = Cache(spec, length, 40, dtype)
    cache.check()
    for count, keep, back in steps:
        model = cache.models[0]
        start = None if back is None else max(model.length - back, model.first)
        keep = ALL if keep is None or sinks or min_tokens else keep
        output, expected = cache.step(count, keep, start)
        torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
        cache.check()


@pytest.mark.parametrize("formats", FORMATS, ids=str)
@pytest.mark.parametrize("longer", [0, 4])
def test_masks_sinks_and_offsets_take_part(formats: tuple[str, str], longer: int) -> None:
    cache = Cache(spec_of(formats), 14, 9)
    mask = torch.rand(2, 1, 3, 17 + longer) < 0.7
    output, expected = cache.step(3, mask=mask, causal_offset=14, sinks=torch.randn(4))
    torch.testing.assert_close(output, expected)
    plain, expected = cache.step(3)
    torch.testing.assert_close(plain, expected)
    cache.check()


@pytest.mark.parametrize("start", [None, 5, 11])
def test_several_attentions_of_one_step_see_the_same_and_the_last_one_appends(
    start: int | None,
) -> None:
    cache = Cache(spec_of(FORMATS[2]), 14, 9)
    for keep in (None, None, ALL):
        output, expected = cache.step(2, keep, start)
        torch.testing.assert_close(output, expected)
        cache.check()
    assert cache.keys.length == (14 if start is None else start) + 2


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_a_cache_that_rolls_evicts_before_it_attends(formats: tuple[str, str]) -> None:
    """And so do the readers of a shared cache before the one that appends."""
    cache = Cache(spec_of(formats).attending(0.4, 3.0, rolls=11), 14, 4)
    for keep in (11, None, 11, None, None, 11):
        output, expected = cache.step(1, keep)
        torch.testing.assert_close(output, expected)
        cache.check()


@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_new_tokens_are_attended_to_before_they_are_packed(count: int) -> None:
    spec = spec_of(("spark(kept=1)", "pruned(kept=1)"), recent=0)
    cache = Cache(spec, 8, 20)
    output, expected = cache.step(count, causal_offset=8)
    torch.testing.assert_close(output, expected)
    assert cache.keys.packed == (8 + count) // 3 * 3


def refuse(cache: Cache, match: str, error: type[Exception] = ValueError, **how: object) -> None:
    """A step raises, and leaves every byte as it was."""
    before, counts = cache.stored(), (cache.keys.length, cache.values.length)
    with pytest.raises(error, match=match):
        cache.step(**how)  # type: ignore[arg-type]
    assert all(map(torch.equal, cache.stored(), before))
    assert (cache.keys.length, cache.values.length) == counts


@pytest.mark.parametrize("formats", FORMATS, ids=str)
@pytest.mark.parametrize("start", [None, 4, 13])
def test_a_step_without_room_changes_nothing(formats: tuple[str, str], start: int | None) -> None:
    cache = Cache(spec_of(formats), 14, 5)
    refuse(cache, "pages do not fit into 5", count=20, start=start)
    cache.step(3)
    refuse(cache, "pages do not fit into 5", count=3 if start is None else 20, start=start)


def test_values_without_room_leave_the_keys_alone() -> None:
    cache = Cache(spec_of(FORMATS[2]), 14, 9)
    cache.values = Store(cache.values.pages[:, :, :4], cache.values.head, cache.spec, "value")
    refuse(cache, "5 pages do not fit into 4", count=3)
    refuse(cache, "5 pages do not fit into 4", count=9, start=8)


def test_a_rewound_step_is_measured_from_where_it_starts() -> None:
    cache = Cache(spec_of(FORMATS[0]), 14, 4)
    refuse(cache, "5 pages do not fit into 4", count=3)
    output, expected = cache.step(3, start=10)
    torch.testing.assert_close(output, expected)
    cache.check()


@pytest.mark.parametrize(
    ("position", "message"),
    [([15], "position 15 leaves a gap after 14"), ([-1], "position -1 leaves a gap"),
     ([3, 5], r"positions \[3, 5\] are not consecutive"), ([4, 3], "not consecutive"),
     ([3, 3], "not consecutive")],
)  # fmt: skip
def test_a_wrong_position_changes_nothing(position: list[int], message: str) -> None:
    cache = Cache(spec_of(FORMATS[2]), 14, 9)
    before = cache.stored()
    with pytest.raises(ValueError, match=message):
        rewind(cache.keys, cache.values, torch.tensor(position))
    query, key, value = tokens(len(position))
    with pytest.raises(ValueError, match=message):
        step(query, key, value, cache.keys, cache.values, None, None, None, ALL,
             torch.tensor(position))  # fmt: skip
    assert all(map(torch.equal, cache.stored(), before))


def test_the_position_behind_the_last_token_appends() -> None:
    assert position_of(torch.tensor([14, 15]), 14) == 14
    assert position_of(torch.tensor([[0]]), 14) == 0


def test_a_position_among_evicted_tokens_is_refused() -> None:
    """The new token would attend to tokens that are gone; a new beginning attends to none."""
    with pytest.raises(ValueError, match="position 3 is among 5 evicted tokens"):
        position_of(torch.tensor([3]), 14, 5)
    assert position_of(torch.tensor([0]), 14, 5) == 0
    assert position_of(torch.tensor([5]), 14, 5) == 5


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("queries", [3, 5, 9])
def test_query_stats_follow_the_definition(queries: int, each: bool) -> None:
    query, window = torch.randn(2, 6, queries, 7), 5
    stats = query_stats(query, 2, window, each=each)
    for b in range(2):
        for h in range(2):
            group = [query[b, 3 * h + g, -window:] for g in range(3)]
            mean = (group[0] + group[1] + group[2]) / 3
            norm = torch.linalg.vector_norm(mean, dim=0)
            if each:
                norm = torch.linalg.vector_norm(torch.cat(group), dim=0) / 3**0.5
            torch.testing.assert_close(stats[b, h].sqrt(), norm)
