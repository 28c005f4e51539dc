"""Formats on one long page: tokens [B, Hkv, S, D] in, fields [B, Hkv, S, width] out."""

from __future__ import annotations

from torch import Tensor

from spark_compile.kernels.formats import Format


def encoded(
    format: Format, rows: Tensor, norms: Tensor | None = None,
    constants: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The fields per token of dense tokens, by name."""
    constants = format.constants(rows, norms) if constants is None else constants
    stored = format.encode(rows.unsqueeze(2), norms, constants)
    return {name: field.squeeze(2) for name, field in stored.items()}


def decoded(
    format: Format, stored: dict[str, Tensor], constants: dict[str, Tensor], first: int = 0
) -> Tensor:
    """What fields per token are worth, [B, Hkv, S, D] float32."""
    pages = {name: field.unsqueeze(2) for name, field in stored.items()}
    return format.decode(pages, constants, first).squeeze(2)


def round_trip(format: Format, rows: Tensor, norms: Tensor | None = None) -> Tensor:
    """What dense tokens are worth once they are stored."""
    constants = format.constants(rows, norms)
    return decoded(format, encoded(format, rows, norms, constants), constants)
