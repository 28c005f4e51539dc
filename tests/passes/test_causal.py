"""``causal``: masks that a number can stand for, and those that look like them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decoders import expanded
from torch import Tensor

from spark_compile.passes.find_attention import CANONICAL, FindAttention
from spark_compile.passes.normalize import Normalize

PASSES = (Normalize(), FindAttention())
QUERIES, TOKENS = 5, 7
LEAST = torch.finfo(torch.float32).min
Masked = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(mask: Callable[[int, int], Tensor]) -> Masked:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = mask(q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, hidden, enable_gqa=True)

    return attend


def written(change: Callable[[Tensor], Tensor]) -> Masked:
    """Attention written out, its scores changed."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ expanded(k, 2).mT / math.sqrt(q.shape[-1])
        return F.softmax(change(scores), dim=-1) @ expanded(v, 2)

    return attend


def rows(count: int, past: int = 0) -> Tensor:
    return (torch.arange(count) + past)[:, None]


def seen(queries: int, tokens: int) -> Tensor:
    """As transformers makes it, bool [1, 1, L, S]."""
    query, key = torch.arange(queries) + (tokens - queries), torch.arange(tokens) + 0
    mask = key[None, None, None, :] <= query[None, None, :, None]
    return mask.expand(1, -1, queries, tokens)


def later(scores: Tensor) -> Tensor:
    queries, tokens = scores.shape[-2:]
    return torch.arange(tokens) > rows(queries, tokens - queries)


CAUSAL: dict[str, tuple[Masked, int]] = {
    "transformers": (sdpa(seen), 2),
    "less": (sdpa(lambda n, s: torch.arange(s) < rows(n, s - n + 1)), 2),
    "greater": (sdpa(lambda n, s: rows(n) + (s - n) >= torch.arange(s)), 2),
    "strictly_greater": (sdpa(lambda n, s: rows(n) > torch.arange(s) - 3), 2),
    "from_a_start": (sdpa(lambda n, s: torch.arange(s) <= torch.arange(s - n, s)[:, None]), 2),
    "shifted_keys": (sdpa(lambda n, s: torch.arange(4, 4 + s) - 4 <= rows(n)), 0),
    "not_later": (sdpa(lambda n, s: ~(torch.arange(s) > rows(n, s - n))), 2),
    "lower": (sdpa(lambda n, s: torch.ones(n, s, dtype=torch.bool).tril(s - n)), 2),
    "not_upper": (sdpa(lambda n, s: ~torch.ones(n, s, dtype=torch.bool).triu(s - n + 1)), 2),
    "a_row_for_each_head": (sdpa(lambda n, s: seen(n, s).expand(1, 4, n, s)), 2),
    "filled": (written(lambda x: x.masked_fill(later(x), -1e9)), 2),
    "chosen": (written(lambda x: torch.where(later(x), LEAST, x)), 2),
    "added": (written(lambda x: x + torch.zeros(x.shape[-2:]).masked_fill(later(x), LEAST)), 2),
    "added_where": (written(lambda x: x + torch.where(~later(x), 0.0, -math.inf)), 2),
    "added_upper": (written(lambda x: x + torch.full(x.shape[-2:], -math.inf).triu(3)), 2),
    "beside_a_bias": (written(
        lambda x: x.masked_fill(later(x), -math.inf) + torch.arange(7.0)
    ), 2),
}  # fmt: skip


def operands(queries: int = QUERIES) -> tuple[Tensor, Tensor, Tensor]:
    key, value = torch.randn(2, 1, 2, TOKENS, 8).unbind()
    return torch.randn(1, 4, queries, 8), key, value


def canonical(program: Any) -> tuple[Any, Any]:
    """Mask and causal offset of the only attention."""
    (node,) = program.graph.find_nodes(op="call_function", target=CANONICAL)
    return node.args[3], node.args[4]


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_mask_becomes_a_number(capture: Any, name: str) -> None:
    attend, expected = CAUSAL[name]
    inputs = operands()
    program = capture(attend, *inputs, passes=PASSES)
    mask, offset = canonical(program)
    assert offset == expected
    assert (mask is not None) == (name == "beside_a_bias")
    torch.testing.assert_close(program.module(*program.examples)[0], attend(*inputs))
    assert not attend(*inputs).allclose(sdpa(lambda n, s: torch.ones(n, s).bool())(*inputs))


OTHER: dict[str, Masked] = {
    "a_window": sdpa(lambda n, s: (torch.arange(s) <= rows(n, 2)) & (torch.arange(s) > rows(n))),
    "later_alone": sdpa(lambda n, s: torch.arange(s) >= rows(n)),
    "one_row_for_all": sdpa(lambda n, s: torch.arange(s)[None] <= rows(1, 3)),
    "one_key_for_all": sdpa(lambda n, s: torch.arange(2, 3) <= rows(n, 1)),
    "every_other": sdpa(lambda n, s: torch.arange(0, 2 * s, 2) <= rows(n, 2)),
    "twice_as_fast": sdpa(lambda n, s: torch.arange(s) <= rows(n) + rows(n)),
    "backwards": sdpa(lambda n, s: torch.arange(s) <= 6 - rows(n)),
    "transposed": sdpa(lambda n, s: (torch.arange(n) <= rows(s, 1)).mT),
    "of_floats": sdpa(lambda n, s: torch.arange(0.0, s) <= rows(n, 2)),
    "by_a_tensor": sdpa(lambda n, s: torch.arange(s) <= rows(n) + torch.tensor([2]).clone()),
    "not_all_ones": sdpa(lambda n, s: (torch.arange(s) > 0).expand(n, s).tril(2)),
    "a_number_that_is_seen": written(lambda x: x + torch.where(later(x), -1.0, 0.0)),
    "uniform_without_a_key": written(
        lambda x: x.masked_fill(torch.arange(7) > rows(5, -2), -1e9)
    ),
    "two_halves": written(lambda x: x.masked_fill(later(x), -1e9).masked_fill(~later(x), -1e9)),
    "added_one": written(lambda x: x + torch.where(later(x), LEAST, 1.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_other_masks_stay(capture: Any, name: str) -> None:
    inputs = operands()
    program = capture(OTHER[name], *inputs, passes=PASSES)
    mask, offset = canonical(program)
    assert mask is not None
    assert offset is None
    torch.testing.assert_close(program.module(*program.examples)[0], OTHER[name](*inputs))


def test_a_length_that_grows_is_a_size_of_the_graph(capture: Any) -> None:
    inputs = operands()
    for operand in inputs[1:]:
        torch._dynamo.mark_dynamic(operand, 2)
    program = capture(sdpa(seen), *inputs, passes=PASSES)
    (node,) = program.graph.find_nodes(op="call_function", target=CANONICAL)
    mask, offset = canonical(program)
    assert mask is None
    assert str(offset.meta["val"]) == str(node.args[1].meta["val"].shape[2] - QUERIES)


def test_one_query_sees_all_keys(capture: Any) -> None:
    program = capture(sdpa(seen), *operands(queries=1), passes=PASSES)
    assert canonical(program) == (None, TOKENS - 1)
