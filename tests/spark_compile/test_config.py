"""The options: what each allows, and errors that name the option, its value and what is allowed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from spark_compile import SparkConfig

OUT_OF_RANGE = [
    ("key_ratio", 1, "0 <= key_ratio < 1"),
    ("key_ratio", 1.0, "0 <= key_ratio < 1"),
    ("key_ratio", -0.01, "0 <= key_ratio < 1"),
    ("key_ratio", math.nan, "0 <= key_ratio < 1"),
    ("key_ratio", math.inf, "0 <= key_ratio < 1"),
    ("value_ratio", 1.0, "0 <= value_ratio < 1"),
    ("value_ratio", -0.5, "0 <= value_ratio < 1"),
    ("key_dtype", "fp8", "'model', 'int8'"),
    ("value_dtype", None, "'model', 'int8'"),
    ("window", 1, "an integer >= 2"),
    ("window", -3, "an integer >= 2"),
    ("recovery", "mean", "'degenerate', 'none', 'exponential', 'gaussian'"),
    ("recovery", None, "'degenerate', 'none', 'exponential', 'gaussian'"),
    ("saliency", "Squared", "'squared', 'absolute'"),
    ("sink_tokens", -1, "an integer >= 0"),
    ("recent_tokens", -1, "an integer >= 0"),
    ("min_tokens", -1, "an integer >= 0"),
    ("inner", "cudagraphs", "'inductor', 'eager', 'aot_eager'"),
    ("inner", ["eager"], "'inductor', 'eager', 'aot_eager'"),
]
WRONG_TYPE = [
    ("key_ratio", "0.5", "a number with 0 <= key_ratio < 1"),
    ("key_ratio", None, "a number with 0 <= key_ratio < 1"),
    ("key_ratio", False, "a number with 0 <= key_ratio < 1"),
    ("value_ratio", "0.5", "a number with 0 <= value_ratio < 1"),
    ("window", 4.0, "an integer >= 2"),
    ("window", True, "an integer >= 2"),
    ("window", None, "an integer >= 2"),
    ("sink_tokens", 1.0, "an integer >= 0"),
    ("sink_tokens", None, "an integer >= 0"),
    ("recent_tokens", "all", "an integer >= 0"),
    ("recent_tokens", True, "an integer >= 0"),
    ("min_tokens", 0.5, "an integer >= 0"),
    ("strict", 1, "True or False"),
    ("strict", None, "True or False"),
]
EXTREMES = [
    {"key_ratio": 0},
    {"key_ratio": 0.999},
    {"value_ratio": 0.999},
    *({f"{name}_dtype": "int8"} for name in ("key", "value")),
    {"window": 2},
    {"recent_tokens": 0},
    {"recent_tokens": None},
    {"sink_tokens": 0, "min_tokens": 0},
    *({"recovery": name} for name in ("degenerate", "none", "exponential", "gaussian")),
    *({"saliency": name} for name in ("squared", "absolute")),
    *({"inner": name} for name in ("inductor", "eager", "aot_eager")),
    {"strict": True},
]


@pytest.mark.parametrize(
    ("error", "name", "value", "allowed"),
    [(ValueError, *case) for case in OUT_OF_RANGE] + [(TypeError, *case) for case in WRONG_TYPE],
)
def test_a_wrong_value_raises_and_is_named(
    error: type[Exception], name: str, value: Any, allowed: str
) -> None:
    for build in (lambda options: SparkConfig(**options), SparkConfig.from_options):
        with pytest.raises(error) as caught:
            build({name: value})
        assert str(caught.value).startswith(f"option {name!r} is {value!r}: allowed is ")
        assert allowed in str(caught.value)


def test_every_option_has_a_wrong_value_above() -> None:
    tried = {name for name, *_ in OUT_OF_RANGE} | {name for name, *_ in WRONG_TYPE}
    assert tried == {field.name for field in dataclasses.fields(SparkConfig)}


@pytest.mark.parametrize("options", EXTREMES, ids=str)
def test_extremes_are_allowed(options: dict[str, Any]) -> None:
    config = SparkConfig.from_options(options)
    assert {name: getattr(config, name) for name in options} == options


@pytest.mark.parametrize("name", ["keyratio", "", "packed_length", "Window"])
def test_an_unknown_option_raises_and_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"option '{name}' is 4: allowed is one of the options"):
        SparkConfig.from_options({name: 4})


@pytest.mark.parametrize("options", [None, {}])
def test_no_options_are_the_defaults(options: dict[str, Any] | None) -> None:
    assert SparkConfig.from_options(options) == SparkConfig()


def test_equal_configs_are_one_key_and_other_options_are_another() -> None:
    config = SparkConfig(key_ratio=0.8, window=8)
    assert hash(config) == hash(SparkConfig(key_ratio=0.8, window=8))
    others = [
        SparkConfig(**{"key_ratio": 0.8, "window": 8, **change})
        for change in ({"key_ratio": 0.7}, {"window": 9}, {"recovery": "none"}, {"sink_tokens": 1},
                       {"saliency": "absolute"}, {"recent_tokens": 3}, {"min_tokens": 9},
                       {"inner": "eager"}, {"strict": True})
    ]  # fmt: skip
    assert len({config, *others}) == 10


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SparkConfig)])
def test_options_cannot_be_changed(field: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(SparkConfig(), field, 3)


def test_only_the_compiler_and_strictness_may_change_between_two_steps() -> None:
    config = SparkConfig()
    assert config.stores_like(SparkConfig(inner="eager", strict=True))
    assert not config.stores_like(SparkConfig(key_ratio=0.4))
    assert not config.stores_like(SparkConfig(sink_tokens=1, inner="eager"))


def test_recent_is_the_window_unless_given() -> None:
    assert SparkConfig(window=7).recent == 7
    assert SparkConfig(window=7, recent_tokens=0).recent == 0
    assert SparkConfig(window=7, recent_tokens=3, sink_tokens=2).dense_room == 2 + 3 + 7


@pytest.mark.parametrize(
    ("options", "length", "packed"),
    [
        ({}, 0, 0),
        ({}, 7, 0),  # recent 4 and less than a window of 4 behind them
        ({}, 8, 4),
        ({}, 9, 5),
        ({"recent_tokens": 0}, 3, 0),
        ({"recent_tokens": 0}, 4, 4),
        ({"sink_tokens": 2}, 9, 0),
        ({"sink_tokens": 2}, 10, 4),
        ({"min_tokens": 9}, 8, 0),
        ({"min_tokens": 9}, 9, 5),
        ({"min_tokens": 5}, 7, 0),
        ({"sink_tokens": 3, "recent_tokens": 9, "min_tokens": 17}, 16, 0),
        ({"sink_tokens": 3, "recent_tokens": 9, "min_tokens": 17}, 17, 5),
    ],
)
def test_packed_length_around_its_limits(options: dict[str, int], length: int, packed: int) -> None:
    assert SparkConfig(window=4, **options).packed_length(length) == packed
