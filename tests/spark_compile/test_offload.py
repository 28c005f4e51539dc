"""Weights and caches on other devices: what moves them is not part of the graphs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from compiled import EXACT, is_compressed
from states import prefill, spec_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer, StaticLayer
from zoo import CACHE

from spark_compile import SparkConfig, kv_bytes, optimize
from spark_compile.report import collect_report

IDS = torch.arange(1, 21).reshape(1, 20)
ARGUMENTS = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0,
             "return_dict_in_generate": True}  # fmt: skip
NOT_LAYERS = dict.fromkeys(
    ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
)


def llama(layers: int = 3) -> Any:
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, num_hidden_layers=layers, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(7)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def mapped(folder: Path, layers: int = 3) -> Any:
    """The first layer on the CPU, all others on disk."""
    places = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(layers)}
    return dispatch_model(llama(layers), NOT_LAYERS | places, offload_dir=str(folder))


SPREAD = {
    "device_map": mapped,
    "disk_offload": lambda folder: disk_offload(llama(), str(folder), torch.device("cpu")),
    "cpu_offload": lambda folder: cpu_offload(llama(), torch.device("cpu")),
}


def expected(layers: int = 3) -> torch.Tensor:
    return llama(layers).generate(IDS, **ARGUMENTS).sequences


def are_compressed(cache: Any) -> bool:
    return is_compressed([(layer.keys, layer.values) for layer in cache.layers])


def check(model: Any, layers: int = 3) -> None:
    """All layers are compressed, in graphs that are whole, and compiled once."""
    with collect_report() as report:
        output = model.generate(IDS, **ARGUMENTS)
        assert [graph.phase for graph in report.graphs] == ["prefill"] * layers + [
            "decode"
        ] * layers
        assert torch.equal(model.generate(IDS, **ARGUMENTS).sequences, output.sequences)
    assert len(report.graphs) == 2 * layers
    assert not any(graph.graph_break for graph in report.graphs)
    assert torch.equal(output.sequences, expected(layers))
    assert are_compressed(output[CACHE])


@pytest.mark.parametrize("name", SPREAD)
def test_layers_whose_weights_are_elsewhere(name: str, tmp_path: Path) -> None:
    model = optimize(SPREAD[name](tmp_path), strict=True, **EXACT)
    check(model)
    assert all(weight.is_meta for weight in model.model.layers[2].parameters())


def test_more_layers_than_dynamo_keeps_graphs(tmp_path: Path) -> None:
    with torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=3):
        check(optimize(mapped(tmp_path, 5), strict=True, **EXACT), 5)


def test_layers_that_come_back(tmp_path: Path) -> None:
    model = optimize(cpu_offload(llama(), torch.device("cpu")), strict=True, **EXACT)
    model.generate(IDS, **ARGUMENTS)
    remove_hook_from_submodules(model)
    assert not any(weight.is_meta for weight in model.parameters())
    assert torch.equal(model.generate(IDS, **ARGUMENTS).sequences, expected())
    assert not any(weight.is_meta for weight in model.parameters())


def test_a_copy_of_a_model_on_disk(tmp_path: Path) -> None:
    model = optimize(mapped(tmp_path), strict=True, **EXACT)
    check(copy.deepcopy(model))
    assert torch.equal(model.generate(IDS, **ARGUMENTS).sequences, expected())


@pytest.mark.filterwarnings("ignore:spark found no attention:spark_compile.SparkWarning")
def test_a_hook_that_does_something_else_stays() -> None:
    seen = []

    class Watches(ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(module)
            return args, kwargs

    model = llama(1)
    attention = add_hook_to_module(model.model.layers[0].self_attn, Watches())
    output = optimize(model, **EXACT).generate(IDS, **ARGUMENTS)
    assert attention in seen
    assert torch.equal(output.sequences, expected(1))
    assert are_compressed(output[CACHE])


def test_formats_by_layer_need_the_whole_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'key_format' has texts by layer: .* a device map"):
        optimize(mapped(tmp_path), key_format={"*.0.*": "dense"})


class Moves:
    """Stands for the other device: layers note when they go there and come, and are copied."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, int]] = []
        self.bytes = 0
        self._layers: list[Any] = []
        self._away: set[int] = set()
        for kind in (DynamicLayer, StaticLayer):
            monkeypatch.setattr(kind, "offload", lambda layer: self._offload(layer))
            monkeypatch.setattr(kind, "prefetch", lambda layer: self._prefetch(layer))

    def _number(self, layer: Any) -> int:
        """By the order in which layers leave for the first time."""
        if layer not in self._layers:
            self._layers.append(layer)
        return self._layers.index(layer)

    def _offload(self, layer: Any) -> None:
        for name in ("keys", "values"):
            state = getattr(layer, name)
            self.bytes += state.stored_bytes()
            setattr(layer, name, state.to("cpu", non_blocking=True, copy=True))
        self._away.add(self._number(layer))
        self.log.append(("off", self._number(layer)))

    def _prefetch(self, layer: Any) -> None:
        if layer in self._layers and self._number(layer) in self._away:
            self._away.remove(self._number(layer))
            self.log.append(("on", self._number(layer)))


def test_an_offloaded_cache_moves_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    moves = Moves(monkeypatch)
    model = optimize(llama(), strict=True, **EXACT)
    assert torch.equal(model.generate(IDS, **ARGUMENTS).sequences, expected())
    with collect_report() as report:
        output = model.generate(IDS, cache_implementation="offloaded", **ARGUMENTS)
    assert torch.equal(output.sequences, expected())
    assert are_compressed(output[CACHE])
    assert [graph.phase for graph in report.graphs] == ["prefill"] * 3 + ["decode"] * 3
    # The prompt's layers go; the first one comes back with the last.
    assert moves.log[:5] == [("off", 0), ("off", 1), ("on", 0), ("off", 2), ("on", 1)]
    assert moves.log[5:11] == [("off", 0), ("on", 2), ("off", 1), ("on", 0), ("off", 2), ("on", 1)]
    stored = kv_bytes(output[CACHE])
    assert 0 < moves.bytes <= 8 * stored
    assert model.generate(IDS, **ARGUMENTS)[CACHE].offloading is False


def test_weights_and_a_cache_that_are_both_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    moves = Moves(monkeypatch)
    model = optimize(mapped(tmp_path, 2), strict=True, **EXACT)
    output = model.generate(IDS, cache_implementation="offloaded", **ARGUMENTS)
    assert torch.equal(output.sequences, expected(2))
    assert are_compressed(output[CACHE])
    assert moves.log[:4] == [("off", 0), ("on", 0), ("off", 1), ("on", 1)]


def test_an_offloaded_static_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    moves = Moves(monkeypatch)
    model = optimize(llama(1), strict=True, **EXACT)
    output = model.generate(
        IDS, cache_implementation="offloaded_static", disable_compile=True, **ARGUMENTS
    )
    assert torch.equal(output.sequences, expected(1))
    assert are_compressed(output[CACHE])
    assert ("off", 0) in moves.log


class Operators(TorchDispatchMode):
    """Notes what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        on_cpu = [arg for arg in args if isinstance(arg, torch.Tensor) and not arg.is_meta]
        if on_cpu:
            self.names.add(func.__name__)
        result: torch.Tensor = func(*args, **(kwargs or {}))
        return result


@pytest.mark.parametrize("length", [3, 21])
def test_nothing_is_read_of_a_state_that_goes_to_an_accelerator(length: int) -> None:
    """It may still be on its way from there."""
    config = SparkConfig(window=4)
    made = prefill(config, length)
    for state in made.states:
        copied = state.to("cpu", copy=True)
        with Operators() as operators:
            moved = copied.to("meta", non_blocking=True)
        assert operators.names == {"_to_copy.default"}
        assert moved.device.type == "meta"
        assert type(moved) is type(state)
        assert moved.spec == spec_of(config)
        assert moved.packed_tokens() == state.packed_tokens()
        assert moved.shape == state.shape


def test_an_earlier_handle_goes_with_counters_of_its_own() -> None:
    keys = prefill(SparkConfig(window=4), 21).keys
    later = keys.appended(torch.ones(2, 3, 1, 12))
    moved = keys.moved(torch.Tensor.clone)
    assert torch.equal(moved.dense(), keys.dense())
    assert torch.equal(later.moved(torch.Tensor.clone).dense(), later.dense())
