"""SparK's pruned keys with few bits per kept channel."""

from __future__ import annotations

import pytest
import torch
from coding import encoded, round_trip
from hypothesis import given
from hypothesis import strategies as st

from spark_compile.kernels.formats import Spark, SparkTight
from spark_compile.kernels.formats.selection import unpack_bits


@given(
    channels=st.integers(1, 70), share=st.floats(0, 1), bits=st.sampled_from([4, 5, 6, 8]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_it_is_spark_with_kept_channels_within_half_a_step(
    channels: int, share: float, bits: int, seed: int
) -> None:
    torch.manual_seed(seed)
    kept = max(1, round(share * channels))
    rows = torch.randn(1, 2, 6, channels)
    norms = (torch.rand(1, 2, channels) + 0.1).bfloat16().float()
    tight, spark = SparkTight(channels, rows.dtype, kept, bits), Spark(channels, rows.dtype, kept)
    constants = tight.constants(rows, norms)
    stored = encoded(tight, rows, norms, constants)
    worth, expected = round_trip(tight, rows, norms), round_trip(spark, rows, norms)
    keep = unpack_bits(encoded(spark, rows, norms)["keep"], channels)
    assert torch.equal(tight._found(stored["where"].unsqueeze(2)).squeeze(2), keep)
    torch.testing.assert_close(worth[~keep], expected[~keep])
    error = (worth - rows).abs() * constants["factor"].float().unsqueeze(2)
    # Levels are two steps apart.
    assert (error[keep] <= (stored["step"] * 1.001 + 1e-6).expand_as(error)[keep]).all()


@pytest.mark.parametrize(
    ("channels", "kept", "where"),
    [(64, 13, 8), (128, 26, 16), (128, 13, 12), (256, 26, 26), (256, 51, 32)],
)
def test_where_the_kept_channels_are_takes_the_shorter_form(
    channels: int, kept: int, where: int
) -> None:
    fields = {f.name: f.nbytes for f in SparkTight(channels, torch.bfloat16, kept).fields()}
    assert fields["where"] == where
    assert fields["negative"] == (channels - kept + 7) // 8
    assert fields["codes"] == (kept + 1) // 2
