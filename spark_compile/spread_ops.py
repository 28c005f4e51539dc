"""The operators of a cache that is spread over ranks, each of which stores its own tokens.

They choose those of the tokens that they get, and hand them to the operators of any cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.reference import operators as reference
from .kernels.reference.store import ALL
from .kernels.spec import parse_spec
from .kernels.spread import Spread
from .ops import STEP_OPERANDS, empty_cache, operator_of


def _fake_partial(query, new_key, new_value, *_args):  # type: ignore[no-untyped-def]
    rows = query.shape[:3]
    output = new_value.new_empty((*rows, new_value.shape[3]))
    return output, query.new_empty(rows, dtype=torch.float32)


@operator_of(f"{STEP_OPERANDS} -> (Tensor, Tensor)", _fake_partial)
def step_partial(
    query: Tensor, new_key: Tensor, new_value: Tensor, key_pages: Tensor, key_head: Tensor,
    value_pages: Tensor, value_head: Tensor, attn_mask: Tensor | None, sinks: Tensor | None,
    causal_offset: int | None, keep: int | None, position: Tensor | None, spec: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``spark::step`` of a part of the tokens that queries see, to be put together with others.

    Returns:
        The output [B, Hq, L', Dv] in the values' dtype, and the log-sum-exp [B, Hq, L'] float32 of
        the scores, -inf where a query sees none of these tokens.

    Raises:
        ValueError: as of ``spark::step``.
    """
    return reference.step_partial(*reference.checked(
        query, new_key, new_value, key_pages, key_head, value_pages, value_head, attn_mask, sinks,
        causal_offset, keep, position, spec,
    ))  # fmt: skip


def _fake_build_own(key, value, queries, spec, place):  # type: ignore[no-untyped-def]
    parsed = parse_spec(spec)
    own = Spread(place[0], place[1], parsed.window).own(key.shape[2])
    return empty_cache(key, value, parsed, own)


@operator_of(
    "(Tensor key, Tensor value, Tensor[] queries, str spec, int[] place) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake_build_own,
)
def build_own(
    key: Tensor, value: Tensor, queries: list[Tensor], spec: str, place: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``spark::build`` of a rank's own tokens in a growing cache.

    Args:
        key: [B, Hkv, S, D], all tokens.
        value: [B, Hkv, S, Dv].
        queries: [B, Hq, L, D] of every attention that reads this cache.
        spec: what to store and when to pack it.
        place: number of ranks, and which one this is.

    Returns:
        ``pages`` and ``head`` of the keys, then of the values.

    Raises:
        ValueError: as of ``spark::build``.
    """
    spread = Spread(place[0], place[1], parse_spec(spec).window)
    own = (spread.taken(rows, 0) for rows in (key, value))
    built: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.spark.build(*own, queries, spec, None)
    return built


def _fake_step_own(query, new_key, new_value, *_args):  # type: ignore[no-untyped-def]
    return query.new_empty((*query.shape[:3], new_value.shape[3] + 1), dtype=torch.float32)


@operator_of(
    "(Tensor query, Tensor new_key, Tensor new_value, Tensor(a!) key_pages, Tensor(b!) key_head, "
    "Tensor(c!) value_pages, Tensor(d!) value_head, Tensor? attn_mask, Tensor? sinks, "
    "SymInt? causal_offset, bool appends, SymInt tokens, int[] place, str spec) -> Tensor",
    _fake_step_own,
)
def step_own(
    query: Tensor, new_key: Tensor, new_value: Tensor, key_pages: Tensor, key_head: Tensor,
    value_pages: Tensor, value_head: Tensor, attn_mask: Tensor | None, sinks: Tensor | None,
    causal_offset: int | None, appends: bool, tokens: int, place: list[int], spec: str,
) -> Tensor:  # fmt: skip
    """Attend over a rank's own cached and new tokens, append those that are new.

    Args:
        query: [B, Hq, L', D].
        new_key: [B, Hkv, L, D], all new tokens, like everything here that is not stored.
        new_value: [B, Hkv, L, Dv].
        key_pages, key_head, value_pages, value_head: of the rank's own tokens, changed in place.
        attn_mask: broadcast to [B, Hq, L', S + L], bool (True: visible) or additive.
        sinks: [Hq], a logit per head that takes part in the softmax and has no value; counted by
            the first rank alone.
        causal_offset: query i sees tokens j <= i + causal_offset; None sees all.
        appends: False where another attention of this step will.
        tokens: S, of the context before the step.
        place: number of ranks, and which one this is.
        spec: what is stored, when it is packed, and the scale and softcap of the attention.

    Returns:
        [B, Hq, L', Dv + 1] float32: the output over these tokens, and its log-sum-exp.

    Raises:
        ValueError: as of ``spark::step``.
    """
    spread = Spread(place[0], place[1], parse_spec(spec).window)
    own = [spread.taken(rows, tokens) for rows in (new_key, new_value)]
    mask, offset = spread.seen(
        attn_mask, causal_offset, query.shape[2], tokens + new_key.shape[2], query.device
    )
    output, lse = torch.ops.spark.step_partial(
        query, *own, key_pages, key_head, value_pages, value_head, mask,
        sinks if spread.rank == 0 else None, offset, ALL if appends else None, None, spec,
    )  # fmt: skip
    return torch.cat((output.float(), lse.unsqueeze(3)), dim=3)
