"""What a format is: the fields in which tokens of one key head are stored, and plain PyTorch.

A format is a frozen description. It declares its fields; offsets in a page, bytes, saving, growth,
cropping and selecting batch entries are derived from them in :mod:`..layout`. Its methods define
what is stored and what it is worth; a native kernel for the format is tested against them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

KindT = TypeVar("KindT")
Stored = Mapping[str, Tensor]
"""Tensors by the name of their field."""


@dataclass(frozen=True)
class Field:
    """One thing that a format stores: ``width`` entries of a dtype."""

    name: str
    dtype: torch.dtype
    width: int
    per: Literal["token", "page", "head"] = "token"
    """Once for each token of a page, for each page, or for each head (then it is a constant)."""

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * self.width


@dataclass(frozen=True)
class Format(ABC):
    """How the tokens of one side, keys or values, are stored.

    Shapes of what the methods take and return, with N pages of P tokens:

    - rows [B, Hkv, N, P, D]: dense tokens; float32 where a method returns them;
    - a field per token [B, Hkv, N, P, width], per page [B, Hkv, N, width], per head
      [B, Hkv, width].
    """

    head_dim: int
    """D, channels of a dense token."""
    dtype: torch.dtype
    """Of a dense token."""

    NAME: ClassVar[str]
    """The word for it in options, texts and reports."""
    EACH_QUERY: ClassVar[bool] = False
    """Whether the query norms are over all queries of a group, not over their mean."""
    KNOWN: ClassVar[dict[str, type[Format]]] = {}
    """Every format by its name."""

    def __init_subclass__(cls) -> None:
        Format.KNOWN[cls.NAME] = cls

    @property
    def uses_queries(self) -> bool:
        """Whether it wants the query norms; then statistics of the queries are kept."""
        return False

    @abstractmethod
    def fields(self) -> tuple[Field, ...]:
        """What is stored, in the order in which it lies in a page or the head."""

    @abstractmethod
    def encode(self, rows: Tensor, norms: Tensor | None, constants: Stored) -> dict[str, Tensor]:
        """The fields per token and per page of whole pages.

        Args:
            rows: [B, Hkv, N, P, D].
            norms: [B, Hkv, D] float32, norms of the latest queries per channel; None unless
                ``uses_queries``.
            constants: the fields per head.
        """

    @abstractmethod
    def decode(self, stored: Stored, constants: Stored, first: int = 0) -> Tensor:
        """What stored pages are worth, [B, Hkv, N, P, D] float32.

        Args:
            stored: the fields per token and per page.
            constants: the fields per head.
            first: number of tokens that were packed before these.
        """

    def constants(self, rows: Tensor, norms: Tensor | None) -> dict[str, Tensor]:
        """The fields per head, fixed when the first page is packed.

        Args:
            rows: [B, Hkv, S, D], all tokens of the cache at that time but first ones that
                stay dense.
            norms: as ``encode`` has them.
        """
        return {}

    def check(self, stored: Stored) -> None:  # noqa: B027 - most formats make any bytes
        """Raise ValueError where stored pages hold what ``encode`` never makes.

        For files alone, see ``spark_compile/loading.py``: of such pages kernels may make other
        keys and values than ``decode``.
        """

    def scores(self, query: Tensor, stored: Stored, constants: Stored, first: int = 0) -> Tensor:
        """Dot products [B, Hkv, M, N * P] float32 of queries [B, Hkv, M, D] with stored keys."""
        return query.float() @ self.decode(stored, constants, first).flatten(2, 3).mT

    def weighted_sum(
        self, weights: Tensor, stored: Stored, constants: Stored, first: int = 0
    ) -> Tensor:
        """The values [B, Hkv, M, D] float32 that weights [B, Hkv, M, N * P] mix."""
        return weights @ self.decode(stored, constants, first).flatten(2, 3)

    @property
    def text(self) -> str:
        """The format as :func:`parse` reads it."""
        own = dataclasses.fields(self)[2:]
        options = ",".join(f"{field.name}={getattr(self, field.name)}" for field in own)
        return f"{self.NAME}({options})" if options else self.NAME


def parse(text: str, head_dim: int, dtype: torch.dtype) -> Format:
    """The format that a text such as ``"spark(kept=26,stored=int8)"`` describes.

    Raises:
        ValueError: the name or an option is unknown, or an option's value is not allowed.
    """
    kind, options = read_text(text, "format", Format.KNOWN, given=2)
    try:
        return kind(head_dim, dtype, **options)
    except TypeError as error:
        raise ValueError(f"format {text!r}: {error}") from error


def check_text(text: str) -> None:
    """Raise ValueError unless a text describes a format, for heads of some size."""
    parse(text, 1 << 20, torch.float32)  # a head that is large enough for any option


def read_text(
    text: str, what: str, known: Mapping[str, type[KindT]], given: int = 0
) -> tuple[type[KindT], dict[str, Any]]:
    """The dataclass and the options that a text ``name(option=value,...)`` names.

    Args:
        what: the word for it in errors.
        known: the dataclasses that there are by name.
        given: number of their first fields that are no options.

    Raises:
        ValueError: the name or an option is unknown, or there twice.
    """
    name, bracket, rest = text.strip().partition("(")
    kind = known.get(name.strip())
    if kind is None or (bracket and not rest.endswith(")")):
        names = ", ".join(sorted(known))
        raise ValueError(f"{what} {text!r} is not known: allowed is one of {names}")
    fields = {field.name: field for field in dataclasses.fields(kind)[given:]}  # type: ignore[arg-type]
    options: dict[str, Any] = {}
    for option in filter(None, rest.removesuffix(")").split(",")):
        key, _, value = (part.strip() for part in option.partition("="))
        if key not in fields:
            allowed = ", ".join(fields) or "none"
            raise ValueError(f"{what} {text!r} has no option {key!r}: allowed is {allowed}")
        if key in options:
            raise ValueError(f"{what} {text!r} has option {key!r} twice")
        options[key] = _option(value)
    return kind, options


def _option(text: str) -> bool | int | float | str:
    """Undo ``str`` of an option's value."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return {"True": True, "False": False}.get(text, text)


def check_choice(format: Format, option: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless an option of a format has one of the allowed values."""
    value = getattr(format, option)
    if value not in allowed:
        raise ValueError(
            f"option {option!r} of format {format.NAME!r} is {value!r}: "
            f"allowed is {', '.join(allowed)}"
        )


def bounded(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Positive numbers in a dtype; what is beyond its largest number becomes that."""
    return numbers.clamp(max=torch.finfo(dtype).max).to(dtype)


def per_head(constant: Tensor, rows: Tensor) -> Tensor:
    """A field per head [B, Hkv, D] with the dimensions of rows [B, Hkv, ..., D]."""
    return constant.reshape(*constant.shape[:2], *(1,) * (rows.dim() - 3), constant.shape[2])
