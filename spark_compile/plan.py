"""A plan: the formats that a calibration chose for each layer of a model, and why."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn

from .config import CHOOSING
from .generation import called_modules
from .kernels.formats.base import check_text
from .report import OptionError, warn_once

SCHEMA = 1
"""Version of the form in which plans are saved."""


@dataclass(frozen=True)
class PlannedLayer:
    """The formats of one attention site."""

    layer: str
    """Module path of the attention."""
    key: str
    """Text of the format of the keys."""
    value: str
    share: float
    """Of the layer's dense bytes."""
    key_kl: Mapping[str, float]
    """Mean KL divergence in nats of next-token distributions, by the text of the format that the
    layer's keys were stored in, all else dense."""
    value_kl: Mapping[str, float]

    @property
    def kl(self) -> float:
        """Of both formats, as if they added up."""
        return self.key_kl[self.key] + self.value_kl[self.value]


@dataclass(frozen=True)
class Measured:
    """What the divergences were measured on."""

    model: str
    """The class."""
    dtype: str
    """Of the model that follows the plan: bytes are counted for it."""
    computed_in: str
    """The dtype in which the divergences were measured."""
    noise: float
    """Divergence of two dense runs of different batch sizes, in nats: less is not seen."""
    head_sizes: tuple[tuple[int, int], ...]
    """Of keys and values, those that there are."""
    windows: int
    """Pieces of text."""
    context: int
    """Tokens of a prompt, whose cache was stored in the format."""
    scored: int
    """Tokens after it, whose predictions were compared."""
    versions: Mapping[str, str]
    """Of the packages."""


@dataclass(frozen=True)
class Plan:
    """What :func:`spark_compile.calibrate` returns and ``optimize(model, plan=...)`` takes."""

    budget: float
    """The share of dense bytes that was allowed."""
    share: float
    """The share that all layers together take."""
    layers: tuple[PlannedLayer, ...]
    measured: Measured

    @property
    def kl(self) -> float:
        """Sum of the layers' divergences: an estimate of what all of them do together."""
        return sum(layer.kl for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` has written.

        Raises:
            OSError: there is no such file.
            OptionError: it is no plan, or of another version; the message names what is wrong. It
                is a SparkError and a ValueError.
        """
        try:
            data = json.loads(Path(path).read_text())
        except ValueError as error:
            raise OptionError(f"plan {path} is no JSON: {error}") from error
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise OptionError(f"plan {path} has schema {schema!r}: allowed is {SCHEMA}")
        return _checked(cls, {k: v for k, v in data.items() if k != "schema"}, f"plan {path}")  # type: ignore[no-any-return]

    def options_for(self, model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options by which the backend follows the plan.

        Args:
            model: what they are for.
            given: other options.

        Raises:
            OptionError: one of those chooses formats too, or the model has no such layers.
        """
        for name in ("budget", "key_format", "value_format", *CHOOSING):
            if name in given:
                raise OptionError(
                    f"option {name!r} is {given[name]!r}: beside a plan, which chooses the "
                    "formats, allowed is none"
                )
        paths = {path for module in called_modules(model) for path, _ in module.named_modules()}
        missing = [layer.layer for layer in self.layers if layer.layer not in paths]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise OptionError(
                f"the plan is for layers {', '.join(missing[:3])}{more}, which "
                f"{type(model).__name__} does not have: it was made for {self.measured.model}"
            )
        dtype = str(getattr(model, "dtype", "")).removeprefix("torch.")
        if dtype and dtype != self.measured.dtype:
            warn_once(
                f"the plan was made for {self.measured.dtype}, the model is in {dtype}: its cache "
                f"takes another share of dense bytes than the plan's {self.share:.1%}"
            )
        formats: dict[str, Any] = {
            "key_format": {layer.layer: layer.key for layer in self.layers},
            "value_format": {layer.layer: layer.value for layer in self.layers},
        }
        return {**given, **formats}


def loaded(plan: Plan | str | Path) -> Plan:
    """A plan, read if it is a path.

    Raises:
        OSError: there is no such file.
        OptionError: it is no plan.
    """
    if isinstance(plan, str | Path):
        return Plan.load(plan)
    if not isinstance(plan, Plan):
        raise OptionError(f"plan is {plan!r}: allowed is a Plan or the path of one")
    return plan


def _checked(kind: Any, data: Any, where: str) -> Any:
    """One of the dataclasses above from JSON, each value of its declared type."""
    names = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(data, dict) or data.keys() != names:
        keys = sorted(data.keys() ^ names) if isinstance(data, dict) else type(data).__name__
        raise OptionError(f"{where} lacks, or has besides: {keys}; allowed are {sorted(names)}")
    values = {name: _READERS[name](data[name], f"{name!r} of {where}") for name in data}
    if kind is PlannedLayer:
        for side in ("key", "value"):
            if values[side] not in values[f"{side}_kl"]:
                raise OptionError(f"{where} has no divergence of its {side} format {values[side]}")
    return kind(**values)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise OptionError(f"{where} is {value!r}: allowed is a text")
    return value


def _number(value: Any, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise OptionError(f"{where} is {value!r}: allowed is a number")
    return value


def _format(value: Any, where: str) -> str:
    try:
        check_text(_text(value, where))
    except ValueError as error:
        raise OptionError(f"{where}: {error}") from error
    return str(value)


def _mapping(reader: Any) -> Any:
    def read(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise OptionError(f"{where} is {value!r}: allowed is a mapping")
        return {key: reader(item, f"{key!r} in {where}") for key, item in value.items()}

    return read


def _sequence(reader: Any) -> Any:
    def read(value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise OptionError(f"{where} is {value!r}: allowed is a list")
        return tuple(reader(item, f"{where}, entry {index}") for index, item in enumerate(value))

    return read


_READERS: dict[str, Any] = {
    **dict.fromkeys(("layer", "model", "dtype", "computed_in"), _text),
    **dict.fromkeys(("budget", "share", "windows", "context", "scored", "noise"), _number),
    **dict.fromkeys(("key", "value"), _format),
    **dict.fromkeys(("key_kl", "value_kl"), _mapping(_number)),
    "layers": _sequence(lambda value, where: _checked(PlannedLayer, value, where)),
    "head_sizes": _sequence(_sequence(_number)),
    "versions": _mapping(_text),
    "measured": lambda value, where: _checked(Measured, value, where),
}
