"""The two recoveries that draw pruned saliencies: fixed draws with the stored moments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spark_compile.kernels.layout import unpack_bits
from spark_compile.kernels.reference.prune import prune, recover

DRAWN = ("exponential", "gaussian")
SALIENCIES = ("squared", "absolute")
KEPT = 32


def drawn_saliency(key: Tensor, norms: Tensor, recovery: str, saliency: str) -> list[Tensor]:
    """Saliencies of the pruned channels [B, H, S, D - T], drawn and true."""
    stored = prune(key, norms, norms, KEPT, recovery, saliency)
    recovered = recover(*stored, norms, recovery, saliency)
    pruned = ~unpack_bits(stored[1], key.shape[3])[..., 0, :]
    power = 2 if saliency == "squared" else 1
    both = (values.abs() ** power * norms.unsqueeze(2) for values in (recovered, key))
    return [salient[pruned].view(*key.shape[:3], -1) for salient in both]


@pytest.mark.parametrize("recovery", DRAWN)
def test_the_same_key_is_recovered_the_same_in_every_batch_entry_and_step(recovery: str) -> None:
    key, norms = torch.randn(1, 2, 9, 16), torch.rand(1, 2, 16) + 0.1
    key_2, norms_2 = key.repeat(2, 1, 1, 1), norms.repeat(2, 1, 1)
    stored = prune(key_2, norms_2, norms_2, 5, recovery, "squared")
    first = recover(*stored, norms_2, recovery, "squared")
    torch.manual_seed(1)
    assert torch.equal(first, recover(*stored, norms_2, recovery, "squared"))
    assert torch.equal(first[0], first[1])
    shorter = recover(*(t[:, :, :4] for t in stored), norms_2, recovery, "squared")
    assert torch.equal(shorter, first[:, :, :4])


@pytest.mark.parametrize("recovery", DRAWN)
def test_heads_tokens_and_channels_have_draws_of_their_own(recovery: str) -> None:
    # Saliencies that differ, or the spread of "gaussian" would be zero.
    key = torch.linspace(1, 2, 16).expand(1, 2, 3, 16)
    norms = torch.ones(1, 2, 16)
    recovered = recover(*prune(key, norms, norms, 1, recovery, "squared"), norms, recovery,
                        "squared")  # fmt: skip
    drawn = recovered[..., :15].flatten()
    assert drawn.unique().numel() > 0.9 * drawn.numel()


@pytest.mark.parametrize("saliency", SALIENCIES)
@pytest.mark.parametrize("recovery", DRAWN)
def test_drawn_saliencies_have_the_stored_mean(recovery: str, saliency: str) -> None:
    key, norms = torch.rand(1, 2, 200, 64) + 0.5, torch.rand(1, 2, 64) + 0.5
    drawn, true = drawn_saliency(key, norms, recovery, saliency)
    assert not torch.equal(drawn, true)
    torch.testing.assert_close(drawn.mean(), true.mean(), rtol=0.03, atol=0)


@pytest.mark.parametrize("saliency", SALIENCIES)
def test_gaussian_draws_have_the_stored_spread_and_exponential_ones_that_of_their_law(
    saliency: str,
) -> None:
    key, norms = torch.rand(1, 2, 200, 64) + 0.5, torch.rand(1, 2, 64) + 0.5
    drawn, true = drawn_saliency(key, norms, "gaussian", saliency)
    spread = true.var(-1, correction=0).mean()
    torch.testing.assert_close(drawn.var(-1, correction=0).mean(), spread, rtol=0.1, atol=0)
    drawn, true = drawn_saliency(key, norms, "exponential", saliency)
    law = true.mean(-1).square().mean()  # an exponential variable's variance is its mean squared
    torch.testing.assert_close(drawn.var(-1, correction=0).mean(), law, rtol=0.1, atol=0)
