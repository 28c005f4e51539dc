"""The channels that ThinK keeps."""

from __future__ import annotations

import torch
from coding import round_trip

from spark_compile.kernels.formats import Think


def test_the_channels_of_the_largest_scores_are_kept_of_all_tokens() -> None:
    rows, query = torch.randn(2, 3, 20, 9), torch.randn(2, 3, 5, 9)
    rows[..., 4] *= 10
    format, norms = Think(9, torch.float32, 4), query.square().sum(2).sqrt()
    worth = round_trip(format, rows, norms)
    for b in range(2):
        for h in range(3):
            scores = [query[b, h, :, j : j + 1] @ rows[b, h, :, j : j + 1].T for j in range(9)]
            weights = torch.stack([torch.linalg.matrix_norm(part) for part in scores])
            kept = weights.topk(4).indices
            expected = torch.zeros(20, 9)
            expected[:, kept] = rows[b, h][:, kept]
            assert torch.equal(worth[b, h], expected)
            assert 4 in kept


def test_it_saves_what_it_prunes() -> None:
    sizes = [field.nbytes for field in Think(128, torch.bfloat16, 64).fields()]
    assert sizes == [128, 128]  # per token, and once per head
