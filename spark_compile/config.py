"""The options of the backend: one frozen, validated value that is also the cache key."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, get_args

import torch

from .kernels.eviction import PyramidKV, parse_scorer
from .kernels.formats import Dense, Format, Int8, Pruned, Spark, kept_channels, parse
from .kernels.layout import PageLayout
from .kernels.spec import Side, Spec, parse_spec
from .presets import SHARES, TOKENS, Size, best_rung
from .report import OptionError, warn_once

Recovery = Literal["degenerate", "none", "exponential", "gaussian"]
Saliency = Literal["squared", "absolute"]
Stored = Literal["model", "int8"]
Inner = Literal["inductor", "eager", "aot_eager"]
LONGEST_TAIL = 1 << 20
"""Most tokens of an option for which every cache has dense rows from its first token on."""
LONGEST = (1 << 31) - 1
"""Most tokens of a context."""
Formats = str | Mapping[str, str] | tuple[tuple[str, str], ...] | None


@dataclass(frozen=True)
class SparkConfig:
    """Options of ``backend="spark"``; the annotation of each field describes it, here and on
    the command line.

    Raises:
        OptionError: an option is unknown, of a wrong type or out of range; the message names it,
            its value and what is allowed. It is a SparkError and a ValueError.
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
        Stored, "How value channels are stored; int8 has one step per token and head."
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
    sink_tokens: Annotated[int, "Number of first tokens that stay dense."] = 0
    recent_tokens: Annotated[
        int | None,
        "Number of latest tokens that stay dense; if not given, as many as the window.",
    ] = None
    min_tokens: Annotated[int, "Contexts shorter than this stay dense altogether."] = 0
    budget: Annotated[
        float | str | None,
        "Share of dense key and value bytes that a cache may take, up to 1, or "
        f"{', '.join(f'{name} ({share})' for name, share in SHARES.items())}; chooses the formats "
        "in place of ratios and dtypes. Everything counts (records, constants, statistics, tail, "
        f"slack) at {TOKENS:,} tokens: shorter caches and sliding windows take a larger share, "
        "longer ones a smaller one, down to that of a packed token.",
    ] = None
    inner: Annotated[Inner, "Compiler of the rewritten graph."] = "inductor"
    key_format: Annotated[
        Formats,
        "Format of the keys by its text, such as spark(kept=26,stored=int8), in place of what the "
        "options above choose; in Python also a mapping of layer patterns to texts, of which the "
        "first that matches counts.",
    ] = None
    value_format: Annotated[Formats, "Likewise the format of the values."] = None
    evict: Annotated[
        Formats,
        "Scorer by which tokens of a prompt are evicted when it is stored, by its text, such as "
        "snapkv(tokens=128): so many stay per key head; in Python also texts by layer patterns. If "
        "not given, all stay.",
    ] = None
    strict: Annotated[
        bool,
        "Raise instead of warning when a site is refused, nothing is rewritten, a pass fails or, "
        "outside the compiled graphs, an operator needs a compressed cache dense.",
    ] = False

    def __post_init__(self) -> None:
        for name in ("key_ratio", "value_ratio"):
            ratio = getattr(self, name)
            if not _is_number(ratio, (int, float)) or not 0 <= ratio < 1:
                raise _error(name, ratio, f"a number with 0 <= {name} < 1")
        _tokens("window", self.window, 2)
        _tokens("sink_tokens", self.sink_tokens, 0)
        if self.recent_tokens is not None:
            _tokens("recent_tokens", self.recent_tokens, 0)
        _tokens("min_tokens", self.min_tokens, 0, LONGEST)
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in get_args(allowed):
                raise _error(name, value, "one of " + ", ".join(map(repr, get_args(allowed))))
        for name in ("key_format", "value_format"):
            formats = _checked(name, getattr(self, name), "the text of a format", _read_format)
            object.__setattr__(self, name, formats)
        evict = _checked("evict", self.evict, "the text of a scorer", self._read_scorer)
        object.__setattr__(self, "evict", evict)
        if not isinstance(self.strict, bool):
            raise _error("strict", self.strict, "True or False")
        if self.budget is not None:
            self._check_budget()

    def _check_budget(self) -> None:
        number = _is_number(self.budget, (int, float)) and 0 < self.budget <= 1  # type: ignore[operator]
        if not number and (not isinstance(self.budget, str) or self.budget not in SHARES):
            allowed = f"a number with 0 < budget <= 1, or one of {', '.join(map(repr, SHARES))}"
            raise _error("budget", self.budget, allowed)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in CHOOSING and value != field.default:
                raise OptionError(
                    f"options 'budget' ({self.budget!r}) and {field.name!r} ({value!r}) both "
                    "choose the formats: allowed is one of them"
                )

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> SparkConfig:
        """Build from the ``options`` of ``torch.compile``, a mapping of names to values or None.

        Raises:
            OptionError: as the class does; also if ``options`` is something else.
        """
        if options is None:
            return cls()
        if not isinstance(options, Mapping):
            raise OptionError(f"options is {options!r}: allowed is a mapping of names to values")
        known = [field.name for field in dataclasses.fields(cls)]
        for name, value in options.items():
            if name not in known:
                raise _error(str(name), value, "one of the options " + ", ".join(known))
        return cls(**options)

    def format_for(
        self,
        side: Side,
        head_dim: int,
        dtype: torch.dtype,
        layer: str = "",
        other: Size | None = None,
    ) -> Format:
        """The format of the keys or of the values of one attention site.

        One that ratio and dtype choose and that would take no fewer bytes than dense tokens is
        replaced by ``dense``, with a warning. One that is given by its text is what it is.

        Args:
            head_dim: D of the keys, or of the values.
            dtype: that the model has them in.
            layer: module path of the attention.
            other: head size and dtype of the other side, which a budget is for too; None: the
                same.

        Raises:
            ValueError: a text names a format that has no such head size, or no formats fit into
                the budget.
        """
        named = self._named(side, head_dim, dtype, layer)
        if named is not None:
            return named
        if self.budget is not None:
            return self._budgeted(side, (head_dim, dtype), other or (head_dim, dtype), layer)
        chosen, dense = self._chosen(side, head_dim, dtype), Dense(head_dim, dtype)
        pages = [PageLayout(format, self.window).page_bytes for format in (chosen, dense)]
        if pages[0] < pages[1] or chosen == dense:
            return chosen
        warn_once(
            f"{side}s of {head_dim} {dtype} channels stay dense: {chosen.text}, which the options "
            f"choose, would take {pages[0]} bytes for {self.window} tokens, dense {pages[1]}"
        )
        return dense

    def _named(self, side: Side, head_dim: int, dtype: torch.dtype, layer: str) -> Format | None:
        """The format that an option names for a side of a layer."""
        text = _text_for(self.key_format if side == "key" else self.value_format, layer)
        return None if text is None else parse(text, head_dim, dtype)

    def _budgeted(self, side: Side, own: Size, other: Size, layer: str) -> Format:
        """The format of a side in the best rung that fits into the budget."""
        is_key = side == "key"
        key, value = (own, other) if is_key else (other, own)
        named = self._named("key", *key, layer), self._named("value", *value, layer)
        policy = self.spec(Dense(*key), Dense(*value))
        return best_rung(self.share, (key, value), named, policy)[0 if is_key else 1]

    @property
    def share(self) -> float:
        """The budget as a number.

        Raises:
            OptionError: there is none.
        """
        if self.budget is None:
            raise _error("budget", None, f"a number or one of {', '.join(map(repr, SHARES))}")
        return SHARES[self.budget] if isinstance(self.budget, str) else float(self.budget)

    def _chosen(self, side: Side, head_dim: int, dtype: torch.dtype) -> Format:
        """The format that ratio and dtype of a side stand for."""
        ratio = self.key_ratio if side == "key" else self.value_ratio
        stored = self.key_dtype if side == "key" else self.value_dtype
        kept = kept_channels(head_dim, ratio)
        if kept == head_dim:
            return Int8(head_dim, dtype) if stored == "int8" else Dense(head_dim, dtype)
        if side == "value":
            return Pruned(head_dim, dtype, kept, stored)
        return Spark(head_dim, dtype, kept, stored, self.recovery, self.saliency)

    def spec(self, key: Format, value: Format, *, slides: bool = False, layer: str = "") -> Spec:
        """How the cache of a site is stored; of one that slides, no first tokens stay, and a
        scorer evicts none.

        Args:
            layer: module path of the attention.

        Raises:
            ValueError: a scorer cannot tell which layer that is.
        """
        sinks, scorer = 0 if slides else self.sink_tokens, None
        if not slides and (text := _text_for(self.evict, layer)) is not None:
            scorer = parse_scorer(text).in_layer(layer)
        spec = Spec(key, value, self.window, self.recent, sinks, self.min_tokens, evict=scorer)
        return parse_spec(spec.text)  # one object for equal specs: Dynamo's guards compare them

    def _read_scorer(self, text: str) -> None:
        """Raise ValueError unless a scorer goes with the other options, in every layer."""
        scorer, dense = parse_scorer(text), Dense(1, torch.float32)
        if isinstance(scorer, PyramidKV):
            scorer = scorer.in_layer(str(scorer.layers - 1))  # where the fewest tokens stay
        numbers = self.window, self.recent, self.sink_tokens, self.min_tokens
        Spec(dense, dense, *numbers, evict=scorer)

    @property
    def recent(self) -> int:
        """Number of latest tokens that stay dense."""
        return self.window if self.recent_tokens is None else self.recent_tokens


CHOOSING = ("key_ratio", "value_ratio", "key_dtype", "value_dtype", "recovery", "saliency")
"""Options that choose a format, for which others may stand."""
_CHOICES: dict[str, Any] = {
    "key_dtype": Stored, "value_dtype": Stored, "recovery": Recovery, "saliency": Saliency,
    "inner": Inner,
}  # fmt: skip


def _pairs(formats: Formats) -> tuple[tuple[str, str], ...]:
    """Patterns of layers and the texts of their formats."""
    if formats is None or isinstance(formats, str):
        return () if formats is None else (("*", formats),)
    pairs = formats.items() if isinstance(formats, Mapping) else formats
    return tuple((str(pattern), str(text)) for pattern, text in pairs)


def _text_for(formats: Formats, layer: str) -> str | None:
    """The text of the first pattern that a layer matches."""
    return next((text for pattern, text in _pairs(formats) if fnmatchcase(layer, pattern)), None)


def _read_format(text: str) -> None:
    parse(text, 1 << 20, torch.float32)  # a head that is large enough for any option


def _checked(name: str, formats: Formats, what: str, read: Callable[[str], None]) -> Formats:
    """The same as a value that can be hashed, every text read once."""
    try:
        pairs = _pairs(formats)
        for _, text in pairs:
            read(text)
    except (TypeError, ValueError) as error:
        raise _error(name, formats, f"{what}, or texts by layer: {error}") from error
    return formats if formats is None or isinstance(formats, str) else pairs


def _error(name: str, value: object, allowed: str) -> OptionError:
    return OptionError(f"option {name!r} is {value!r}: allowed is {allowed}")


def _is_number(value: object, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _tokens(name: str, value: Any, least: int, most: int = LONGEST_TAIL) -> None:
    if not _is_number(value, (int,)) or not least <= value <= most:
        raise _error(name, value, f"an integer from {least} to {most}")
