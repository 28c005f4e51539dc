"""Tokens quantized to 8 bits, symmetrically, with one step per token and head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Field, Format, Stored


@dataclass(frozen=True)
class Int8(Format):
    """Every channel as int8 in units of the token's step."""

    NAME = "int8"

    def fields(self) -> tuple[Field, ...]:
        return Field("step", self.dtype, 1), Field("levels", torch.int8, self.head_dim)

    def encode(self, rows: Tensor, norms: Tensor | None, constants: Stored) -> dict[str, Tensor]:
        levels, step = quantize(rows)
        return {"step": step, "levels": levels}

    def decode(self, stored: Stored, constants: Stored, first: int = 0) -> Tensor:
        return dequantize(stored["levels"], stored["step"])


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 levels [..., T] and their step [..., 1] in the rows' dtype: rows = levels * step."""
    step = (rows.float().abs().amax(-1, keepdim=True) / 127).to(rows.dtype)
    # Divided by the rounded step: its rounding is no error. A row of zeros has the step 0.
    levels = rows.float() / step.float().where(step > 0, 1.0)
    return levels.round().clamp(-127, 127).to(torch.int8), step


def dequantize(levels: Tensor, step: Tensor) -> Tensor:
    """Undo :func:`quantize`, in float32."""
    return levels.float() * step.float()
