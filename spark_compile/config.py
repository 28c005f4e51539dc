"""The options of the backend: one frozen, validated value that is also the cache key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from .kernels.layout import value_fields

Recovery = Literal["degenerate", "none", "exponential", "gaussian"]
Saliency = Literal["squared", "absolute"]
Stored = Literal["model", "int8"]
Inner = Literal["inductor", "eager", "aot_eager"]


@dataclass(frozen=True)
class SparkConfig:
    """Options of ``backend="spark"``; the annotation of each field describes it, here and on
    the command line.

    Raises:
        ValueError: an option is unknown or out of range; the message names it, its value and what
            is allowed.
        TypeError: an option has the wrong type.
    """

    key_ratio: Annotated[
        float, "Share of key channels pruned per token, 0 <= ratio < 1; 0 stores every channel."
    ] = 0.5
    value_ratio: Annotated[
        float, "Share of value channels pruned per token, 0 <= ratio < 1; 0 stores every channel."
    ] = 0.0
    key_dtype: Annotated[
        Stored, "How kept key channels are stored; int8 has one step per token and head."
    ] = "model"
    value_dtype: Annotated[
        Stored, "How value channels are stored, for every token from the moment it is appended."
    ] = "model"
    window: Annotated[
        int,
        "Number of latest queries that score the channels; also the number of new tokens that are "
        "gathered before they are compressed.",
    ] = 32
    recovery: Annotated[
        Recovery, "How the saliency of a pruned channel is restored when attending."
    ] = "degenerate"
    saliency: Annotated[
        Saliency,
        "How channels are scored: squared is k^2 * n as in the authors' code, absolute is |k| * n "
        "as in their paper.",
    ] = "squared"
    sink_tokens: Annotated[int, "Number of first tokens whose keys stay dense."] = 0
    recent_tokens: Annotated[
        int | None,
        "Number of latest tokens whose keys stay dense; if not given, as many as the window.",
    ] = None
    min_tokens: Annotated[int, "Contexts shorter than this stay dense altogether."] = 0
    inner: Annotated[Inner, "Compiler of the rewritten graph."] = "inductor"
    strict: Annotated[
        bool,
        "Raise instead of warning when a site is refused, nothing is rewritten or a pass fails.",
    ] = False

    def __post_init__(self) -> None:
        for name in ("key_ratio", "value_ratio"):
            ratio = getattr(self, name)
            _number(name, ratio, (int, float), f"a number with 0 <= {name} < 1")
            if not 0 <= ratio < 1:
                raise _error(name, ratio, f"0 <= {name} < 1")
        _at_least("window", self.window, 2)
        _at_least("sink_tokens", self.sink_tokens, 0)
        if self.recent_tokens is not None:
            _at_least("recent_tokens", self.recent_tokens, 0)
        _at_least("min_tokens", self.min_tokens, 0)
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise _error(name, value, "one of " + ", ".join(map(repr, get_args(allowed))))
        if not isinstance(self.strict, bool):
            raise TypeError(f"option 'strict' is {self.strict!r}: allowed is True or False")

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> SparkConfig:
        """Build from the ``options`` of ``torch.compile``; an unknown name raises ValueError."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name, value in (options or {}).items():
            if name not in known:
                raise _error(str(name), value, "one of the options " + ", ".join(known))
        return cls(**(options or {}))

    def stores_like(self, other: SparkConfig) -> bool:
        """Whether a state stored under one of the two can be appended to under the other."""
        return dataclasses.replace(self, inner=other.inner, strict=other.strict) == other

    def sliding(self) -> SparkConfig:
        """The same for a cache that slides: it evicts its first tokens, so it has no sinks."""
        return dataclasses.replace(self, sink_tokens=0)

    @property
    def value_fields(self) -> tuple[str, ...]:
        """Names of the tensors that values are stored in."""
        return value_fields(self.value_ratio > 0, self.value_dtype == "int8")

    @property
    def recent(self) -> int:
        """Number of latest tokens whose keys stay dense."""
        return self.window if self.recent_tokens is None else self.recent_tokens

    @property
    def dense_room(self) -> int:
        """Rows of a fresh tail: sinks, recent tokens and one block waiting to be compressed."""
        return self.sink_tokens + self.recent + self.window

    def packed_length(self, length: int) -> int:
        """Number of tokens to pack of a context of ``length`` tokens (0: too short to start).

        With a symbolic length the comparisons are guards: one graph for each of the two answers.
        """
        packed = length - self.sink_tokens - self.recent
        return packed if length >= self.min_tokens and packed >= self.window else 0


_CHOICES: dict[str, Any] = {
    "key_dtype": Stored, "value_dtype": Stored, "recovery": Recovery, "saliency": Saliency,
    "inner": Inner,
}  # fmt: skip


def _error(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"option {name!r} is {value!r}: allowed is {allowed}")


def _number(name: str, value: object, types: tuple[type, ...], allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, types):
        raise TypeError(f"option {name!r} is {value!r}: allowed is {allowed}")


def _at_least(name: str, value: object, least: int) -> None:
    _number(name, value, (int,), f"an integer >= {least}")
    assert isinstance(value, int)
    if value < least:
        raise _error(name, value, f"an integer >= {least}")
