"""``optimize`` compiles what ``generate`` calls, through wrappers of all kinds, or complains."""

from __future__ import annotations

import copy
import inspect
import io
import warnings
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from compiled import EXACT, is_compressed
from decoders import ATTENTIONS, Decoder, decode, prompt
from torch import Tensor, nn
from zoo import CACHE, tiny

from spark_compile import SparkError, SparkWarning, optimize
from spark_compile.report import collect_report

NOTHING = "ran nothing that spark has compiled"


class Speaker(Decoder):
    """A decoder with a ``generate``."""

    def __init__(self) -> None:
        super().__init__(ATTENTIONS["sdpa_masked"], layers=1)
        self.requires_grad_(False)

    def generate(self, tokens: Tensor, steps: int = 6) -> Any:
        return decode(self, tokens, None, steps)


class Hands(nn.Module):
    """Hands on every attribute that it has not."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any) -> Any:
        return self.inner.forward(*args)


class Adapter(nn.Module):
    """As PEFT: a ``generate`` of its own calls that of the model within the module inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.base_model = Hands(inner)

    def generate(self, *args: Any) -> Any:
        return self.base_model.generate(*args)

    def forward(self, *args: Any) -> Any:
        return self.base_model(*args)


class Hides(nn.Module):
    """Has ``generate`` from a model that torch does not see in it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.__dict__["hidden"] = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["hidden"], name)

    def forward(self, *args: Any) -> Any:
        return self.hidden(*args)


class HidesAll(Hides):
    """Not even its ``generate`` is that of the model."""

    def generate(self, *args: Any) -> Any:
        return self.hidden.generate(*args)


def hooked(inner: nn.Module) -> Any:
    """As accelerate's device maps: ``forward`` is an attribute of the instance."""
    return add_hook_to_module(inner, ModelHook())


WRAPPERS = {
    "none": lambda inner: inner, "hands": Hands, "adapter": Adapter, "hides": Hides,
    "accelerate": hooked, "adapter_of_hooked": lambda inner: Adapter(hooked(inner)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_generate_calls_is_compiled(name: str) -> None:
    inner, tokens = Speaker(), prompt(13)
    expected, _ = inner.generate(tokens)
    model = optimize(WRAPPERS[name](inner), strict=True, **EXACT)
    for run in (model.generate, model.generate, lambda t: decode(model, t, None, 6)):
        logits, past = run(tokens)
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)
        assert is_compressed(past)
    assert "generate" not in vars(model)


def test_a_model_in_data_parallel() -> None:
    inner, tokens = Speaker(), prompt(13)
    expected, _ = inner.generate(tokens)
    model = optimize(nn.DataParallel(inner), strict=True, **EXACT)
    for run in (model.module.generate, lambda t: decode(model, t, None, 6)):
        logits, past = run(tokens)
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)
        assert is_compressed(past)


def test_blocks_in_a_wrapper() -> None:
    inner, tokens = Speaker(), prompt(13)
    model = optimize(Adapter(inner), regional=True, strict=True, **EXACT)
    assert is_compressed(model.generate(tokens)[1])


def test_a_generate_that_calls_nothing_compiled_is_said() -> None:
    inner, tokens = Speaker(), prompt(13)
    expected = inner.generate(tokens)
    model = optimize(HidesAll(inner), **EXACT)
    with pytest.warns(SparkWarning, match=f"generate of HidesAll {NOTHING}"):
        torch.testing.assert_close(model.generate(tokens), expected)
    with warnings.catch_warnings(action="error"):
        model.generate(tokens)
    model = optimize(HidesAll(inner), strict=True, **EXACT)
    for _ in range(2):
        with pytest.raises(SparkError, match=NOTHING):
            model.generate(tokens)
    optimize(inner, **EXACT)
    assert is_compressed(model.generate(tokens)[1])
    assert "generate" not in vars(model)


class Disabled(Speaker):
    @torch.compiler.disable
    def forward(self, *args: Any) -> Any:
        return super().forward(*args)


def test_a_model_that_dynamo_may_not_see_is_said() -> None:
    with pytest.raises(SparkError, match=NOTHING):
        optimize(Disabled(), strict=True, **EXACT).generate(prompt(13))


def test_another_model_that_runs_what_is_compiled_is_no_reason_to_complain() -> None:
    for _ in range(2):
        optimize(Speaker(), strict=True, **EXACT).generate(prompt(13))


def test_another_model_that_runs_what_was_refused_is_no_reason_to_complain() -> None:
    refused = {**EXACT, "key_format": "spark(kept=1000)"}
    with pytest.warns(SparkWarning, match="rewrote nothing"):
        optimize(Speaker(), **refused).generate(prompt(13))
    with warnings.catch_warnings(action="error"):
        optimize(Speaker(), **refused).generate(prompt(13))


def saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, saved])
@pytest.mark.parametrize("wrapper", [lambda inner: inner, Adapter], ids=["whole", "adapter"])
@pytest.mark.parametrize("regional", [False, True], ids=["", "regional"])
def test_a_copy_is_compiled_with_its_own_weights(wrapper: Any, again: Any, regional: bool) -> None:
    tokens = prompt(13)
    model = optimize(wrapper(Speaker()), regional=regional, strict=True, **EXACT)
    copies = [again(again(model))]
    expected, _ = model.generate(tokens)
    copies.append(again(model))
    with torch.no_grad():
        for parameter in (p for copied in copies for p in copied.parameters()):
            parameter.zero_()
    for copied in copies:
        logits, past = copied.generate(tokens)
        assert is_compressed(past)
        assert not logits.any()
        assert "generate" not in vars(copied)
    assert torch.equal(model.generate(tokens)[0], expected)


def test_a_shallow_copy_is_compiled() -> None:
    model, tokens = optimize(Speaker(), strict=True, **EXACT), prompt(13)
    expected, _ = model.generate(tokens)
    copied = copy.copy(model)
    copied._modules = {
        **model._modules,
        "tokens": nn.Embedding.from_pretrained(torch.zeros(32, 32)),
    }
    logits, past = copied.generate(tokens)
    assert is_compressed(past)
    assert not torch.equal(logits, expected)


def test_what_is_not_compiled_is_copied_as_it_is() -> None:
    optimize(Speaker(), **EXACT)
    with collect_report() as report:
        copy.deepcopy(Speaker()).generate(prompt(13))
    assert not report.graphs


@pytest.mark.parametrize("regional", [False, True])
def test_a_copy_is_compiled_in_another_way(regional: bool) -> None:
    copied = copy.deepcopy(optimize(Speaker(), regional=regional, **EXACT))
    optimize(copied, regional=not regional, strict=True, **{**EXACT, "key_format": "int8"})
    _, past = copied.generate(prompt(13))
    assert past[0][0].spec.key.NAME == "int8"


def test_a_generate_of_the_instance_stays() -> None:
    model = Speaker()
    model.generate = own = lambda tokens: decode(model, tokens, None, 3)  # type: ignore[method-assign]
    optimize(optimize(model, **EXACT), strict=True, **EXACT)
    assert inspect.signature(model.generate) == inspect.signature(own)
    assert is_compressed(model.generate(prompt(13))[1])
    assert model.generate is own


def test_peft() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model, ids = peft.get_peft_model(tiny("llama", "sdpa"), config).eval(), prompt(20)
    arguments = {"input_ids": ids, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**arguments)
    optimize(model, strict=True, **EXACT)
    output = model.generate(return_dict_in_generate=True, **arguments)
    assert torch.equal(output.sequences, expected)
    assert is_compressed([(layer.keys, layer.values) for layer in output[CACHE].layers])
