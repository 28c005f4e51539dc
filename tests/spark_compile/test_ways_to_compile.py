"""Arguments of ``torch.compile`` and states of a model and of torch: results are the eager ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled import EXACT, is_compressed
from decoders import decode, decoder, prompt
from zoo import CACHE, tiny

from spark_compile import SparkError, SparkWarning, optimize

CLOSE = {"atol": 2e-5, "rtol": 2e-5}
ARGUMENTS = {"max_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize("arguments", [{"dynamic": True}, {"dynamic": False}, {"fullgraph": True}])
def test_arguments_of_torch_compile(arguments: dict[str, Any]) -> None:
    model, options = decoder("empty_first", layers=1), {**EXACT, "strict": True}
    compiled = torch.compile(model, backend="spark", options=options, **arguments)
    for length, batch in ((12, 1), (30, 1), (2, 2)):
        tokens = prompt(length, batch)
        exact, _ = decode(model, tokens, None, 9)
        logits, past = decode(compiled, tokens, None, 9)
        torch.testing.assert_close(logits, exact, **CLOSE)
        assert is_compressed(past)


def test_exported_modules() -> None:
    model, tokens = decoder(layers=1), prompt(13)
    with torch.no_grad():
        exact, dense = model(tokens)
        length, cached = (torch.export.Dim(name, min=2, max=400) for name in ("length", "cached"))
        sizes: Any = ({1: length},)
        prefill = torch.export.export(model, (tokens,), dynamic_shapes=sizes).module()
        sizes = (None, (({2: cached}, {2: cached}),))
        step = torch.export.export(model, (prompt(1), dense), dynamic_shapes=sizes).module()
        logits, past = optimize(prefill, strict=True, **EXACT)(tokens)
        torch.testing.assert_close(logits, exact, **CLOSE)
        optimize(step, strict=True, **EXACT)
        for token in prompt(9).split(1, 1):
            exact, dense = model(token, dense)
            logits, past = step(token, past)
            torch.testing.assert_close(logits, exact, **CLOSE)
    assert is_compressed(past)
    assert past[0][0].packed_tokens() >= 16


@pytest.mark.parametrize("way", ["train", "checkpointing", "half", "inference"])
def test_a_model_generates_whatever_it_is_in(way: str) -> None:
    model, ids = tiny("llama", "sdpa"), prompt(20)
    if way == "half":
        model.half()
    elif way in ("train", "checkpointing"):
        model.train()
    if way == "checkpointing":
        model.gradient_checkpointing_enable()
    with torch.inference_mode(way == "inference"):
        expected = model.generate(ids, **ARGUMENTS)
        optimize(model, strict=True, **EXACT)
        output = model.generate(ids, return_dict_in_generate=True, **ARGUMENTS)
    assert torch.equal(output.sequences, expected)
    assert is_compressed([(layer.keys, layer.values) for layer in output[CACHE].layers])


def test_a_model_that_keeps_no_cache_is_said() -> None:
    model, ids = tiny("llama", "sdpa"), prompt(20)
    arguments = {**ARGUMENTS, "use_cache": False, "max_new_tokens": 3}
    expected = model.generate(ids, **arguments)
    optimize(model, **EXACT)
    with pytest.warns(SparkWarning, match="the keys are not returned by the graph: no cache"):
        assert torch.equal(model.generate(ids, **arguments), expected)
    torch._dynamo.reset()
    with pytest.raises(SparkError, match="no cache is kept"):
        optimize(model, strict=True, **EXACT).generate(ids, **arguments)


MODES: dict[str, Any] = {
    "no_grad": torch.no_grad, "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize(
    ("first", "then"),
    [("no_grad", "inference"), ("inference", "no_grad"), ("autocast", "no_grad"),
     ("no_grad", "autocast"), ("autocast", "autocast")],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:spark rewrote nothing:spark_compile.SparkWarning")
def test_a_cache_of_one_mode_goes_on_in_another(first: str, then: str) -> None:
    """A cache of another precision may be refused, never wrong."""
    model, tokens = decoder(layers=1), prompt(13)
    compiled = torch.compile(model, backend="spark", options=EXACT)
    with MODES[first]():
        dense, past = model(tokens)[1], compiled(tokens)[1]
    with MODES[then]():
        for token in prompt(7).split(1, 1):
            exact, dense = model(token, dense)
            logits, past = compiled(token, past)
            tolerance = {"atol": 2e-2, "rtol": 2e-2} if "autocast" in (first, then) else CLOSE
            torch.testing.assert_close(logits, exact, **tolerance)
            assert past[0][0].dtype == dense[0][0].dtype
    assert first != then or is_compressed(past)
