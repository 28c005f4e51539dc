"""Pruned values against direct formulas."""

from __future__ import annotations

import pytest
import torch
from coding import decoded, encoded

from spark_compile.kernels.formats import Pruned


def bias_of(value: torch.Tensor) -> torch.Tensor:
    return Pruned(value.shape[3], value.dtype, 1).constants(value, None)["bias"]


def test_the_bias_ranks_channels_as_the_authors_score_does() -> None:
    value = torch.randn(2, 3, 17, 10) * torch.linspace(0.2, 3, 10)
    diversity = (value.var(2, keepdim=True) + value.var(3, keepdim=True)) / 2
    largest = diversity.amax((-1, -2), keepdim=True)
    score = 0.7 * value.abs() + 0.3 * diversity / (largest + 1e-8)
    ours = value.abs() + bias_of(value).unsqueeze(2)
    assert torch.equal(ours.topk(4).indices, score.topk(4).indices)


def test_one_token_has_no_bias() -> None:
    assert torch.equal(bias_of(torch.randn(1, 2, 1, 8)), torch.zeros(1, 2, 8))


@pytest.mark.parametrize("form", ["model", "int8"])
def test_the_bias_chooses_the_channels(form: str) -> None:
    value, format = torch.randn(2, 3, 9, 10), Pruned(10, torch.float32, 4, form)
    constants = {"bias": torch.rand(2, 3, 10) * 3}
    back = decoded(format, encoded(format, value, None, constants), constants)
    best = (value.abs() + constants["bias"].unsqueeze(2)).topk(4).indices
    keep = torch.zeros_like(value, dtype=torch.bool).scatter(-1, best, True)
    step = value.abs().amax() / 127
    assert ((back - value)[keep].abs() <= (step if form == "int8" else 0)).all()
    fill = value.masked_fill(keep, 0).sum(-1, keepdim=True) / 6
    torch.testing.assert_close(back[~keep], fill.expand_as(value)[~keep])


@pytest.mark.parametrize("form", ["model", "int8"])
def test_pruned_channels_get_their_mean(form: str) -> None:
    value = torch.tensor([4.0, -1.0, 0.5, -3.0, 1.0, 0.25]).view(1, 1, 1, 6)
    format, constants = Pruned(6, torch.float32, 2, form), {"bias": torch.zeros(1, 1, 6)}
    stored = encoded(format, value, None, constants)
    assert stored["keep"].item() == 0b1001
    assert stored["channels"].dtype == (torch.int8 if form == "int8" else torch.float32)
    fill = (-1.0 + 0.5 + 1.0 + 0.25) / 4
    expected = torch.tensor([4.0, fill, fill, -3.0, fill, fill])
    dense = decoded(format, stored, constants).flatten()
    torch.testing.assert_close(dense, expected, atol=4 / 254 if form == "int8" else 0, rtol=0)


def test_keeping_every_channel_is_exact() -> None:
    value, format = torch.randn(2, 3, 9, 10), Pruned(10, torch.float32, 10)
    constants = format.constants(value, None)
    assert torch.equal(decoded(format, encoded(format, value, None, constants), constants), value)
