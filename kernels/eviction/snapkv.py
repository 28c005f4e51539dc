"""SnapKV (arXiv 2404.14469): what the latest queries of the prompt attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Prompt, Scorer, check_number

POOLINGS = ("average", "max")


@dataclass(frozen=True)
class SnapKV(Scorer):
    """The mean softmax weight of the last ``window`` queries, pooled over neighbours.

    Defaults are those of the authors' code.
    """

    window: int = 64
    """Latest queries that are observed; as many latest tokens always stay."""
    kernel: int = 5
    """Neighbouring tokens that a score is pooled over, odd."""
    pooling: str = "average"

    NAME = "snapkv"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "window", 1)
        check_number(self, "kernel", 1)
        if self.kernel % 2 == 0:
            raise ValueError(f"option 'kernel' of scorer {self.NAME!r} is {self.kernel}: allowed "
                             "is an odd number")  # fmt: skip
        if self.pooling not in POOLINGS:
            raise ValueError(f"option 'pooling' of scorer {self.NAME!r} is {self.pooling!r}: "
                             f"allowed is {' or '.join(POOLINGS)}")  # fmt: skip

    @property
    def observed(self) -> int:
        return self.window

    def score(self, prompt: Prompt) -> Tensor:
        # The observed tokens stay anyway: that they are attended to says nothing about others.
        before = max(prompt.key.shape[2] - self.window, 0)
        scores = [self._pooled(prompt.weights(query, self.window)[..., :before].mean(3))
                  for query in prompt.queries]  # fmt: skip
        mean = torch.stack([score.mean(2) for score in scores]).mean(0)
        return F.pad(mean, (0, prompt.key.shape[2] - before))

    def _pooled(self, weights: Tensor) -> Tensor:
        """Weights [B, Hkv, G, N] pooled over the tokens."""
        if not weights.numel():
            return weights
        pool = F.avg_pool1d if self.pooling == "average" else F.max_pool1d
        rows = weights.flatten(0, 1)  # [B * Hkv, G, N]
        return pool(rows, self.kernel, 1, self.kernel // 2).view_as(weights)
