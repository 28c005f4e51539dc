"""Tokens as the model has them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Field, Format, Stored


@dataclass(frozen=True)
class Dense(Format):
    """Every channel in the model's dtype: exact."""

    NAME = "dense"

    def fields(self) -> tuple[Field, ...]:
        return (Field("rows", self.dtype, self.head_dim),)

    def encode(self, rows: Tensor, norms: Tensor | None, constants: Stored) -> dict[str, Tensor]:
        return {"rows": rows}

    def decode(self, stored: Stored, constants: Stored, first: int = 0) -> Tensor:
        return stored["rows"].float()
