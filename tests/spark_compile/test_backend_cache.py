"""The cache between calls of a compiled decoder: handles, other options, bytes, graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled import EXACT, compiled, is_compressed
from decoders import decode, decoder, prompt

from spark_compile import SparkWarning, kv_bytes

CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def test_a_higher_ratio_stores_fewer_bytes() -> None:
    model, tokens = decoder(layers=1, dim=64), prompt(200)
    stored = [kv_bytes(compiled(model, key_ratio=r)(tokens)[1]) for r in (0.0, 0.5, 0.8)]
    dense = kv_bytes(model(tokens)[1])
    assert dense > stored[1] > stored[2]
    assert stored[0] > stored[1]
    key = 200 * 2 * 64 * 4  # tokens, heads, channels, bytes
    assert stored[2] - (dense - key) < 0.45 * key


def test_two_continuations_of_one_prefix_do_not_mix() -> None:
    model, tokens = decoder(layers=1), prompt(13)
    model_c = compiled(model)
    _, exact = model(tokens)
    _, prefix = model_c(tokens)
    pasts, exacts = [prefix] * 3, [exact] * 3
    for _ in range(11):
        for branch in range(3):
            token = prompt(1)
            wanted, exacts[branch] = model(token, exacts[branch])
            logits, pasts[branch] = model_c(token, pasts[branch])
            torch.testing.assert_close(logits, wanted, **CLOSE)
    assert prefix[0][0].shape[2] == 13
    torch.testing.assert_close(prefix[0][0].dense(), exact[0][0], **CLOSE)


def test_a_cropped_cache_goes_on() -> None:
    model, tokens = decoder(layers=1), prompt(13)
    model_c = compiled(model)
    (_, exact), (_, past) = decode(model, tokens, None, 9), decode(model_c, tokens, None, 9)
    for length in (20, 15, 6):
        exact = tuple((key[:, :, :length], value[:, :, :length]) for key, value in exact)
        past = tuple((key[:, :, :length], value[:, :, :length]) for key, value in past)
        assert is_compressed(past)
        token = prompt(1)
        wanted, exact = decode(model, token, exact, 6)
        logits, past = decode(model_c, token, past, 6)
        torch.testing.assert_close(logits, wanted, **CLOSE)


def test_two_models_and_two_options_in_one_process() -> None:
    first, second, tokens = decoder(layers=1), decoder("manual", layers=1), prompt(13)
    runs = [(first, compiled(first)), (second, compiled(second, window=6)),
            (first, compiled(first, window=5))]  # fmt: skip
    pasts: list[Any] = [(None, None)] * 3
    for step in (tokens, prompt(1), prompt(1), prompt(1)):
        for i, (model, model_c) in enumerate(runs):
            exact_past, past = pasts[i]
            exact, exact_past = model(step, exact_past)
            logits, past = model_c(step, past)
            torch.testing.assert_close(logits, exact, **CLOSE)
            pasts[i] = exact_past, past
    assert [past[0][0].spec.window for _, past in pasts] == [4, 6, 5]


def test_a_cache_of_other_options_is_read_all_the_same() -> None:
    model, tokens, step = decoder(layers=1), prompt(13), prompt(1)
    exact, _ = model(step, model(tokens)[1])
    _, past = compiled(model)(tokens)
    torch._dynamo.reset()
    with pytest.warns(SparkWarning, match="compressed with other options"):
        logits, past = compiled(model, window=6)(step, past)
    torch.testing.assert_close(logits, exact, **CLOSE)
    assert past[0][0].shape[2] == 14


def test_few_graphs_for_many_steps() -> None:
    model_c, tokens, past = (
        compiled(decoder("empty_first", layers=1), key_ratio=0.5),
        prompt(21),
        None,
    )
    torch._dynamo.utils.counters.clear()
    for call in range(200):
        with torch._dynamo.config.patch(error_on_recompile=call > 2):
            logits, past = model_c(tokens, past)
        tokens = logits[:, -1:].argmax(-1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    assert past[0][0].shape[2] == 21 + 199


@pytest.mark.parametrize("name", ["manual", "empty_first", "sdpa_masked", "sliding"])
def test_lengths_and_batches_cost_no_more_graphs_than_without_spark(name: str) -> None:
    """Three lengths times two batch sizes; the lengths are such that there is something to pack."""
    model, graphs = decoder(name, layers=1), {}
    for backend, options in (("eager", None), ("spark", {**EXACT, "strict": True})):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model_c = torch.compile(model, backend=backend, options=options)
        for batch in (1, 2):
            for length in (12, 30, 17):
                tokens = prompt(length, batch)
                logits, _ = decode(model_c, tokens, None, 6)
                torch.testing.assert_close(logits, decode(model, tokens, None, 6)[0], **CLOSE)
        graphs[backend] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs["spark"] <= graphs["eager"], graphs
