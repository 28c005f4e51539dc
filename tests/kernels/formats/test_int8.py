"""8 bits per channel with one step per token."""

from __future__ import annotations

import pytest
import torch
from coding import encoded, round_trip

from spark_compile.kernels.formats import Int8
from spark_compile.kernels.formats.int8 import dequantize, quantize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
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
    assert torch.equal(dequantize(levels, step), levels.float() * step.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_token_has_a_step_of_its_own(dtype: torch.dtype) -> None:
    format, rows = Int8(9, dtype), torch.randn(2, 3, 7, 9).to(dtype)
    rows[:, :, 3] *= 50
    stored = encoded(format, rows)
    largest = rows.float().abs().amax(-1, keepdim=True)
    assert torch.equal(stored["step"], (largest / 127).to(dtype))
    alone = round_trip(format, rows[:, :, 4:5])
    assert torch.equal(round_trip(format, rows)[:, :, 4:5], alone)
