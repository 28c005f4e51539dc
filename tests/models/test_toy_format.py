"""A format that nobody but this file knows: all that it takes is the class below."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from compiled import compiled
from decoders import decode, decoder, prompt
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer
from zoo import CACHE, tiny

from spark_compile import PrunedKeys, SparkConfig, SparkError, StoredValues, kv_bytes, optimize
from spark_compile.kernels.formats import Field, Format
from spark_compile.kernels.formats.base import Stored, per_head
from spark_compile.kernels.layout import round_up
from spark_compile.report import collect_report
from spark_compile.state import SparkTensor

WINDOW = 4
OPTIONS: dict[str, Any] = {
    "key_format": "toy", "value_format": "toy(bits=8)", "window": WINDOW, "inner": "eager",
    "strict": True,
}  # fmt: skip
CLOSE = 0.03
"""Largest relative error (root mean squares) of logits with 8 bits per channel."""


@dataclass(frozen=True)
class Toy(Format):
    """Unsigned levels around the channel's mean, with one step and one zero point per page."""

    bits: int = 8

    NAME = "toy"

    def fields(self) -> tuple[Field, ...]:
        return (
            Field("levels", torch.uint8, self.head_dim),
            Field("step", torch.float32, 1, "page"),
            Field("zero", torch.float32, 1, "page"),
            Field("mean", torch.float32, self.head_dim, "head"),
        )

    def constants(self, rows: Tensor, norms: Tensor | None) -> dict[str, Tensor]:
        return {"mean": rows.float().mean(2)}

    def encode(self, rows: Tensor, norms: Tensor | None, constants: Stored) -> dict[str, Tensor]:
        centered = rows.float() - per_head(constants["mean"], rows)
        zero, largest = centered.amin((-1, -2)), centered.amax((-1, -2))
        step = ((largest - zero) / (2**self.bits - 1)).clamp(min=1e-9)
        levels = (centered - zero[..., None, None]) / step[..., None, None]
        levels = levels.round().to(torch.uint8)
        return {"levels": levels, "step": step.unsqueeze(-1), "zero": zero.unsqueeze(-1)}

    def decode(self, stored: Stored, constants: Stored, first: int = 0) -> Tensor:
        levels, (step, zero) = stored["levels"], (stored[name] for name in ("step", "zero"))
        centered = levels.float() * step.unsqueeze(-2) + zero.unsqueeze(-2)
        return centered + per_head(constants["mean"], levels)


def check_close(actual: Tensor, expected: Tensor) -> None:
    """Close to what an exact cache gives, and not the same: something was packed."""
    error = (actual - expected).norm() / expected.norm()
    assert 0 < error < CLOSE


def ids(batch: int = 1, length: int = 20) -> Tensor:
    return torch.randint(1, 90, (batch, length))


def toy_bytes(batch: int, heads: int, dim: int, pages: int) -> int:
    """Bytes of one side of float32 tokens: pages, counters, the mean, and the dense tail."""
    page = WINDOW * dim + 2 * 4
    head = round_up(5 * 8 + dim * 4, 16) + 2 * WINDOW * dim * 4
    return batch * heads * (pages * page + head)


@pytest.mark.parametrize("name", ["sdpa_causal", "sdpa_masked", "manual"])
def test_a_decoder_written_by_hand_is_close_to_the_eager_one(name: str) -> None:
    model, start = decoder(name), prompt(21, batch=2)
    toy = compiled(model, **OPTIONS)
    expected, _ = model(torch.cat((start, tokens := prompt(30, batch=2)), 1), None)
    with torch.no_grad(), collect_report() as report:
        logits, past = toy(start, None)
        collected = [logits[:, -1:]]
        for token in tokens.split(3, dim=1):
            logits, past = toy(token, past)
            collected.append(logits)
    check_close(torch.cat(collected, 1), expected[:, 20:])
    for keys, values in past:
        assert (type(keys), type(values)) == (PrunedKeys, StoredValues)
        assert keys.packed_tokens() == values.packed_tokens() == (51 - WINDOW) // 4 * 4
    sites = [site for graph in report.graphs for site in graph.sites]
    assert {site.formats for site in sites} == {("toy(bits=8)", "toy(bits=8)")}
    # a page of 4 records of 8 channels, a step and a zero point, padded to 8 bytes
    assert {site.stored_token_bytes for site in sites} == {2 * 2 * 40 // WINDOW}


def test_fewer_bits_are_farther_away() -> None:
    model, start = decoder(), prompt(40)
    exact, _ = decode(model, start, None, 9)
    errors = []
    for bits in (2, 5, 8):
        toy = compiled(model, **OPTIONS | {"key_format": f"toy(bits={bits})"})
        with torch.no_grad():
            logits, _ = decode(toy, start, None, 9)
        errors.append(float((logits[:, 1] - exact[:, 1]).norm()))
    assert errors == sorted(errors, reverse=True)


def llama() -> tuple[Any, Any]:
    """A tiny model, and a compiled copy of it."""
    model = tiny("llama", "sdpa")
    return model, optimize(copy.deepcopy(model), **OPTIONS)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_transformers_model_generates(way: str) -> None:
    """The logits that led to the compiled model's own tokens are close to the eager ones."""
    model, toy = llama()
    given = ids()
    if way == "prompt lookup":
        given = given[:, :10].repeat(1, 2)
    with torch.no_grad():
        output = toy.generate(
            given, max_new_tokens=25, min_new_tokens=25, return_dict_in_generate=True,
            output_logits=True, **WAYS[way],
        )  # fmt: skip
        tokens = output.sequences
        expected = model(tokens).logits
    assert tokens.shape[1] == 45
    cache = output[CACHE]
    assert all(isinstance(layer.keys, PrunedKeys) for layer in cache.layers)
    assert all(isinstance(layer.values, StoredValues) for layer in cache.layers)
    assert all(layer.keys.packed_tokens() >= 36 for layer in cache.layers)
    if way != "beams":  # whose logits are those of beams that were dropped, too
        logits = torch.stack(output.logits, dim=1)
        check_close(logits[:, 1:], expected[:, 20:-1])


def test_greedy_tokens_are_the_eager_ones_or_nearly_as_good() -> None:
    model, toy = llama()
    given = ids(3, 30)
    with torch.no_grad():
        tokens = toy.generate(given, max_new_tokens=20, min_new_tokens=20, do_sample=False)
        logits = model(tokens).logits[:, 29:-1]
    chosen = logits.gather(-1, tokens[:, 30:].unsqueeze(-1)).squeeze(-1)
    behind = logits.amax(-1) - chosen
    assert (behind <= 3 * CLOSE * logits.std()).all()
    assert (behind == 0).float().mean() > 0.8


def test_a_static_cache_holds_it_as_a_growing_one_does() -> None:
    """The same pages, and so the same logits, whether or not the capacity is fixed."""
    tokens = ids(2, 30)
    logits = []
    for kind in (DynamicCache, StaticCache):
        model, toy = llama()
        how = {"config": model.config} | ({"max_cache_len": 40} if kind is StaticCache else {})
        cache = kind(**how)
        with torch.no_grad():
            parts = tokens.split([13, *[1] * 17], dim=1)
            collected = [toy(part, **{CACHE: cache}).logits for part in parts]
            expected = model(tokens).logits
        logits.append(torch.cat(collected, 1))
        assert [state.packed_tokens() for state in states(cache)] == [24] * 4
        assert [state.static for state in states(cache)] == [kind is StaticCache] * 4
    check_close(logits[1][:, 13:], expected[:, 13:])
    torch.testing.assert_close(logits[1], logits[0])


def filled(batch: int = 2, length: int = 29) -> tuple[Any, DynamicCache]:
    """A compiled model, and its cache after some steps."""
    _, toy = llama()
    cache = DynamicCache()
    with torch.no_grad():
        for token in ids(batch, length).split([20, *[1] * (length - 20)], dim=1):
            toy(token, **{CACHE: cache})
    return toy, cache


def continued(toy: Any, cache: DynamicCache, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([toy(t, **{CACHE: cache}).logits for t in tokens.split(1, 1)], 1)


def states(cache: DynamicCache) -> list[SparkTensor]:
    return [state for layer in cache.layers for state in (layer.keys, layer.values)]  # type: ignore[misc]


def reloaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    with torch.serialization.safe_globals([DynamicCache, DynamicLayer]):
        return torch.load(file, weights_only=True)


@pytest.mark.parametrize("copied", [copy.deepcopy, reloaded], ids=["deepcopy", "saved and loaded"])
def test_a_copied_cache_is_continued_as_the_original(copied: Any) -> None:
    toy, cache = filled()
    twin, tokens = copied(cache), ids(2, 9)
    assert isinstance(twin, DynamicCache)
    for own, other in zip(states(twin), states(cache), strict=True):
        assert own.spec is other.spec
        assert torch.equal(own.dense(), other.dense())
    before = [state.dense() for state in states(cache)]
    logits = continued(toy, twin, tokens)
    assert all(map(torch.equal, before, [state.dense() for state in states(cache)]))
    assert torch.equal(continued(toy, cache, tokens), logits)


def test_selected_batch_entries_and_crops_are_those_of_the_dense_tensors() -> None:
    toy, cache = filled()
    before = [state.dense() for state in states(cache)]
    cache.batch_select_indices(torch.tensor([1, 1, 0]))
    for state, dense in zip(states(cache), before, strict=True):
        assert torch.equal(state.dense(), dense[[1, 1, 0]])
    cache.crop(-11)
    for state, dense in zip(states(cache), before, strict=True):
        assert isinstance(state, SparkTensor)
        assert torch.equal(state.dense(), dense[[1, 1, 0], :, :-11])
    assert continued(toy, cache, ids(3, 5)).isfinite().all()
    assert cache.get_seq_length() == 29 - 11 + 5


def test_every_byte_is_one_of_the_declared_fields() -> None:
    _, cache = filled(batch=2, length=29)
    assert [state.packed_tokens() for state in states(cache)] == [24] * 4
    pages = [state.pages.shape[2] for state in states(cache)]
    assert all(6 <= count <= 8 for count in pages)
    expected = [toy_bytes(2, 2, 16, count) for count in pages]
    assert [kv_bytes(state) for state in states(cache)] == expected
    assert [state.stored_bytes() for state in states(cache)] == expected
    assert kv_bytes(cache) == sum(expected)


def test_a_layer_of_its_own_format() -> None:
    model = tiny("llama", "sdpa")
    named = {"key_format": {"*layers.0.*": "toy"}, "key_ratio": 0.0, "value_format": None}
    mixed = optimize(copy.deepcopy(model), **OPTIONS | named)
    cache = DynamicCache()
    with torch.no_grad():
        mixed(ids(1, 20), **{CACHE: cache})
    assert [state.spec.format(state.SIDE).text for state in states(cache)] == [
        "toy(bits=8)", "dense", "dense", "dense",
    ]  # fmt: skip


def test_a_format_that_cannot_store_the_heads_is_a_reason() -> None:
    toy = compiled(decoder(), **OPTIONS | {"key_format": "pruned(kept=9)"})
    reason = "2 x option 'kept' of format 'pruned' is 9: allowed is 1 to 8"
    with torch.no_grad(), pytest.raises(SparkError, match=reason):
        toy(prompt(20), None)


def test_an_option_of_the_format_is_checked_with_the_others() -> None:
    with pytest.raises(ValueError, match=r"has no option .shape.: allowed is bits"):
        SparkConfig(key_format="toy(shape=2)")
