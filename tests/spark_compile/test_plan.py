"""Plans as files and as an argument of ``optimize``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import spark_compile
from spark_compile import OptionError, Plan, SparkWarning
from spark_compile.plan import SCHEMA, Measured, PlannedLayer
from spark_compile.transformers_names import returned_cache

INT4, INT8 = "quantized(bits=4,scaled=False,rotated=True)", "int8"
LAYERS = [
    PlannedLayer("model.layers.0.self_attn", INT8, INT4, 0.4, {INT8: 0.1}, {INT4: 0.2, INT8: 0.0}),
    PlannedLayer("model.layers.1.self_attn", "dense", INT8, 0.8, {"dense": 0}, {INT8: 1e-5}),
]
MEASURED = Measured(
    "LlamaForCausalLM",
    "float32",
    "float32",
    1e-9,
    ((16, 16),),
    2,
    128,
    32,
    {"torch": torch.__version__},
)
PLAN = Plan(0.65, 0.6, tuple(LAYERS), MEASURED)


def llama(**sizes: Any) -> Any:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, **{"num_hidden_layers": 2, **sizes},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_a_saved_plan_is_the_same(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN
    assert Plan.load(str(tmp_path / "plan.json")).kl == pytest.approx(0.30001)
    assert json.loads((tmp_path / "plan.json").read_text())["schema"] == SCHEMA


def changed(path: str, value: Any) -> dict[str, Any]:
    """The plan's data with one entry replaced, or removed where the value is ``...``."""
    data: Any = json.loads(json.dumps(PLAN.as_dict()))
    *before, last = path.split("/")
    inside = data
    for part in before:
        inside = inside[int(part) if part.isdigit() else part]
    if value is ...:
        del inside[last]
    else:
        inside[last] = value
    return dict(data)


WRONG = [
    ("schema", 2, "has schema 2: allowed is 1"),
    ("schema", ..., "has schema None: allowed is 1"),
    ("layers", ..., r"lacks, or has besides: \['layers'\]"),
    ("measured/dtype", ..., r"'measured' of plan .* lacks, or has besides: \['dtype'\]"),
    ("more", 1, r"lacks, or has besides: \['more'\]"),
    ("budget", "small", "'budget' of plan .* is 'small': allowed is a number"),
    ("share", True, "is True: allowed is a number"),
    ("layers", {}, "is {}: allowed is a list"),
    ("layers", [3], "entry 0 lacks, or has besides: int"),
    ("layers/0/key", "int3", "'key' of 'layers' of .*, entry 0: format 'int3' is not known"),
    ("layers/0/value", 3, "'value' of .* is 3: allowed is a text"),
    ("layers/0/key", "dense", "has no divergence of its key format dense"),
    ("layers/0/value_kl", [], r"'value_kl' of .* is \[\]: allowed is a mapping"),
    ("measured/head_sizes", 64, "'head_sizes' of .* is 64: allowed is a list"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG, ids=range(len(WRONG)))
def test_a_file_that_is_no_plan_is_named_with_what_is_wrong(
    tmp_path: Path, path: str, value: Any, message: str
) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(changed(path, value)))
    with pytest.raises(OptionError, match=message) as caught:
        Plan.load(tmp_path / "plan.json")
    assert "plan.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_a_file_of_something_else_is_no_plan(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(OptionError, match=r"is no JSON|has schema None"):
        spark_compile.optimize(llama(), plan=tmp_path / "plan.json")


@pytest.mark.parametrize("as_file", [False, True])
def test_each_layer_is_stored_as_planned(tmp_path: Path, as_file: bool) -> None:
    PLAN.save(tmp_path / "plan.json")
    plan = tmp_path / "plan.json" if as_file else PLAN
    model = spark_compile.optimize(llama(), plan=plan, inner="eager", sink_tokens=2)
    with torch.no_grad():
        cache = returned_cache(model(input_ids=torch.randint(64, (1, 90)), use_cache=True))
    for part, layer in zip(cache.layers, LAYERS, strict=True):
        spec = part.keys.spec
        assert (spec.key.text, spec.value.text, spec.sinks) == (layer.key, layer.value, 2)
        assert part.keys.packed_tokens() == 32


@pytest.mark.parametrize("options", [
    {"budget": 0.5}, {"key_format": "int8"}, {"value_format": None}, {"key_ratio": 0.5},
    {"value_ratio": 0.1}, {"key_dtype": "int8"}, {"value_dtype": "model"}, {"recovery": "none"},
])  # fmt: skip
def test_nothing_else_may_choose_the_formats(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"option '{next(iter(options))}' is .*: beside a plan"):
        spark_compile.optimize(llama(), plan=PLAN, **options)


def test_a_plan_for_other_layers_names_them() -> None:
    with pytest.raises(
        OptionError, match=r"for layers model\.layers\.1\.self_attn, which LlamaFor"
    ):
        spark_compile.optimize(llama(num_hidden_layers=1), plan=PLAN)
    names = [dataclasses.replace(LAYERS[0], layer=f"h.{number}") for number in range(5)]
    with pytest.raises(OptionError, match=r"h\.0, h\.1, h\.2 and 2 more, which .* made for Llama"):
        spark_compile.optimize(llama(), plan=dataclasses.replace(PLAN, layers=tuple(names)))


def test_a_model_of_another_dtype_is_told() -> None:
    with pytest.warns(SparkWarning, match="made for float32, the model is in bfloat16"):
        spark_compile.optimize(llama().bfloat16(), plan=PLAN)


def test_layers_that_are_compiled_alone_follow_no_plan() -> None:
    with pytest.raises(OptionError, match="a plan has texts by layer"):
        spark_compile.optimize(llama(), plan=PLAN, regional=True)


@pytest.mark.parametrize("plan", [7, {"schema": 1}])
def test_something_else_is_no_plan(plan: Any) -> None:
    with pytest.raises(OptionError, match="allowed is a Plan or the path of one"):
        spark_compile.optimize(llama(), plan=plan)
