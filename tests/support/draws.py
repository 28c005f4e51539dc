"""What hypothesis draws for tests of the native kernels, and running a step."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from stores import Cache
from torch import Tensor

thorough = settings(max_examples=120, deadline=None, derandomize=True, database=None)


def rows(draw: st.DrawFn, heads: int, count: int, like: Any) -> Tensor:
    """Tokens [2, H, L, D] that lie in memory as models have them."""
    shape = (2, heads, count, like.head_dim)
    lies = draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]))
    if lies == "transposed":
        return torch.randn(2, count, heads, like.head_dim).to(like.dtype).transpose(1, 2)
    if lies == "sliced":
        return torch.randn(2, heads, count + 2, like.head_dim + 3).to(like.dtype)[:, :, 1:-1, 2:-1]
    if lies == "expanded":
        return torch.randn(1, *shape[1:]).to(like.dtype).expand(shape)
    return torch.randn(shape).to(like.dtype)


def masks(draw: st.DrawFn, query: Tensor, visible: int) -> Tensor | None:
    """A mask of some shape and kind, perhaps for more tokens than there are."""
    heads, queries = query.shape[1:3]
    tokens = visible + draw(st.sampled_from([0, 0, 7]))
    shapes = [(2, heads, queries, tokens), (2, 1, queries, tokens), (queries, tokens)]
    shape = draw(st.sampled_from([*shapes, (1, 1, 1, tokens), (2, 1, 1, 1)]))
    kind = draw(st.sampled_from([None, "bool", torch.float32, query.dtype]))
    if kind is None:
        return None
    if kind == "bool":
        return torch.rand(shape) < 0.7
    return torch.randn(shape).masked_fill(torch.rand(shape) < 0.2, -torch.inf).to(kind)


def output_or_error(operator: Any, before: Any, cache: Cache, after: Any) -> Any:
    saved = cache.clone()
    try:
        return operator(*before, *cache.tensors, *after)
    except ValueError as error:
        for mine, theirs in zip(cache.tensors, saved.tensors, strict=True):
            assert torch.equal(mine, theirs)
        return str(error)
