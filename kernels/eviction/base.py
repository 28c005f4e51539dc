"""What a scorer is: how much each token of a prompt is worth to a key head, in plain PyTorch.

A scorer is a frozen description with a text, as a format is one. Of a prompt of more tokens than
``tokens`` only as many stay per key head, when the prompt is stored: the first and the latest ones
that are dense, and of the others those with the largest scores (``kernels/reference/evict.py``).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..formats.base import read_text

HIDDEN = -1e4
"""An additive mask hides what it adds this or less to."""


@dataclass(frozen=True)
class Prompt:
    """What a scorer is given: N tokens, and the queries of the L latest of them."""

    key: Tensor
    """[B, Hkv, N, D]."""
    queries: list[Tensor]
    """[B, Hq, L, D] of every attention that reads the cache."""
    mask: Tensor | None
    """[B or 1, Hq or 1, L or 1, N], bool (True: visible) or additive."""
    causal_offset: int | None
    """Query i sees tokens j <= i + causal_offset; None sees all."""
    scale: float
    softcap: float

    @property
    def padding(self) -> Tensor:
        """Which tokens the latest query of no head of a group sees, bool [B, Hkv, N]."""
        shape = self.key.shape[:3]
        if self.mask is None:
            return self.key.new_zeros(shape, dtype=torch.bool)
        last = self.mask[:, :, -1]
        hidden = ~last if last.dtype == torch.bool else last <= HIDDEN
        if hidden.shape[1] > 1:
            hidden = hidden.unflatten(1, (shape[1], -1)).all(2)
        return hidden.expand(shape)

    def weights(self, query: Tensor, window: int) -> Tensor:
        """Softmax weights [B, Hkv, G, W, N] float32 of the last ``window`` queries of a tensor.

        A query that sees nothing has the weights 0.
        """
        kv_heads, tokens = self.key.shape[1:3]
        rows = min(window, query.shape[2])
        first = query.shape[2] - rows
        # The queries of a group as rows: no copy of the keys for each of them.
        grouped = (query[:, :, first:].float() * self.scale).unflatten(1, (kv_heads, -1))
        scores = grouped.flatten(2, 3) @ self.key.float().mT
        scores = scores.unflatten(2, (-1, rows))
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.causal_offset is not None:
            latest = torch.arange(first, query.shape[2], device=query.device) + self.causal_offset
            later = torch.arange(tokens, device=query.device) > latest.unsqueeze(1)
            scores.masked_fill_(later, -torch.inf)
        if self.mask is not None:
            mask = self.mask[:, :, -rows:]
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
            scores = (scores.flatten(1, 2) + mask).unflatten(1, (kv_heads, -1))
        sees_nothing = scores.amax(-1, keepdim=True).isneginf()
        weights: Tensor = scores.softmax(-1).masked_fill_(sees_nothing, 0)
        return weights


@dataclass(frozen=True)
class Scorer(ABC):
    """Which tokens of a prompt stay."""

    tokens: int
    """Tokens of a prompt that stay per key head, the dense ones included."""

    NAME: ClassVar[str]
    """The word for it in options, texts and reports."""
    KNOWN: ClassVar[dict[str, type[Scorer]]] = {}
    """Every scorer by its name."""
    BY_LAYER: ClassVar[bool] = False
    """Whether it has to know which layer it is in: :meth:`in_layer`."""

    def __init_subclass__(cls) -> None:
        Scorer.KNOWN[cls.NAME] = cls

    def __post_init__(self) -> None:
        check_number(self, "tokens", 1)

    @property
    def observed(self) -> int:
        """Latest tokens that stay whatever their score."""
        return 0

    def in_layer(self, layer: str) -> Scorer:
        """The scorer of the layer with a module path.

        Raises:
            ValueError: the path does not say which layer it is.
        """
        return self

    @abstractmethod
    def score(self, prompt: Prompt) -> Tensor:
        """What the tokens are worth, [B, Hkv, N] float32; the largest stay."""

    @property
    def text(self) -> str:
        """The scorer as :func:`parse_scorer` reads it."""
        own = dataclasses.fields(self)
        options = ",".join(f"{field.name}={getattr(self, field.name)}" for field in own)
        return f"{self.NAME}({options})"


def parse_scorer(text: str) -> Scorer:
    """The scorer that a text such as ``"snapkv(tokens=128,kernel=7)"`` describes.

    Raises:
        ValueError: the name or an option is unknown, an option is missing, or its value is not
            allowed.
    """
    kind, options = read_text(text, "scorer", Scorer.KNOWN)
    try:
        return kind(**options)
    except TypeError as error:
        raise ValueError(f"scorer {text!r}: {error}") from error


def check_number(scorer: Scorer, option: str, least: int, most: int = (1 << 31) - 1) -> None:
    """Raise ValueError unless an option of a scorer is an integer in a range."""
    value = getattr(scorer, option)
    if type(value) is not int or not least <= value <= most:
        raise ValueError(
            f"option {option!r} of scorer {scorer.NAME!r} is {value!r}: allowed is an integer from "
            f"{least} to {most}"
        )
