"""The backend end to end on hand-written decoders: ratio 0 equals the eager model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import ATTENTIONS, UNUSUAL, decode, decoder, prompt
from torch import nn

from spark_compile import PrunedKeys, StoredValues

EXACT = {"key_ratio": 0.0, "window": 4, "inner": "eager"}
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="spark", options={**EXACT, **options})


def is_compressed(past: Any) -> bool:
    return all(
        isinstance(key, PrunedKeys) and isinstance(value, StoredValues) for key, value in past
    )


@pytest.mark.parametrize(("batch", "sizes"), [(1, {}), (2, {"kv_heads": 1, "dim": 7})])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_ratio_zero_equals_eager(name: str, batch: int, sizes: dict[str, int]) -> None:
    model, tokens = decoder(name, layers=1, **sizes), prompt(12, batch)
    exact, _ = decode(model, tokens, None, 40)
    logits, past = decode(compiled(model, strict=True), tokens, None, 40)
    torch.testing.assert_close(logits, exact, **CLOSE)
    assert is_compressed(past)
    assert past[0][0].shape == (batch, sizes.get("kv_heads", 2), 52, sizes.get("dim", 8))
    assert past[0][0].packed_tokens() >= 40


EXACT_AT_ANY_RATIO = ["scaled_late", "one_tensor"]


@pytest.mark.parametrize("name", sorted(UNUSUAL.keys() - EXACT_AT_ANY_RATIO))
@pytest.mark.filterwarnings("ignore::spark_compile.SparkWarning")
def test_ratio_zero_equals_eager_whatever_is_refused(name: str) -> None:
    model, tokens = decoder(name, layers=1), prompt(13)
    exact, _ = decode(model, tokens, None, 12)
    logits, _ = decode(compiled(model), tokens, None, 12)
    torch.testing.assert_close(logits, exact, **CLOSE)


@pytest.mark.parametrize("name", EXACT_AT_ANY_RATIO)
@pytest.mark.filterwarnings("ignore::spark_compile.SparkWarning")
def test_what_is_refused_stays_exact_at_any_ratio(name: str) -> None:
    model, tokens = decoder(name, layers=1), prompt(13)
    exact = decode(model, tokens, None, 8)
    actual = decode(compiled(model, key_ratio=0.9), tokens, None, 8)
    torch.testing.assert_close(actual, exact, **CLOSE)


@pytest.mark.parametrize(("sink_tokens", "recent_tokens"), [(3, 0), (1, 9)])
def test_ratio_zero_with_sinks_and_recent_tokens(sink_tokens: int, recent_tokens: int) -> None:
    model, tokens = decoder(layers=1), prompt(12)
    exact, _ = decode(model, tokens, None, 20)
    options = {"sink_tokens": sink_tokens, "recent_tokens": recent_tokens, "min_tokens": 16}
    logits, past = decode(compiled(model, **options), tokens, None, 20)
    torch.testing.assert_close(logits, exact, **CLOSE)
    assert 0 < past[0][0].packed_tokens() <= 32 - sink_tokens - recent_tokens


def test_pruned_logits_are_near_the_exact_ones() -> None:
    model, tokens = decoder(layers=1, dim=64), prompt(100)
    exact, _ = decode(model, tokens, None, 0)
    past = compiled(model, key_ratio=0.5)(tokens)[1]
    step = exact.argmax(-1)
    torch.testing.assert_close(
        compiled(model, key_ratio=0.5)(step, past)[0],
        model(step, model(tokens)[1])[0], atol=0.1, rtol=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["manual", "sdpa_masked"])
def test_chunks_with_a_past(name: str) -> None:
    model, chunks = decoder(name, layers=1), [prompt(n, batch=2) for n in (11, 3, 1, 5, 17)]
    model_c = compiled(model)
    exact_past = past = None
    for chunk in chunks:
        exact, exact_past = model(chunk, exact_past)
        logits, past = model_c(chunk, past)
        torch.testing.assert_close(logits, exact, **CLOSE)
        assert is_compressed(past)


def test_prompts_of_many_lengths_and_batches() -> None:
    """The second length makes a dynamic prefill, short ones leave nothing to pack yet."""
    model = decoder("empty_first", layers=1)
    model_c = compiled(model)
    for length, batch in ((12, 1), (30, 1), (2, 1), (8, 3), (1, 1)):
        tokens = prompt(length, batch)
        exact, _ = decode(model, tokens, None, 3)
        logits, past = decode(model_c, tokens, None, 3)
        torch.testing.assert_close(logits, exact, **CLOSE)
        assert past[0][0].shape[2] == length + 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, tokens = decoder(layers=1).to(dtype), prompt(13)
    exact, _ = decode(model, tokens, None, 0)
    logits, past = decode(compiled(model), tokens, None, 0)
    torch.testing.assert_close(logits, exact, atol=2e-2, rtol=2e-2)
    assert past[0][0].dtype == past[0][1].dtype == logits.dtype == dtype
    step = prompt(1)
    exact, _ = model(step, model(tokens)[1])
    torch.testing.assert_close(compiled(model)(step, past)[0], exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_every_grad_mode(mode: Any) -> None:
    model, tokens = decoder(layers=1), prompt(13)
    exact, _ = decode(model, tokens, None, 10)
    with mode():
        logits, past = decode(compiled(model), tokens, None, 10)
    torch.testing.assert_close(logits, exact, **CLOSE)
    assert is_compressed(past)


@pytest.mark.filterwarnings("ignore::spark_compile.SparkWarning")
def test_autocast() -> None:
    """Lowering an autocast region may be refused, never wrong."""
    model, tokens = decoder(layers=1), prompt(13)
    model_c = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        exact, exact_past = model(tokens)
        logits, past = model_c(tokens)
        torch.testing.assert_close(logits, exact, atol=2e-2, rtol=2e-2)
        step = prompt(1)
        exact, logits = model(step, exact_past)[0], model_c(step, past)[0]
    torch.testing.assert_close(logits, exact, atol=2e-2, rtol=2e-2)


def test_inductor() -> None:
    model, tokens = decoder(layers=1), prompt(13)
    exact, _ = decode(model, tokens, None, 8)
    model_c = torch.compile(model, backend="spark", options={"key_ratio": 0.0, "window": 4})
    logits, past = decode(model_c, tokens, None, 8)
    torch.testing.assert_close(logits, exact, **CLOSE)
    assert is_compressed(past)


class _WithBuffer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = decoder(layers=1)
        self.register_buffer("gain", torch.tensor(2.0))

    def forward(self, tokens: Any, past: Any = None) -> Any:
        logits, past = self.inner(tokens, past)
        return logits * self.gain, past


def test_inductor_with_frozen_weights() -> None:
    """Freezing leaves weights in the graph's module; with them the cache is compressed as ever."""
    model, tokens = _WithBuffer(), prompt(13)
    exact, _ = decode(model, tokens, None, 8)
    model_c = torch.compile(model, backend="spark", options={"key_ratio": 0.0, "window": 4})
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        logits, past = decode(model_c, tokens, None, 8)
    torch.testing.assert_close(logits, exact, **CLOSE)
    assert is_compressed(past)
