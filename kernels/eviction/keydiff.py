"""KeyDiff (arXiv 2504.15364): keys that differ from the others stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .base import Prompt, Scorer


@dataclass(frozen=True)
class KeyDiff(Scorer):
    """The cosine between a key and the mean of all normalized keys, negative."""

    NAME = "keydiff"

    def score(self, prompt: Prompt) -> Tensor:
        unit = F.normalize(prompt.key.float(), dim=-1)
        # A cosine does not see whether it is with the sum or with the mean.
        anchor = unit.masked_fill(prompt.padding.unsqueeze(-1), 0).sum(2, keepdim=True)
        return -F.cosine_similarity(unit, anchor, dim=-1)
