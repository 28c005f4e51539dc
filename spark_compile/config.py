"""The options of the backend: one frozen, validated value that is also the cache key."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import torch

from .by_layer import Formats, checked, text_for
from .group import Group, group_of
from .kernels.eviction import PyramidKV, parse_scorer
from .kernels.formats import Dense, Format, Int8, Pruned, Quantized, Spark, kept_channels, parse
from .kernels.formats.base import check_text
from .kernels.layout import PageLayout
from .kernels.spec import SIDES, Side, Spec, parse_spec
from .presets import MEANING, NAMES, SHARES, Size, best_rung, share_named
from .report import OptionError, warn_once, wrong_option

Recovery = Literal["degenerate", "none", "exponential", "gaussian"]
Saliency = Literal["squared", "absolute"]
Stored = Literal["model", "int8"]
Inner = Literal["inductor", "eager", "aot_eager"]
QUANTIZED_SINKS = 4
"""First tokens that stay dense beside quantized ones: attention sinks, which most queries look at,
make up two thirds of what 4-bit values lose (SmolLM2, Gemma-3)."""
LONGEST_TAIL = 1 << 20
"""Most tokens of an option for which every cache has dense rows from its first token on."""
LONGEST = (1 << 31) - 1
"""Most tokens of a context."""


@dataclass(frozen=True)
class SparkConfig:
    """Options of ``backend="spark"``; the annotation of each field describes it, here and on
    the command line.

    Raises:
        OptionError: an option is unknown, of a wrong type or out of range; the message names it,
            its value and what is allowed. It is a SparkError and a ValueError.
    """

    key_ratio: Annotated[
        float | None,
        "Share of key channels pruned per token, 0 <= ratio < 1; 0 stores every channel. If not "
        "given, 0.5 where another of these options chooses formats, else the budget near-lossless.",
    ] = None
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
    sink_tokens: Annotated[
        int | None,
        f"Number of first tokens that stay dense; if not given, {QUANTIZED_SINKS} in a growing "
        "cache with a quantized format, else none.",
    ] = None
    recent_tokens: Annotated[
        int | None,
        "Number of latest tokens that stay dense; if not given, as many as the window.",
    ] = None
    min_tokens: Annotated[int, "Contexts shorter than this stay dense altogether."] = 0
    budget: Annotated[float | str | None, MEANING] = None
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
    context_parallel: Annotated[
        Group | None,
        "Process group, or DeviceMesh of one dimension, over whose ranks the tokens are spread.",
    ] = None
    strict: Annotated[
        bool,
        "Raise instead of warning when a site is refused, nothing is rewritten, a pass fails or, "
        "outside the compiled graphs, an operator needs a compressed cache dense.",
    ] = False

    def __post_init__(self) -> None:
        for name in ("key_ratio", "value_ratio"):
            ratio = getattr(self, name)
            if ratio is None and name == "key_ratio":
                continue
            if not _is_number(ratio, (int, float)) or not 0 <= ratio < 1:
                raise wrong_option(name, ratio, f"a number with 0 <= {name} < 1")
        _tokens("window", self.window, 2)
        for name in ("sink_tokens", "recent_tokens"):
            if getattr(self, name) is not None:
                _tokens(name, getattr(self, name), 0)
        _tokens("min_tokens", self.min_tokens, 0, LONGEST)
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in get_args(allowed):
                raise wrong_option(name, value, "one of " + ", ".join(map(repr, get_args(allowed))))
        for name in ("key_format", "value_format"):
            formats = checked(name, getattr(self, name), "the text of a format", check_text)
            object.__setattr__(self, name, formats)
        evict = checked("evict", self.evict, "the text of a scorer", self._read_scorer)
        object.__setattr__(self, "evict", evict)
        object.__setattr__(self, "context_parallel", group_of(self))
        if not isinstance(self.strict, bool):
            raise wrong_option("strict", self.strict, "True or False")
        if self.budget is not None:
            self._check_budget()

    def _check_budget(self) -> None:
        if share_named(self.budget) is None:
            allowed = f"a number with 0 < budget <= 1, or one of {NAMES}"
            raise wrong_option("budget", self.budget, allowed)
        for name in self._choosing():
            raise OptionError(
                f"options 'budget' ({self.budget!r}) and {name!r} ({getattr(self, name)!r}) both "
                "choose the formats: allowed is one of them"
            )

    def _choosing(self) -> list[str]:
        """The options that have been given and that choose a format."""
        fields = [field for field in dataclasses.fields(self) if field.name in CHOOSING]
        return [field.name for field in fields if getattr(self, field.name) != field.default]

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
                raise wrong_option(str(name), value, "one of the options " + ", ".join(known))
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
        own, dense = (head_dim, dtype), Dense(head_dim, dtype)
        if (share := share_named(self.budget)) is not None:
            return self._budgeted(share, side, own, other or own, layer)
        texts = (text_for(formats, layer) for formats in (self.key_format, self.value_format))
        if self._choosing() or any(text is not None for text in texts):
            chosen = self._chosen(side, head_dim, dtype)
        else:
            chosen = self._default(side, own, other or own, layer)
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
        text = text_for(self.key_format if side == "key" else self.value_format, layer)
        return None if text is None else parse(text, head_dim, dtype)

    def _default(self, side: Side, own: Size, other: Size, layer: str) -> Format:
        """The format of a side where no option chooses one."""
        for share in (SHARES["near-lossless"], 1.0):  # small heads have no rung below the first
            with contextlib.suppress(ValueError):
                return self._budgeted(share, side, own, other, layer)
        return Dense(*own)

    def _budgeted(self, share: float, side: Side, own: Size, other: Size, layer: str) -> Format:
        """The format of a side in the best rung that fits into a share of the dense bytes."""
        key, value = (own, other) if side == "key" else (other, own)
        named = self._named("key", *key, layer), self._named("value", *value, layer)
        policy = self.spec(Quantized(*key), Quantized(*value), layer=layer)  # with their sinks
        return best_rung(share, (key, value), named, policy)[SIDES.index(side)]

    def _chosen(self, side: Side, head_dim: int, dtype: torch.dtype) -> Format:
        """The format that ratio and dtype of a side stand for."""
        key_ratio = 0.5 if self.key_ratio is None else self.key_ratio
        ratio = key_ratio if side == "key" else self.value_ratio
        stored = self.key_dtype if side == "key" else self.value_dtype
        kept = kept_channels(head_dim, ratio)
        if kept == head_dim:
            return Int8(head_dim, dtype) if stored == "int8" else Dense(head_dim, dtype)
        if side == "value":
            return Pruned(head_dim, dtype, kept, stored)
        return Spark(head_dim, dtype, kept, stored, self.recovery, self.saliency)

    def spec(
        self, key: Format, value: Format, *, slides: bool = False, static: bool = False,
        layer: str = "",
    ) -> Spec:  # fmt: skip
        """How the cache of a site is stored.

        Args:
            slides: whether its window slides: then no first tokens stay, and a scorer evicts none.
            static: whether it has a capacity. It might roll later, which it cannot with sinks: so
                it has those that are asked for and no others.
            layer: module path of the attention.

        Raises:
            ValueError: a scorer cannot tell which layer that is.
        """
        scorer = None
        if not slides and (text := text_for(self.evict, layer)) is not None:
            scorer = parse_scorer(text).in_layer(layer)
        sinks = self.sink_tokens
        if sinks is None:
            is_quantized = any(isinstance(format, Quantized) for format in (key, value))
            sinks = QUANTIZED_SINKS if is_quantized and not static else 0
            if scorer and scorer.tokens < sinks + self.recent + self.window:
                sinks = 0
        sinks = 0 if slides else sinks
        spec = Spec(key, value, self.window, self.recent, sinks, self.min_tokens, evict=scorer)
        return parse_spec(spec.text)  # one object for equal specs: Dynamo's guards compare them

    def _read_scorer(self, text: str) -> None:
        """Raise ValueError unless a scorer goes with the other options, in every layer."""
        scorer, dense = parse_scorer(text), Dense(1, torch.float32)
        if isinstance(scorer, PyramidKV):
            scorer = scorer.in_layer(str(scorer.layers - 1))  # where the fewest tokens stay
        numbers = self.window, self.recent, self.sink_tokens or 0, self.min_tokens
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


def _is_number(value: object, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _tokens(name: str, value: Any, least: int, most: int = LONGEST_TAIL) -> None:
    if not _is_number(value, (int,)) or not least <= value <= most:
        raise wrong_option(name, value, f"an integer from {least} to {most}")
