"""Contexts that are spread over ranks: whose tokens are whose, and attention over all of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from stores import Cache, format_of
from torch import Tensor
from torch.nn.functional import pad

from spark_compile import ops, spread_ops
from spark_compile.kernels.layout import LENGTH, PACKED
from spark_compile.kernels.reference.attend import attention
from spark_compile.kernels.spec import Spec
from spark_compile.kernels.spread import Spread, merged

HEADS, KV_HEADS, DIM = 4, 2, 8


def owners(tokens: int, ranks: int, block: int) -> list[int]:
    return [token // block % ranks for token in range(tokens)]


SPREADS = list(itertools.product((1, 2, 3, 4), (1, 2, 5)))


@pytest.mark.parametrize(("ranks", "block"), SPREADS)
def test_every_token_is_of_one_rank(ranks: int, block: int) -> None:
    rows = torch.arange(40.0).reshape(1, 1, 40, 1)
    for rank in range(ranks):
        spread = Spread(ranks, rank, block)
        mine = [token for token, owner in enumerate(owners(40, ranks, block)) if owner == rank]
        for first, last in itertools.combinations_with_replacement(range(41), 2):
            expected = [token for token in mine if first <= token < last]
            assert spread.positions(first, last).tolist() == expected
            assert spread.taken(rows[:, :, first:last], first).flatten().tolist() == expected
        assert [spread.own(n) for n in range(41)] == [sum(t < n for t in mine) for n in range(41)]


@dataclass
class Ranks:
    """One layer's cache on each of some ranks, and all its tokens."""

    spec: Spec
    ranks: int
    tokens: list[Tensor]
    """Keys and values."""
    caches: list[Cache] = field(default_factory=list)

    def __post_init__(self) -> None:
        query = torch.randn(1, HEADS, self.length, DIM)
        for place in self.places:
            built = spread_ops.build_own(*self.tokens, [query], self.spec.text, place)
            # Room for the steps to come.
            built = [pad(t, (0, 0, 0, 9) if t.dim() == 4 else (0, 64 * DIM)) for t in built]
            self.caches.append(Cache(self.spec, *built))

    @property
    def length(self) -> int:
        return self.tokens[0].shape[2]

    @property
    def places(self) -> Iterator[list[int]]:
        return ([self.ranks, rank] for rank in range(self.ranks))

    def step(
        self, count: int, queries: int, mask: Tensor | None = None, sinks: Tensor | None = None,
        causal_offset: int | None = None, appends: bool = True,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What the ranks make of a step together, and what it should be."""
        query = torch.randn(1, HEADS, queries, DIM)
        new = [torch.randn(1, KV_HEADS, count, DIM) for _ in range(2)]
        parts = [
            spread_ops.step_own(
                query, *new, *cache.tensors, mask, sinks, causal_offset, appends, self.length,
                place, self.spec.text,
            )
            for place, cache in zip(self.places, self.caches, strict=True)
        ]  # fmt: skip
        everything = [torch.cat(both, 2) for both in zip(self.tokens, new, strict=True)]
        expected, _ = attention(
            query, *everything, mask, causal_offset, self.spec.scale, self.spec.softcap, sinks
        )
        if appends:
            self.tokens = everything
        return merged(torch.cat(parts), self.ranks, torch.float32), expected


def ranks_of(length: int, ranks: int, softcap: float = 0.0, sinks: int = 0) -> Ranks:
    dense = format_of("dense", DIM, torch.float32, DIM)
    spec = Spec(dense, dense, 4, 2, sinks, scale=0.4, softcap=softcap)
    return Ranks(spec, ranks, [torch.randn(1, KV_HEADS, length, DIM) for _ in range(2)])


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("length", [0, 1, 4, 23])
def test_the_ranks_attend_to_all_tokens_together(length: int, ranks: int) -> None:
    both = ranks_of(length, ranks, softcap=3.0 if ranks == 2 else 0.0, sinks=ranks % 2)
    for count in (1, 1, 1, 2, 1, 9, 1, 1):
        end = both.length + count
        mask = torch.rand(1, 1, count, end) < 0.6
        additive = torch.randn(1, HEADS, count, end)
        for how in (
            {}, {"causal_offset": both.length}, {"mask": mask}, {"mask": additive},
            {"mask": mask[..., :1, :], "causal_offset": both.length},
            {"mask": additive, "causal_offset": end // 2}, {"sinks": torch.randn(HEADS)},
            {"mask": torch.zeros(count, 1)}, {"causal_offset": -1},
        ):  # fmt: skip
            torch.testing.assert_close(*both.step(count, count, appends=False, **how))  # type: ignore[arg-type]
        torch.testing.assert_close(*both.step(count, count, causal_offset=both.length))
    assert sum(cache.count(LENGTH) for cache in both.caches) == both.length
    if length == 23:
        assert all(cache.count(PACKED) > 0 for cache in both.caches)


def test_a_query_that_sees_nothing_has_an_output_of_zero() -> None:
    output, _ = ranks_of(9, 2).step(1, 1, mask=torch.zeros(1, 10, dtype=torch.bool))
    assert not output.any()


def test_what_is_not_a_number_stays_seen() -> None:
    output, _ = ranks_of(9, 2).step(1, 1, mask=torch.full((1, 10), torch.nan))
    assert output.isnan().all()


def test_a_rank_of_one_builds_what_one_process_builds() -> None:
    both = ranks_of(23, 1)
    query = torch.randn(1, HEADS, 1, DIM)
    alone = ops.build(*both.tokens, [query], both.spec.text, None)
    for mine, expected in zip(both.caches[0].tensors, alone, strict=True):
        assert torch.equal(mine[:, :, : expected.shape[2]], expected)
