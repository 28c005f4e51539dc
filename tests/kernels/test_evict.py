"""Choosing the tokens of a prompt that stay, and caches of them, by the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spark_compile.kernels.eviction import parse_scorer
from spark_compile.kernels.formats import parse
from spark_compile.kernels.layout import DROPPED, LENGTH, PACKED
from spark_compile.kernels.reference.attend import attention
from spark_compile.kernels.reference.evict import kept_positions, take
from spark_compile.kernels.reference.operators import build, step
from spark_compile.kernels.reference.store import ALL, Store
from spark_compile.kernels.spec import Spec, parse_spec

BATCH, QUERY_HEADS, HEADS, DIM, TOKENS = 2, 4, 2, 8, 30


def spec_of(scorer: str | None = "knorm(tokens=17)", form: str = "dense", **numbers: int) -> Spec:
    """By default 3 pages of 4 chosen tokens, and a tail of 5."""
    numbers = {"window": 4, "recent": 3, **numbers}
    evict = None if scorer is None else parse_scorer(scorer)
    formats = (parse(form, DIM, torch.float32), parse("dense", DIM, torch.float32))
    return Spec(*formats, **numbers, scale=0.4, evict=evict)


def rows(count: int, heads: int = HEADS) -> Tensor:
    return torch.randn(BATCH, heads, count, DIM)


def padded_mask(padding: int, queries: int = TOKENS, columns: int = TOKENS) -> Tensor:
    mask = torch.ones(BATCH, 1, queries, columns).tril(columns - queries).bool()
    mask[0, ..., :padding] = False
    return mask


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("tokens", [17, 18, 20])
def test_whole_pages_are_chosen_and_the_latest_tokens_stay(sinks: int, tokens: int) -> None:
    spec, key = spec_of(f"knorm(tokens={tokens})", sinks=sinks), rows(TOKENS)
    kept = kept_positions(key, [], None, 0, spec)
    chosen = (tokens - sinks - 3) // 4 * 4
    latest = tokens - sinks - chosen
    assert (spec.chosen_end, spec.stored_tokens(TOKENS)) == (sinks + chosen, tokens)
    for of_head, norm in zip(kept.flatten(0, 1), key.norm(dim=-1).flatten(0, 1), strict=True):
        between = list(range(sinks, TOKENS - latest))
        best = sorted(sorted(between, key=lambda at: norm[at])[:chosen])
        expected = [*range(sinks), *best, *range(TOKENS - latest, TOKENS)]
        assert of_head.tolist() == expected


@pytest.mark.parametrize("count", [0, 1, 16, 17])
def test_a_short_prompt_stays(count: int) -> None:
    kept = kept_positions(rows(count), [], None, 0, spec_of())
    assert torch.equal(kept, torch.arange(count).expand(BATCH, HEADS, -1))


def test_padding_goes_first_and_what_is_observed_stays() -> None:
    spec = spec_of("snapkv(tokens=17,window=9)")
    query = rows(TOKENS, QUERY_HEADS)
    kept = kept_positions(rows(TOKENS), [query], padded_mask(14), None, spec)
    # One of the padding fills a page.
    assert kept[0].tolist() == [[0, *range(14, 30)]] * HEADS
    assert (kept[:, :, -9:] == torch.arange(21, 30)).all()


def test_the_spec_says_what_is_evicted() -> None:
    spec = spec_of("snapkv(tokens=17,window=9)", "spark(kept=3)")
    assert spec.text.endswith(";evict=snapkv(tokens=17,window=9,kernel=5,pooling=average);"
                              "scale=0.4;softcap=0.0")  # fmt: skip
    assert parse_spec(spec.text) == spec
    assert "position" in spec.pages("key").offsets
    assert "position" not in spec.pages("value").offsets
    without = spec_of(None, "spark(kept=3)")
    assert spec.pages("key").token_bytes == without.pages("key").token_bytes + 4


@pytest.mark.parametrize(
    ("scorer", "numbers", "said"),
    [
        (
            "knorm(tokens=8)",
            {"sinks": 2},
            "tokens of .* is 8: allowed is 9 or more: the first 2, the",
        ),
        (
            "snapkv(tokens=9,window=8)",
            {"sinks": 2},
            "is 9: allowed is 10 or more: .* latest 8, and a page of 4",
        ),
        ("knorm(tokens=9)", {"min_tokens": 5}, "min_tokens is 5: allowed is 0 where knorm evicts"),
        ("knorm(tokens=9)", {"rolls": 5}, "rolls is 5: allowed is 0 where knorm evicts"),
        ("pyramidkv(tokens=99,layers=3)", {}, "is for all layers"),
    ],
)
def test_numbers_that_no_scorer_goes_with(scorer: str, numbers: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        spec_of(scorer, **numbers)


class Model:
    """All tokens, dense, of which each head sees some."""

    def __init__(self, key: Tensor, value: Tensor, kept: Tensor | None) -> None:
        self.key, self.value = key, value
        self.seen = torch.ones(key.shape[:3], dtype=torch.bool)
        if kept is not None:
            self.seen = torch.zeros_like(self.seen).scatter(2, kept, True)

    @property
    def tokens(self) -> int:
        return self.key.shape[2]

    def crop(self, length: int) -> None:
        self.key, self.value = self.key[:, :, :length], self.value[:, :, :length]
        self.seen = self.seen[:, :, :length]

    def step(
        self, query: Tensor, new: tuple[Tensor, Tensor], mask: Tensor | None, offset: int | None
    ) -> Tensor:
        self.key, self.value = (
            torch.cat(both, 2) for both in zip((self.key, self.value), new, strict=True)
        )
        fresh = torch.ones(new[0].shape[:3], dtype=torch.bool)
        self.seen = torch.cat((self.seen, fresh), 2)
        hidden = ~self.seen.repeat_interleave(QUERY_HEADS // HEADS, 1).unsqueeze(2)
        bias = torch.zeros(BATCH, QUERY_HEADS, query.shape[2], self.tokens)
        bias = bias.masked_fill(hidden, -torch.inf)
        if mask is not None:
            added = mask[..., : self.tokens] if mask.shape[-1] > 1 else mask
            bias = bias + added if mask.dtype != torch.bool else bias.masked_fill(
                ~added, -torch.inf)  # fmt: skip
        return attention(query, self.key, self.value, bias, offset, 0.4, 0.0, None)[0]


def made(spec: Spec, capacity: int | None = None) -> tuple[list[Store], Model]:
    key, value = rows(TOKENS), rows(TOKENS)
    kept = kept_positions(key, [], None, 0, spec)
    stores = build(take(key, kept), take(value, kept), [], spec, capacity, kept)
    return stores, Model(key, value, kept)


def mask_of(kind: str, queries: int, tokens: int) -> Tensor | None:
    if kind == "none":
        return None
    shape = (BATCH, QUERY_HEADS, queries, tokens + 3)
    if kind == "heads":
        return torch.randn(shape)
    if kind == "column":
        return torch.rand(BATCH, 1, 1, 1) < 2
    return torch.rand(tokens + 3) < 0.8 if kind == "row" else torch.rand(BATCH, 1, *shape[2:]) < 0.8


@pytest.mark.parametrize("kind", ["none", "bool", "heads", "column", "row"])
@pytest.mark.parametrize("sinks", [0, 2])
def test_steps_see_the_tokens_that_stay_where_they_were(kind: str, sinks: int) -> None:
    spec = spec_of("knorm(tokens=17)", sinks=sinks)
    (keys, values), model = made(spec, 90)
    assert (keys.tokens, keys.length, keys.dropped) == (30, 17, 13)
    assert keys.counters[0, 0, DROPPED] == values.counters[0, 0, DROPPED] == 13
    for count in (1, 1, 3, 1, 9, 1, 1):
        query, new = rows(count, QUERY_HEADS), (rows(count), rows(count))
        start = model.tokens
        for offset in (start, 25, -1, None):
            mask = mask_of(kind, count, start + count)
            # keep None appends nothing
            args = (query, *new, keys, values, mask, None, offset, None, None)
            output = step(*args)
            assert (keys.length, keys.dropped) == (start - 13, 13)
            expected = model.step(query, new, mask, offset)
            torch.testing.assert_close(output, expected)
            model.crop(start)
        step(query, *new, keys, values, None, None, start, ALL, None)
        model.step(query, new, None, start)
        assert keys.tokens == model.tokens
    positions = keys.positions()
    seen = model.seen.nonzero()[:, 2].view(BATCH, HEADS, -1)
    assert torch.equal(positions, seen)
    assert keys.packed > spec.chosen_end - sinks  # pages of generated tokens, too


def test_a_position_rewinds_what_came_after_the_eviction() -> None:
    (keys, values), model = made(spec_of(), 90)
    for position in (30, 31, 27, 40):
        for _ in range(11):
            query, new = rows(1, QUERY_HEADS), (rows(1), rows(1))
            at = torch.tensor([min(position, keys.tokens)])
            model.crop(int(at))
            output = step(query, *new, keys, values, None, None, None, ALL, at)
            torch.testing.assert_close(output, model.step(query, new, None, None))
            position += 1
    before = keys.head.clone()
    for position in (1, 13, 24):  # 12 are chosen
        new = rows(1), rows(1)
        with pytest.raises(ValueError, match=f"position {position} is among the first 25 tokens"):
            step(rows(1, QUERY_HEADS), *new, keys, values, None, None, None, ALL,
                 torch.tensor([position]))  # fmt: skip
    assert torch.equal(keys.head, before)


def test_position_zero_forgets_all_and_makes_a_new_prompt() -> None:
    spec = spec_of()
    (keys, values), _ = made(spec, 90)
    query, key, value, at = rows(25, QUERY_HEADS), rows(25), rows(25), torch.arange(25)
    mask = padded_mask(4, 25, 90)
    output = step(query, key, value, keys, values, mask, None, None, ALL, at)
    expected, _ = attention(query, key, value, mask[..., :25], None, 0.4, 0.0, None)
    torch.testing.assert_close(output, expected)
    kept = kept_positions(key, [query], mask, None, spec)
    assert torch.equal(keys.positions(), kept)
    assert (keys.tokens, keys.dropped, keys.packed) == (25, 8, 12)
    torch.testing.assert_close(keys.rows(), take(key, kept))
    torch.testing.assert_close(values.rows(), take(value, kept))


def test_without_a_scorer_no_step_evicts() -> None:
    spec = spec_of(None)
    keys, values = build(rows(0), rows(0), [], spec, 90)
    step(rows(25, QUERY_HEADS), rows(25), rows(25), keys, values, None, None, 0, ALL, None)
    assert (keys.tokens, keys.length, keys.dropped) == (25, 25, 0)


@pytest.mark.parametrize("change", ["descending", "latest", "sinks", "heads", "many", "negative"])
def test_positions_that_no_scorer_gives_are_refused(change: str) -> None:
    spec = spec_of("knorm(tokens=17)", sinks=2)
    kept = kept_positions(rows(TOKENS), [], None, 0, spec)
    if change == "descending":
        kept[0, 1, 5] = kept[0, 1, 6]
    elif change == "latest":
        kept[:, :, -3] -= 1
    elif change == "sinks":
        kept[:, :, :2] = kept[:, :, :2] + torch.tensor([0, 1])
    elif change == "heads":
        kept[1, 1] += 1
    elif change == "many":
        kept = torch.arange(18).expand(BATCH, HEADS, -1)
    else:
        kept = kept - 30
    with pytest.raises(ValueError, match=r"allowed are those of spark::evict"):
        build(rows(kept.shape[2]), rows(kept.shape[2]), [], spec, None, kept)


@pytest.mark.parametrize(
    ("counter", "value", "said"),
    [
        (DROPPED, -1, "DROPPED is -1"),
        (LENGTH, 12, "LENGTH - PACKED is 0, allowed|LENGTH of an evicted prompt is 12"),
        (PACKED, 8, "PACKED of an evicted prompt is 8, allowed is 12"),
    ],
)
def test_damaged_counters_raise(counter: int, value: int, said: str) -> None:
    (keys, values), _ = made(spec_of("knorm(tokens=17)", sinks=2))
    for store in (keys, values):
        store.counters[..., counter] = value
    stores = (Store(each.pages, each.head, each.spec, each.side) for each in (keys, values))
    with pytest.raises(ValueError, match=said):
        step(rows(1, QUERY_HEADS), rows(1), rows(1), *stores, None, None, None, ALL, None)


def test_a_cache_of_a_scorer_takes_no_window_that_slides() -> None:
    (keys, values), _ = made(spec_of())
    with pytest.raises(ValueError, match="keep is 5: a cache that keeps its first tokens by a"):
        step(rows(1, QUERY_HEADS), rows(1), rows(1), keys, values, None, None, None, 5, None)
