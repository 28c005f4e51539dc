"""The format that stores tokens as they are."""

from __future__ import annotations

import pytest
import torch
from coding import encoded, round_trip

from spark_compile.kernels.formats import Dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_bit_comes_back(dtype: torch.dtype) -> None:
    rows = torch.randn(2, 3, 6, 11, dtype=dtype)
    rows[0, 0, 0, :4] = torch.tensor([-0.0, 0.0, torch.finfo(dtype).max, torch.inf])
    back = round_trip(Dense(11, dtype), rows).to(dtype)
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(back.view(integers), rows.view(integers))
    assert torch.equal(encoded(Dense(11, dtype), rows)["rows"], rows)
