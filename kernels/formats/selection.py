"""Keeping some of the channels of each token: choosing, packing and putting them back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import Format


def kept_channels(head_dim: int, ratio: float) -> int:
    """T = D - floor(ratio * D), the number of channels kept per token."""
    # The addend undoes the rounding of products such as 0.29 * 100 = 28.999999999999996; it must
    # not prune the last channel of a ratio just below 1.
    return max(1, head_dim - math.floor(ratio * head_dim + 1e-9))


def check_kept(format: Format, kept: int) -> None:
    """Raise ValueError unless a format keeps at least one channel and no more than there are."""
    if not isinstance(kept, int) or not 1 <= kept <= format.head_dim:
        raise ValueError(
            f"option 'kept' of format {format.NAME!r} is {kept!r}: allowed is 1 to "
            f"{format.head_dim}"
        )


def select(rows: Tensor, salient: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` most salient channels of each row in channel order, and where they are.

    Args:
        rows: [..., D].
        salient: [..., D]; of equally salient channels the first are chosen.

    Returns:
        The channels [..., count] and a mask [..., D], True where a channel was chosen.
    """
    ranked = salient.sort(dim=-1, descending=True, stable=True).indices
    chosen = ranked[..., :count].sort(dim=-1).values
    keep = torch.zeros_like(rows, dtype=torch.bool).scatter(-1, chosen, True)
    return rows.gather(-1, chosen), keep


def check_marked(format: Format, keep: Tensor, kept: int) -> None:
    """Raise ValueError unless each mask of packed tokens, uint8 [..., bytes], has ``kept`` bits.

    Those of a plane of D channels; where it has more, kernels differ in what they repeat.
    """
    marked = unpack_bits(keep, 8 * keep.shape[-1]).sum(-1)
    wrong = marked[marked != kept]
    if wrong.numel():
        raise ValueError(
            f"mask 'keep' of format {format.NAME!r} marks {int(wrong[0])} channels: allowed is "
            f"{kept}"
        )


def expand(channels: Tensor, keep: Tensor) -> Tensor:
    """Put chosen channels [..., T] where ``keep`` [..., D] has them; other entries are arbitrary.

    More channels marked than stored, as in a damaged file, repeat the last one.
    """
    rank = (keep.long().cumsum(-1) - 1).clamp(min=0, max=channels.shape[-1] - 1)
    return channels.gather(-1, rank)


def plane_bytes(head_dim: int) -> int:
    """Bytes of one bit plane of D channels."""
    return (head_dim + 7) // 8


def pack_bits(flags: Tensor) -> Tensor:
    """Pack bool [..., D] into uint8 [..., ceil(D / 8)], lowest channel in the lowest bit."""
    padding = -flags.shape[-1] % 8
    flags_8 = torch.nn.functional.pad(flags, (0, padding)).unflatten(-1, (-1, 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flags.device)
    packed: Tensor = (flags_8 * weights).sum(-1, dtype=torch.uint8)
    return packed


def unpack_bits(packed: Tensor, head_dim: int) -> Tensor:
    """Undo :func:`pack_bits`: uint8 [..., ceil(D / 8)] to bool [..., D]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    flags = (packed.unsqueeze(-1) >> shifts) & 1
    return flags.flatten(-2)[..., :head_dim].bool()
