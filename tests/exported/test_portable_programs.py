"""Portable programs: exported decoders that run where this library cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spark_compile
from spark_compile.config import SparkConfig
from spark_compile.exported.decoder import PHASES, ExportError, decoder_of
from spark_compile.exported.folder import _check_archive
from spark_compile.exported.graph import Graph
from spark_compile.exported.portable import check_aten
from spark_compile.exported.tracing import trace

CAPACITY, PROMPTS, NEW = 48, (2, 13, 21), 20

ELSEWHERE = """
import json
import sys
sys.modules["spark_compile"] = None
import torch
from safetensors.torch import load_file
folder = sys.argv[1]
manifest = json.load(open(f"{folder}/out/manifest.json"))
weights = load_file(f"{folder}/out/model.safetensors")
programs, own = {}, {}
for phase, program in manifest["programs"].items():
    programs[phase] = torch.export.load(f"{folder}/out/{program['file']}").module()
    own[phase] = {name: weights[name] for name in program["weights"]}
generated = []
with torch.no_grad():
    for prompt in torch.load(f"{folder}/prompts.pt"):
        states = {
            state["name"]: torch.zeros(state["shape"], dtype=getattr(torch, state["dtype"]))
            for state in manifest["states"]
        }
        count, tokens, none = prompt.shape[1], [], torch.zeros(1, dtype=torch.int64)
        last = torch.tensor([count - 1])
        logits = programs["prefill"](own["prefill"], states, prompt, none, last)
        for position in range(count, count + int(sys.argv[2])):
            tokens.append(logits.argmax(-1))
            at = torch.tensor([position])
            logits = programs["decode"](own["decode"], states, tokens[-1], at, none)
        generated.append(torch.cat(tokens, 1))
torch.save(generated, f"{folder}/generated.pt")
"""


def llama(layers: int = 1) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=128,
        initializer_range=0.2, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def graphs_of(model: nn.Module, batch: int = 1, **options: object) -> dict[str, Graph]:
    config = SparkConfig.from_options({"window": 8, "recent_tokens": 4, **options})
    decoder = decoder_of(model, CAPACITY, batch)
    return {phase: trace(decoder, phase, config, CAPACITY, batch) for phase in PHASES}


@pytest.mark.slow
def test_generates_without_this_library(tmp_path: Path) -> None:
    model = llama()
    manifest = spark_compile.export(
        model, tmp_path / "out", max_tokens=CAPACITY, key_ratio=0, window=8, recent_tokens=4,
        portable=True,
    )  # fmt: skip
    assert manifest.portable
    assert [site["refusal"] for g in manifest.report["graphs"] for site in g["sites"]] == [None] * 2
    prompts = [torch.randint(0, 64, (1, count)) for count in PROMPTS]
    torch.save(prompts, tmp_path / "prompts.pt")
    command = [sys.executable, "-I", "-c", ELSEWHERE, str(tmp_path), str(NEW)]
    subprocess.run(command, check=True)
    for prompt, generated in zip(prompts, torch.load(tmp_path / "generated.pt"), strict=True):
        expected = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(generated, expected[:, prompt.shape[1] :])


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_portable_folder_loads(tmp_path: Path, inner: str) -> None:
    """It has constants, which are plain bytes."""
    model, generated = llama(), []
    options = {"key_format": "quantized(bits=4)", "value_format": "dense", "window": 8}
    for portable in (False, True):
        folder = tmp_path / str(portable)
        spark_compile.export(model, folder, max_tokens=CAPACITY, portable=portable, **options)
        loaded = spark_compile.load(folder, inner=inner if portable else "eager")
        prompt = torch.arange(21).unsqueeze(0)
        generated.append(loaded.generate(prompt, max_new_tokens=NEW, do_sample=False))
    assert torch.equal(*generated)


def assert_same_logits(graphs: Mapping[str, Graph], batch: int = 1) -> None:
    """Raise unless portable programs compute what the graphs compute, prompt and steps."""
    programs = {phase: graph.program(portable=True).module() for phase, graph in graphs.items()}
    for count in PROMPTS:
        mine, theirs = (
            {n: torch.zeros(s.shape, dtype=s.dtype) for n, s in graphs["decode"].states.items()}
            for _ in range(2)
        )
        for position in (0, *range(count, count + NEW), 5, 6):
            phase, tokens = ("decode", 1) if position else ("prefill", count)
            ids, graph = torch.randint(0, 32, (batch, tokens)), graphs[phase]
            given = ids, torch.tensor([position]), torch.tensor([tokens - 1]), *graph.inputs[3:]
            with torch.no_grad():
                actual = programs[phase](dict(graph.weights), mine, *given)
                expected = graph.run(theirs, ids, position, tokens - 1)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compressed_in_a_batch_with_a_mask() -> None:
    graphs = graphs_of(
        llama(2), batch=2, key_format="quantized(bits=4,scaled=True)",
        value_format="pruned(kept=5)", sink_tokens=2,
    )  # fmt: skip
    assert_same_logits(graphs, batch=2)


class Handwritten(nn.Module):
    """A prompt is read from the buffers that it has been written to."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(32, 32), nn.Linear(32, 32)
        self.qkv = nn.Linear(32, 96)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, 4, CAPACITY, 8))

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(ids)
        query, key, value = self.qkv(x).unflatten(-1, (12, 8)).transpose(1, 2).chunk(3, dim=1)
        self.keys[:, :, positions] = key
        self.values[:, :, positions] = value
        mask = torch.arange(CAPACITY) <= positions[:, None]
        seen = nn.functional.scaled_dot_product_attention(query, self.keys, self.values, mask)
        logits: Tensor = self.out(x + seen.transpose(1, 2).flatten(2))
        return logits


@pytest.mark.slow
def test_a_prompt_that_is_read_from_the_buffers() -> None:
    torch.manual_seed(0)
    graphs = graphs_of(Handwritten().eval(), key_format="spark(kept=4)", value_format="int8")
    assert "spark.step" in graphs["prefill"].module.code
    assert_same_logits(graphs)


def test_what_is_not_portable_is_refused() -> None:
    decoder = decoder_of(llama(), CAPACITY, 1)
    config = SparkConfig.from_options({"window": 8, "evict": "knorm(tokens=32)"})
    graph = trace(decoder, "decode", config, CAPACITY, 1)
    with pytest.raises(ExportError, match="the decode: the scorer knorm"):
        graph.program(portable=True)


def test_operators_of_others_are_found() -> None:
    class Own(nn.Module):
        def forward(self, key: Tensor) -> Any:
            return torch.ops.spark.kv_append(None, key, None, 2)

    program = torch.export.export(Own(), (torch.zeros(1, 1, 2, 2),), strict=False)
    with pytest.raises(ExportError, match=r"the operators spark\.kv_append\.default"):
        check_aten(program)


@pytest.mark.parametrize("change", [{"use_pickle": True}, {"path_name": "custom_obj_0"}])
def test_constants_that_torch_would_unpickle_are_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    constant = {"path_name": "tensor_0", "use_pickle": False}
    for name, config in (("plain", constant), ("pickled", {**constant, **change})):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            data = json.dumps({"config": {"lifted_tensor_0": config}})
            archive.writestr("decode/data/constants/model_constants_config.json", data)
            archive.writestr("decode/data/constants/tensor_0", b"")
    _check_archive(tmp_path / "plain")
    with pytest.raises(ExportError, match="tensors of its own, which no export writes"):
        _check_archive(tmp_path / "pickled")
