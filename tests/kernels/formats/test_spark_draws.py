"""The two recoveries that draw pruned saliencies: fixed draws with the stored moments."""

from __future__ import annotations

import pytest
import torch
from coding import decoded, encoded, round_trip
from torch import Tensor

from spark_compile.kernels.formats import Spark
from spark_compile.kernels.formats.selection import unpack_bits

DRAWN = ("exponential", "gaussian")
SALIENCIES = ("squared", "absolute")
KEPT = 32


def drawn_saliency(key: Tensor, norms: Tensor, recovery: str, saliency: str) -> list[Tensor]:
    """Saliencies of the pruned channels [B, H, S, D - T], drawn and true."""
    format = Spark(key.shape[3], key.dtype, KEPT, "model", recovery, saliency)
    stored = encoded(format, key, norms)
    recovered = decoded(format, stored, {"norms": norms})
    pruned = ~unpack_bits(stored["keep"], key.shape[3])
    power = 2 if saliency == "squared" else 1
    both = (values.abs() ** power * norms.unsqueeze(2) for values in (recovered, key))
    return [salient[pruned].view(*key.shape[:3], -1) for salient in both]


@pytest.mark.parametrize("recovery", DRAWN)
def test_the_same_key_is_recovered_the_same_in_every_batch_entry_and_step(recovery: str) -> None:
    key, norms = torch.randn(1, 2, 9, 16), torch.rand(1, 2, 16) + 0.1
    key_2, norms_2 = key.repeat(2, 1, 1, 1), norms.repeat(2, 1, 1)
    format, constants = Spark(16, torch.float32, 5, "model", recovery), {"norms": norms_2}
    stored = encoded(format, key_2, norms_2)
    first = decoded(format, stored, constants)
    torch.manual_seed(1)
    assert torch.equal(first, decoded(format, stored, constants))
    assert torch.equal(first[0], first[1])
    shorter = {name: field[:, :, :4] for name, field in stored.items()}
    assert torch.equal(decoded(format, shorter, constants), first[:, :, :4])
    later = {name: field[:, :, 4:] for name, field in stored.items()}
    assert torch.equal(decoded(format, later, constants, 4), first[:, :, 4:])
    assert not torch.equal(decoded(format, later, constants), first[:, :, 4:])


@pytest.mark.parametrize("recovery", DRAWN)
def test_heads_tokens_and_channels_have_draws_of_their_own(recovery: str) -> None:
    # Saliencies that differ, or the spread of "gaussian" would be zero.
    key = torch.linspace(1, 2, 16).expand(1, 2, 3, 16)
    norms = torch.ones(1, 2, 16)
    recovered = round_trip(Spark(16, torch.float32, 1, "model", recovery), key, norms)
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
