"""SparK-g: tokens of a page share the room for kept channels."""

from __future__ import annotations

import pytest
import torch

from spark_compile.kernels.formats import SparkG
from spark_compile.kernels.formats.selection import unpack_bits


def page(channels: int = 20, tokens: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages of tokens [1, 2, 3, P, D] of which some have few large channels, and norms."""
    torch.manual_seed(0)
    rows = torch.randn(1, 2, 3, tokens, channels)
    rows[..., ::2, 3:] *= 0.05
    return rows, torch.rand(1, 2, channels) + 0.1


@pytest.mark.parametrize("counts", ["groups", "all"])
@pytest.mark.parametrize("kept", [1, 4, 10])
def test_the_largest_share_that_fits_is_kept(counts: str, kept: int) -> None:
    rows, norms = page()
    format = SparkG(20, rows.dtype, kept, counts)
    constants = format.constants(rows.flatten(2, 3), norms)
    stored = format.encode(rows, norms, constants)
    keep = unpack_bits(stored["keep"], 20)
    allowed = format.allowed()
    number = keep.sum(-1)
    assert set(number.flatten().tolist()) <= set(allowed)
    assert (number.sum(-1) <= 8 * kept).all()
    saliency = rows.square() * norms[:, :, None, None]
    ranked = saliency.sort(dim=-1, descending=True).values
    held = ranked.cumsum(-1) / ranked.sum(-1, keepdim=True)
    for at in [(0, h, n) for h in range(2) for n in range(3)]:
        # Every token keeps its most salient channels, and the least number that holds p.
        threshold = held[at].gather(-1, number[at].unsqueeze(-1) - 1).min()
        least = [
            next(n for n in allowed if held[at][t, n - 1] >= threshold - 1e-6 or n == allowed[-1])
            for t in range(8)
        ]
        assert number[at].tolist() == least
        # A larger share would not fit.
        larger = [
            next((n for n in allowed if held[at][t, n - 1] > threshold + 1e-6), allowed[-1])
            for t in range(8)
        ]
        assert sum(larger) > 8 * kept or larger == least
    worth = format.decode(stored, constants)
    assert torch.equal(worth[keep], rows[keep])
    assert torch.equal(worth[~keep] < 0, rows[~keep] < 0)


def test_tokens_with_few_large_channels_keep_fewer() -> None:
    rows, norms = page()
    format = SparkG(20, rows.dtype, 6)
    stored = format.encode(rows, norms, format.constants(rows.flatten(2, 3), norms))
    number = unpack_bits(stored["keep"], 20).sum(-1)
    assert number[..., ::2].float().mean() < number[..., 1::2].float().mean() - 1


def test_pages_of_equal_or_bad_tokens_fit_too() -> None:
    format, norms = SparkG(20, torch.float32, 6), torch.ones(1, 1, 20)
    for rows in (torch.ones(1, 1, 2, 8, 20), torch.zeros(1, 1, 2, 8, 20)):
        stored = format.encode(rows, norms, {"norms": norms.bfloat16()})
        assert (unpack_bits(stored["keep"], 20).sum((-1, -2)) <= 48).all()
    rows[0, 0, 0, 3] = float("nan")
    stored = format.encode(rows, norms, {"norms": norms.bfloat16()})
    assert (unpack_bits(stored["keep"], 20).sum((-1, -2)) <= 48).all()
