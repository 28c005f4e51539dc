"""The reference for stored values against direct formulas."""

from __future__ import annotations

import pytest
import torch

from spark_compile.kernels.reference.prune import prune, quantize, recover
from spark_compile.kernels.reference.values import pack_values, unpack_values, value_bias


def test_the_bias_ranks_channels_as_the_authors_score_does() -> None:
    value = torch.randn(2, 3, 17, 10) * torch.linspace(0.2, 3, 10)
    diversity = (value.var(2, keepdim=True) + value.var(3, keepdim=True)) / 2
    largest = diversity.amax((-1, -2), keepdim=True)
    score = 0.7 * value.abs() + 0.3 * diversity / (largest + 1e-8)
    ours = value.abs() + value_bias(value).unsqueeze(2)
    assert torch.equal(ours.topk(4).indices, score.topk(4).indices)


def test_one_token_has_no_bias() -> None:
    assert torch.equal(value_bias(torch.randn(1, 2, 1, 8)), torch.zeros(1, 2, 8))


@pytest.mark.parametrize("quantized", [False, True])
def test_pruned_channels_get_their_mean(quantized: bool) -> None:
    value = torch.tensor([4.0, -1.0, 0.5, -3.0, 1.0, 0.25]).view(1, 1, 1, 6)
    rows, bits, scale = pack_values(value, torch.zeros(1, 1, 6), 2, quantized)
    assert bits.item() == 0b1001
    assert rows.dtype == (torch.int8 if quantized else torch.float32)
    dense = unpack_values(rows, bits, scale, 6).flatten()
    fill = (-1.0 + 0.5 + 1.0 + 0.25) / 4
    expected = torch.tensor([4.0, fill, fill, -3.0, fill, fill])
    torch.testing.assert_close(dense, expected, atol=4 / 254 if quantized else 0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_within_half_a_step(dtype: torch.dtype) -> None:
    rows = (torch.randn(5, 33) * torch.logspace(-3, 3, 5).unsqueeze(1)).to(dtype)
    rows[2] = 0
    levels, step = quantize(rows)
    assert levels.dtype == torch.int8
    assert step.dtype == dtype
    error = (levels.float() * step.float() - rows.float()).abs()
    # The largest of a row may lie beyond 127 rounded steps.
    rounding = torch.finfo(dtype).eps * 127
    assert (error <= step.float() * (0.5 + rounding) + 1e-12).all()
    assert torch.equal(levels[2], torch.zeros(33, dtype=torch.int8))


def test_int8_keys_recover_like_whole_ones() -> None:
    key, norms = torch.randn(2, 3, 9, 20), torch.rand(2, 3, 20) + 0.1
    whole = prune(key, norms, norms, 7, "gaussian", "squared")
    small = prune(key, norms, norms, 7, "gaussian", "squared", quantized=True)
    assert small[0].dtype == torch.int8
    assert torch.equal(small[1], whole[1])
    assert torch.equal(small[2][..., :2], whole[2])
    dense, quantized = (recover(*s, norms, "gaussian", "squared") for s in (whole, small))
    assert ((dense - quantized).abs() <= small[2][..., 2:] * 0.51).all()
