"""Knorm (arXiv 2406.11430): keys of a small L2 norm are those that are attended to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Prompt, Scorer


@dataclass(frozen=True)
class Knorm(Scorer):
    """The norm of the key, negative."""

    NAME = "knorm"

    def score(self, prompt: Prompt) -> Tensor:
        norm: Tensor = prompt.key.float().norm(dim=-1)
        return -norm
