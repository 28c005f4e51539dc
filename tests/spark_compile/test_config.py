"""The options: what each allows, and errors that name the option, its value and what is allowed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from spark_compile import SparkConfig, SparkError, SparkWarning
from spark_compile.group import Group
from spark_compile.kernels.formats import Dense
from spark_compile.kernels.layout import round_up
from spark_compile.kernels.spec import SIDES
from spark_compile.report import OptionError

HUGE = 10**30
WRONG = [
    ("key_ratio", 1, "0 <= key_ratio < 1"),
    ("key_ratio", 1.0, "0 <= key_ratio < 1"),
    ("key_ratio", -0.01, "0 <= key_ratio < 1"),
    ("key_ratio", math.nan, "0 <= key_ratio < 1"),
    ("key_ratio", math.inf, "0 <= key_ratio < 1"),
    ("value_ratio", 1.0, "0 <= value_ratio < 1"),
    ("value_ratio", -0.5, "0 <= value_ratio < 1"),
    ("key_dtype", "fp8", "'model', 'int8'"),
    ("value_dtype", None, "'model', 'int8'"),
    ("window", 1, "an integer from 2 to"),
    ("window", -3, "an integer from 2 to"),
    ("recovery", "mean", "'degenerate', 'none', 'exponential', 'gaussian'"),
    ("recovery", None, "'degenerate', 'none', 'exponential', 'gaussian'"),
    ("saliency", "Squared", "'squared', 'absolute'"),
    ("sink_tokens", -1, "an integer from 0 to"),
    ("recent_tokens", -1, "an integer from 0 to"),
    ("min_tokens", -1, "an integer from 0 to"),
    ("inner", "cudagraphs", "'inductor', 'eager', 'aot_eager'"),
    ("inner", ["eager"], "'inductor', 'eager', 'aot_eager'"),
    ("key_format", "int4", "the text of a format, or texts by layer: format 'int4' is not known"),
    ("value_format", "spark", "the text of a format, or texts by layer: format 'spark': "),
    ("key_format", {"*": "spark(kept=0)"}, "option 'kept' of format 'spark' is 0"),
    ("key_format", {"a": "dense", "b": "spark(keep=3)"}, "has no option 'keep': allowed is kept"),
    ("value_format", {"*": 3}, "format '3' is not known"),
    ("value_format", 7, "the text of a format, or texts by layer"),
    ("key_format", ("dense",), "the text of a format, or texts by layer"),
    ("key_format", "", "format '' is not known"),
    *((name, HUGE, f"an integer from {least} to ") for name, least in
      (("window", 2), ("sink_tokens", 0), ("recent_tokens", 0), ("min_tokens", 0))),
    *((name, value, "an integer from ") for name in ("window", "sink_tokens", "min_tokens")
      for value in (math.nan, math.inf, -HUGE, True, "4", torch.tensor(4), [4])),
    ("window", None, "an integer from "),
    *((f"{side}_ratio", value, f"0 <= {side}_ratio < 1") for side in ("key", "value")
      for value in (-math.inf, HUGE, -HUGE, 0.5j, [0.5], torch.tensor([0.5, 0.5]))),
    ("recovery", np.array(["none", "none"]), "'degenerate', 'none', 'exponential', 'gaussian'"),
    ("key_ratio", "0.5", "a number with 0 <= key_ratio < 1"),
    ("key_ratio", False, "a number with 0 <= key_ratio < 1"),
    ("value_ratio", "0.5", "a number with 0 <= value_ratio < 1"),
    ("window", 4.0, "an integer from 2 to"),
    ("window", True, "an integer from 2 to"),
    ("window", None, "an integer from 2 to"),
    ("sink_tokens", 1.0, "an integer from 0 to"),
    ("recent_tokens", "all", "an integer from 0 to"),
    ("recent_tokens", True, "an integer from 0 to"),
    ("min_tokens", 0.5, "an integer from 0 to"),
    ("evict", "h2o(tokens=8)", "the text of a scorer, or texts by layer: scorer 'h2o(tokens=8)'"),
    ("evict", "knorm", "scorer 'knorm': "),
    ("evict", "knorm(tokens=0)", "option 'tokens' of scorer 'knorm' is 0: allowed is an integer"),
    ("evict", "knorm(tokens=63)", "tokens of knorm(tokens=63) is 63: allowed is 64 or more"),
    ("evict", "snapkv(tokens=60)", "is 60: allowed is 64 or more: the first 0, the latest 64, and"),
    ("evict", {"*": "snapkv(tokens=99,kernel=4)"}, "option 'kernel' of scorer 'snapkv' is 4"),
    ("evict", "snapkv(tokens=99,pooling=min)", "'min': allowed is average or max"),
    ("evict", "pyramidkv(tokens=99)", "missing 1 required keyword-only argument: 'layers'"),
    ("evict", "streamingllm(tokens=99,n_sink=-1)", "'n_sink' of scorer 'streamingllm' is -1"),
    ("evict", 7, "the text of a scorer, or texts by layer"),
    *(("budget", value, "a number with 0 < budget <= 1, or one of 'near-lossless', 'balanced', ")
      for value in (0, -0.1, 1.5, HUGE, math.nan, True, "0.3", "tiny", [0.5], 0.5j)),
    *(("context_parallel", value, "a process group that this rank is in, or a DeviceMesh of one")
      for value in (2, "group", [])),
    ("strict", 1, "True or False"),
    ("strict", None, "True or False"),
]  # fmt: skip
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
    *({"context_parallel": group} for group in (None, Group("0", 2, 1))),
    *({"budget": budget} for budget in (1, 0.001, "smallest", None)),
    *({f"{side}_format": text} for side in ("key", "value") for text in ("dense", "int8",
      "pruned(kept=3,stored=int8)", "spark(kept=26,recovery=none)")),
    {"key_format": (("*.0.*", "dense"), ("*", "int8"))},
    {"value_format": ()},
    *({"evict": f"{name}(tokens=64)"} for name in ("knorm", "keydiff", "streamingllm", "snapkv")),
    {"evict": "pyramidkv(tokens=64,layers=1)"},
    {"evict": (("*.0.*", "knorm(tokens=64)"),)},
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "allowed"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_value_raises_and_is_named(name: str, value: Any, allowed: str) -> None:
    for build in (lambda options: SparkConfig(**options), SparkConfig.from_options):
        with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is compared below)
            build({name: value})
        assert isinstance(caught.value, SparkError)
        assert str(caught.value).startswith(f"option {name!r} is {value!r}: allowed is ")
        assert allowed in str(caught.value)


def test_what_no_rank_has_all_of_does_not_go_with_spread_tokens() -> None:
    for other in ({"evict": "knorm(tokens=64)"}, {"min_tokens": 9}):
        with pytest.raises(OptionError, match=r"'context_parallel' and '[a-z_]+' are both given"):
            SparkConfig(context_parallel=Group("0", 2, 1), **other)


def test_every_option_has_a_wrong_value_above() -> None:
    tried = {name for name, *_ in WRONG}
    assert tried == {field.name for field in dataclasses.fields(SparkConfig)}


@pytest.mark.parametrize("options", EXTREMES, ids=str)
def test_extremes_are_allowed(options: dict[str, Any]) -> None:
    config = SparkConfig.from_options(options)
    assert {name: getattr(config, name) for name in options} == options


@pytest.mark.parametrize("name", ["keyratio", "", "packed_length", "Window"])
def test_an_unknown_option_raises_and_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"option '{name}' is 4: allowed is one of the options"):
        SparkConfig.from_options({name: 4})


@pytest.mark.parametrize("options", ["x", "", 7, [("window", 4)], [], {"window"}])
def test_options_that_are_no_mapping_are_named(options: Any) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is compared below)
        SparkConfig.from_options(options)
    assert str(caught.value) == f"options is {options!r}: allowed is a mapping of names to values"


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


def test_recent_is_the_window_unless_given() -> None:
    assert SparkConfig(window=7).recent == 7
    assert SparkConfig(window=7, recent_tokens=0).recent == 0


FORMATS: list[tuple[dict[str, Any], str, str]] = [
    ({"saliency": "absolute"},
     "spark(kept=6,stored=model,recovery=degenerate,saliency=absolute)", "dense"),
    ({"key_ratio": 0}, "dense", "dense"),
    ({"key_ratio": 0.05}, "dense", "dense"),  # less than a channel
    ({"key_ratio": 0, "key_dtype": "int8", "value_dtype": "int8"}, "int8", "int8"),
    ({"key_ratio": 0.8, "recovery": "none", "saliency": "absolute", "key_dtype": "int8"},
     "spark(kept=3,stored=int8,recovery=none,saliency=absolute)", "dense"),
    ({"key_ratio": 0, "value_ratio": 0.5}, "dense", "pruned(kept=4,stored=model)"),
    ({"key_ratio": 0, "value_ratio": 0.99, "value_dtype": "int8"}, "dense",
     "pruned(kept=1,stored=int8)"),
    ({"key_format": "int8", "value_format": "dense", "value_ratio": 0.5}, "int8", "dense"),
    ({"key_format": "pruned(kept=2)", "value_format": "spark(kept=2)"},
     "pruned(kept=2,stored=model)",
     "spark(kept=2,stored=model,recovery=degenerate,saliency=squared)"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "key", "value"), FORMATS, ids=range(len(FORMATS)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options_choose_the_formats(
    options: dict[str, Any], key: str, value: str, dtype: torch.dtype
) -> None:
    config = SparkConfig(**options)
    formats = config.format_for("key", 12, dtype), config.format_for("value", 8, dtype, "layer")
    assert [format.text for format in formats] == [key, value]
    assert [format.head_dim for format in formats] == [12, 8]
    assert {format.dtype for format in formats} == {dtype}


@pytest.mark.parametrize(
    ("dtype", "bits", "dim"),
    [
        *((torch.bfloat16, 6, dim) for dim in (16, 64, 65, 128)),
        *((torch.float32, 8, dim) for dim in (4, 16, 64, 65, 128)),
    ],
)
def test_without_options_tokens_take_six_bits_or_eight(
    dtype: torch.dtype, bits: int, dim: int
) -> None:
    texts = [SparkConfig().format_for(side, dim, dtype).text for side in SIDES]
    text = f"quantized(bits={bits},scaled={{}},rotated=True)"
    assert texts == [text.format("True"), text.format("False")]


def test_first_tokens_stay_dense_beside_quantized_ones_where_a_cache_grows() -> None:
    config, size = SparkConfig(), (64, torch.bfloat16)
    pair = [config.format_for(side, *size) for side in SIDES]
    assert config.spec(*pair).sinks == 4
    assert config.spec(*pair, static=True).sinks == 0
    assert config.spec(*pair, slides=True).sinks == 0
    assert config.spec(*(Dense(*size) for _ in SIDES)).sinks == 0
    assert SparkConfig(sink_tokens=2).spec(*pair, static=True).sinks == 2
    evicting = SparkConfig(evict="knorm(tokens=64)")
    assert evicting.spec(*pair).sinks == 0  # which would leave no room for a page


NO_SMALLER: list[tuple[dict[str, Any], str, int, torch.dtype]] = [
    ({"key_ratio": 0.1}, "key", 64, torch.bfloat16),
    ({"key_ratio": 0.5}, "key", 4, torch.bfloat16),  # as many bytes
    ({"value_ratio": 0.05}, "value", 32, torch.float32),
    ({"value_dtype": "int8"}, "value", 1, torch.float16),
    ({"key_ratio": 0.3, "recovery": "gaussian"}, "key", 16, torch.float16),
]


@pytest.mark.parametrize(("options", "side", "dim", "dtype"), NO_SMALLER, ids=str)
def test_what_would_take_no_fewer_bytes_stays_dense_and_is_told(
    options: dict[str, Any], side: Any, dim: int, dtype: torch.dtype
) -> None:
    config = SparkConfig(**options)
    with pytest.warns(SparkWarning, match=f"{side}s of {dim} {dtype} channels stay dense"):
        assert config.format_for(side, dim, dtype).text == "dense"
    chosen = config._chosen(side, dim, dtype)
    assert chosen.text != "dense"
    named = SparkConfig(**{f"{side}_format": chosen.text})
    assert named.format_for(side, dim, dtype) == chosen


@pytest.mark.filterwarnings("ignore::spark_compile.SparkWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [2, 5, 32])
@pytest.mark.parametrize("dim", [1, 2, 7, 8, 64, 100])
def test_no_page_is_larger_than_dense_tokens(window: int, dim: int, dtype: torch.dtype) -> None:
    for ratio in (0.0, 0.05, 0.1, 0.3, 0.5, 0.8, 0.99):
        for stored in ("model", "int8"):
            config = SparkConfig(
                key_ratio=ratio, value_ratio=ratio, key_dtype=stored, value_dtype=stored,
                window=window, recovery="gaussian",
            )  # fmt: skip
            spec = config.spec(*(config.format_for(side, dim, dtype) for side in SIDES))
            dense = round_up(window * dim * dtype.itemsize, 8)
            assert all(spec.pages(side).page_bytes <= dense for side in SIDES)


PATTERNS = {"*.layers.0.*": "dense", "*.layers.[12].*": "int8", "*.layers.1.attn": "spark(kept=2)"}


@pytest.mark.parametrize("as_pairs", [False, True])
def test_the_first_pattern_that_matches_a_layer_counts(as_pairs: bool) -> None:
    named: Any = tuple(PATTERNS.items()) if as_pairs else PATTERNS
    config = SparkConfig(key_format=named, key_ratio=0.5)

    def text(layer: str) -> str:
        return config.format_for("key", 12, torch.float32, layer).text

    assert text("model.layers.0.attn") == "dense"
    assert text("model.layers.1.attn") == text("model.layers.2.attn") == "int8"
    assert text("model.layers.10.attn").startswith("spark(kept=6")  # as the options say
    assert text("MODEL.LAYERS.0.ATTN").startswith("spark(kept=6")
    assert text("").startswith("spark(kept=6")
    assert config.format_for("value", 12, torch.float32, "model.layers.0.attn").text == "dense"


def test_a_mapping_and_its_pairs_are_one_key() -> None:
    config = SparkConfig(key_format=PATTERNS)
    pairs = SparkConfig(key_format=tuple(PATTERNS.items()))
    assert config == pairs
    assert hash(config) == hash(pairs)
    assert config != SparkConfig(key_format=dict(reversed(PATTERNS.items())))
    assert SparkConfig.from_options({"key_format": PATTERNS}) == config
    assert dataclasses.replace(config, window=9).key_format == config.key_format


def test_a_changed_mapping_changes_no_config() -> None:
    named = {"*": "dense"}
    config = SparkConfig(key_format=named)
    named["*"] = "int8"
    assert config.format_for("key", 12, torch.float32).text == "dense"


def test_a_format_that_the_head_is_too_small_for_says_so() -> None:
    config = SparkConfig(key_format="spark(kept=26)")
    with pytest.raises(
        ValueError, match="option 'kept' of format 'spark' is 26: allowed is 1 to 12"
    ):
        config.format_for("key", 12, torch.float32)


def test_the_spec_has_the_policy() -> None:
    config = SparkConfig(window=5, sink_tokens=2, recent_tokens=3, min_tokens=40)
    formats = (
        config.format_for("key", 12, torch.float32),
        config.format_for("value", 8, torch.float32),
    )
    spec = config.spec(*formats)
    assert (spec.key, spec.value) == formats
    assert (spec.window, spec.recent, spec.sinks, spec.min_tokens) == (5, 3, 2, 40)
    assert config.spec(*formats) is spec
    assert config.spec(*formats, slides=True).sinks == 0
    assert SparkConfig(window=5).spec(*formats).recent == 5


def test_a_scorer_goes_with_the_layer_and_with_no_window_that_slides() -> None:
    named = {"*.0.*": "knorm(tokens=80)", "*": "pyramidkv(tokens=70,layers=3)"}
    config = SparkConfig(evict=named)
    formats = [config.format_for(side, 12, torch.float32) for side in SIDES]
    texts = [config.spec(*formats, layer=f"model.layers.{i}.attn").evict.text for i in range(3)]  # type: ignore[union-attr]
    assert texts == ["knorm(tokens=80)", *(f"snapkv(tokens={64 + share},window=64,kernel=5,"
                     "pooling=average)" for share in (6, 0))]  # fmt: skip
    assert config.spec(*formats, layer="model.layers.0.attn", slides=True).evict is None
    with pytest.raises(ValueError, match="has to know which of 3 layers 'attn' is"):
        config.spec(*formats, layer="attn")
    assert SparkConfig().spec(*formats).evict is None


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"min_tokens": 5}, "min_tokens is 5: allowed is 0 where knorm evicts"),
        ({"sink_tokens": 30}, "tokens of knorm(tokens=80) is 80: allowed is 94 or more"),
        ({"recent_tokens": 51}, "is 80: allowed is 83 or more: the first 0, the latest 51, and"),
    ],
)
def test_a_scorer_goes_with_the_other_options(numbers: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=r"option 'evict' is") as caught:
        SparkConfig(evict="knorm(tokens=80)", **numbers)
    assert said in str(caught.value)
