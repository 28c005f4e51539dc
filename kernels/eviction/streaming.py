"""StreamingLLM (arXiv 2309.17453): the first tokens, which attention sinks into, and the latest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Prompt, Scorer, check_number


@dataclass(frozen=True)
class StreamingLLM(Scorer):
    """The later a token the more it is worth, but for the first ones."""

    n_sink: int = 4
    """First tokens that stay; padding is none of them."""

    NAME = "streamingllm"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "n_sink", 0)

    def score(self, prompt: Prompt) -> Tensor:
        count = (~prompt.padding).cumsum(-1)  # of the tokens up to each one
        return count.float().masked_fill(count <= self.n_sink, torch.inf)
