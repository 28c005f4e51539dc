"""Pruned keys against the formulas, one token and channel at a time."""

from __future__ import annotations

import math

import pytest
import torch
from coding import decoded, encoded
from torch import Tensor

from spark_compile.kernels.formats import Spark, kept_channels
from spark_compile.kernels.formats.selection import unpack_bits
from spark_compile.kernels.formats.spark import floored

SALIENCIES = ("squared", "absolute")
RECOVERIES = ("degenerate", "none", "exponential", "gaussian")


def saliency_of(key: float, norm: float, saliency: str) -> float:
    return key * key * norm if saliency == "squared" else abs(key) * norm


def naive_token(
    key: list[float], norms: list[float], kept: int, recovery: str, saliency: str
) -> list[float]:
    """One recovered key, as the method's text has it."""
    salient = [saliency_of(k, n, saliency) for k, n in zip(key, norms, strict=True)]
    order = sorted(range(len(key)), key=lambda j: -salient[j])
    pruned = order[kept:]
    mean = sum(salient[j] for j in pruned) / max(len(pruned), 1)
    recovered = list(key)
    for j in pruned:
        size = math.sqrt(mean / norms[j]) if saliency == "squared" else mean / norms[j]
        recovered[j] = 0.0 if recovery == "none" else math.copysign(size, key[j])
    return recovered


def random_norms(*shape: int) -> Tensor:
    return torch.rand(shape) + 0.1


def round_trip(key: Tensor, norms: Tensor, kept: int, recovery: str, saliency: str) -> Tensor:
    format = Spark(key.shape[3], key.dtype, kept, "model", recovery, saliency)
    return decoded(format, encoded(format, key, norms), {"norms": norms})


@pytest.mark.parametrize("saliency", SALIENCIES)
@pytest.mark.parametrize("recovery", ["degenerate", "none"])
@pytest.mark.parametrize(("head_dim", "ratio"), [(8, 0.5), (13, 0.8), (64, 0.3), (5, 0.0)])
def test_prune_and_recover_follow_the_formulas(
    head_dim: int, ratio: float, recovery: str, saliency: str
) -> None:
    key, norms = torch.randn(2, 3, 5, head_dim), random_norms(2, 3, head_dim)
    kept = kept_channels(head_dim, ratio)
    recovered = round_trip(key, norms, kept, recovery, saliency)
    for b, h, s in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)):
        expected = naive_token(
            key[b, h, s].tolist(), norms[b, h].tolist(), kept, recovery, saliency
        )
        torch.testing.assert_close(recovered[b, h, s], torch.tensor(expected))


@pytest.mark.parametrize("saliency", SALIENCIES)
def test_selecting_and_recovering_norms_may_differ(saliency: str) -> None:
    key, select, norms = torch.randn(9), random_norms(9), random_norms(9)
    format = Spark(9, torch.float32, 4, saliency=saliency)
    constants = {"norms": norms.view(1, 1, 9)}
    stored = encoded(format, key.view(1, 1, 1, 9), select.view(1, 1, 9), constants)
    recovered = decoded(format, stored, constants).flatten()
    salient = [saliency_of(k, n, saliency) for k, n in zip(key.tolist(), select, strict=True)]
    keep = torch.tensor(salient).topk(4).indices.tolist()
    stored_keep = unpack_bits(stored["keep"], 9).flatten()
    assert stored_keep.nonzero().flatten().tolist() == sorted(keep)
    pruned = [j for j in range(9) if j not in keep]
    restored = [saliency_of(recovered[j], norms[j], saliency) for j in pruned]
    true = [saliency_of(key[j], norms[j], saliency) for j in pruned]
    torch.testing.assert_close(torch.stack(restored).mean(), torch.stack(true).mean())


@pytest.mark.parametrize("recovery", RECOVERIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ratio_zero_restores_every_bit(dtype: torch.dtype, recovery: str) -> None:
    key = torch.randn(2, 3, 6, 11, dtype=dtype)
    key[0, 0, 0, :3] = torch.tensor([-0.0, 0.0, torch.finfo(dtype).max])
    norms = torch.zeros(2, 3, 11)  # not even the norms may matter
    back = round_trip(key, norms, 11, recovery, "squared").to(dtype)
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(back.view(integers), key.view(integers))


@pytest.mark.parametrize("recovery", RECOVERIES)
@pytest.mark.parametrize("saliency", SALIENCIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_values_are_exact_and_signs_survive(
    dtype: torch.dtype, saliency: str, recovery: str
) -> None:
    key, norms = torch.randn(2, 2, 7, 16, dtype=dtype), random_norms(2, 2, 16)
    format = Spark(16, dtype, 6, "model", recovery, saliency)
    stored = encoded(format, key, norms)
    recovered = decoded(format, stored, {"norms": norms})
    keep = unpack_bits(stored["keep"], 16)
    assert (keep.sum(-1) == 6).all()
    assert torch.equal(recovered[keep], key.float()[keep])
    assert torch.equal(stored["channels"].flatten(), key[keep])  # in channel order
    if recovery != "none":
        assert (recovered * key.float() >= 0).all()


@pytest.mark.parametrize("saliency", SALIENCIES)
def test_scores_need_one_scale_per_token(saliency: str) -> None:
    """q.k^ = sum over kept q_j k_j + scale * sum over pruned sign_j * q_j / n_j^p."""
    key, norms, query = torch.randn(40, 24), random_norms(24), torch.randn(24)
    norms_BHD = norms.view(1, 1, -1)
    format = Spark(24, torch.float32, 9, saliency=saliency)
    stored = encoded(format, key.view(1, 1, 40, 24), norms_BHD)
    recovered = decoded(format, stored, {"norms": norms_BHD})[0, 0]
    keep = unpack_bits(stored["keep"], 24)[0, 0]
    shared = query / (norms.sqrt() if saliency == "squared" else norms)
    scale = stored["amplitude"].flatten()
    signs = torch.where(key < 0, -1.0, 1.0).masked_fill(keep, 0)
    identity = (query * key.masked_fill(~keep, 0)).sum(-1) + scale * (signs @ shared)
    torch.testing.assert_close(recovered @ query, identity)


def test_channels_that_no_query_looks_at_stay_finite() -> None:
    key, norms = torch.randn(1, 1, 6, 8) * 100, torch.zeros(1, 1, 8)
    for saliency in SALIENCIES:
        assert round_trip(key, norms, 3, "degenerate", saliency).isfinite().all()
    norms[..., 2] = 1.0
    assert round_trip(key, norms, 3, "degenerate", "squared").isfinite().all()
    assert (floored(norms) > 0).all()


def test_int8_keys_recover_like_whole_ones() -> None:
    key, norms = torch.randn(2, 3, 9, 20), random_norms(2, 3, 20)
    formats = [Spark(20, torch.float32, 7, form, "gaussian") for form in ("model", "int8")]
    whole, small = (encoded(format, key, norms) for format in formats)
    assert small["channels"].dtype == torch.int8
    for name in ("keep", "negative", "amplitude"):
        assert torch.equal(small[name], whole[name])
    dense, quantized = (
        decoded(format, stored, {"norms": norms})
        for format, stored in zip(formats, (whole, small), strict=True)
    )
    assert ((dense - quantized).abs() <= small["step"] * 0.51).all()


def test_an_amplitude_that_overflows_is_the_largest_number() -> None:
    key = torch.full((1, 1, 1, 8), 6e4, dtype=torch.float16)
    norms = torch.full((1, 1, 8), 1e6)
    stored = encoded(Spark(8, torch.float16, 2), key, norms)
    assert stored["amplitude"].item() == torch.finfo(torch.float16).max
