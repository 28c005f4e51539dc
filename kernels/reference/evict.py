"""Which tokens of a prompt stay: the definition of ``spark::evict``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..eviction import Prompt
from ..spec import Spec


def kept_positions(
    key: Tensor, queries: list[Tensor], mask: Tensor | None, causal_offset: int | None, spec: Spec
) -> Tensor:
    """The positions of the tokens of a prompt that stay, see ``spark::evict``.

    The first ``spec.sinks`` ones, whole pages of those with the largest scores, and the latest
    ones, which stay dense. Of equal scores the first ones stay.
    """
    tokens, scorer = key.shape[2], spec.evict
    stay = int(spec.stored_tokens(tokens))
    everything = torch.arange(tokens, device=key.device).expand(*key.shape[:2], -1)
    if scorer is None or stay == tokens:
        return everything.contiguous()
    mask = _columns(mask, tokens)
    prompt = Prompt(key, queries, mask, causal_offset, spec.scale, spec.softcap)
    score = scorer.score(prompt).clone()
    score[:, :, tokens - scorer.observed :] = torch.inf
    score = score.masked_fill(prompt.padding, -torch.inf)
    first, last = spec.sinks, tokens - (stay - spec.chosen_end)
    best = score[:, :, first:last].sort(dim=2, descending=True, stable=True).indices
    chosen = best[:, :, : spec.chosen_end - first].sort(dim=2).values + first
    return torch.cat((everything[:, :, :first], chosen, everything[:, :, last:]), dim=2)


def take(rows: Tensor, positions: Tensor) -> Tensor:
    """The rows [B, Hkv, N', D] at positions [B, Hkv, N'] of rows [B, Hkv, N, D]."""
    return rows.gather(2, positions.unsqueeze(3).expand(-1, -1, -1, rows.shape[3]))


def evicted_before(positions: Tensor, stored: int, spec: Spec) -> int:
    """How many tokens of a prompt were evicted, by the positions [B, Hkv, N'] of those that stay.

    Args:
        stored: tokens that are in the cache already.

    Raises:
        ValueError: they are not positions that :func:`kept_positions` gives.
    """
    count, sinks = positions.shape[2], spec.sinks
    rows = positions.flatten(0, 1)
    total = int(rows[0, -1]) + 1 if rows.numel() else 0
    dense = torch.arange(total - max(count - spec.chosen_end, 0), total, device=rows.device)
    first = torch.arange(min(sinks, count), device=rows.device)
    are_known = (
        spec.evict is not None
        and stored == 0
        and spec.stored_tokens(total) == count
        and bool((rows.diff(dim=1) > 0).all())
        and bool((rows[:, : len(first)] == first).all())
        and bool((rows[:, count - len(dense) :] == dense).all())
    )
    if rows.numel() and not are_known:
        raise ValueError(
            f"positions of {count} tokens after {stored} ones are {rows[0, :8].tolist()}...: "
            "allowed are those of spark::evict, in an empty cache of the same spec"
        )
    return max(total - count, 0)


def _columns(mask: Tensor | None, tokens: int) -> Tensor | None:
    """A mask with four dimensions and a column for each token."""
    if mask is None:
        return None
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    return mask[..., :tokens].expand(*mask.shape[:3], tokens)
