"""What looks like attention over a cache and is not, or is one only almost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled import compiled
from decoders import Decoder, KeyValue, SdpaMasked, causal_mask, decode, prompt
from torch import Tensor, nn

from spark_compile.passes.find_attention import FindAttention
from spark_compile.passes.normalize import Normalize
from spark_compile.report import Report, collect_report

Form = Callable[[Tensor, Tensor, Tensor], Tensor]
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
SCALE = 8**-0.5
LENGTH = 13
pytestmark = pytest.mark.filterwarnings("ignore::spark_compile.SparkWarning")


SLOW = {
    "learned_memory", "weights_as_a_gate", "faintly_chosen", "renormalized", "strided",
    "first_values", "sink_with_a_value", "rectified", "sigmoids", "linear", "softmax_of_features",
    "capped_at_one", "repelled", "in_double", "temperature_per_query", "two_products",
    "aligned_to_the_first_key", "broken_behind", "two_windows",
}  # fmt: skip
"""Left to the slow tests."""


def some_are_slow(names: Iterable[str]) -> list[Any]:
    """Parameters for all of them."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in names]


class Written(SdpaMasked):
    """Attention by a function of query [B, H, L, D], key and value [B, H, S, D]."""

    def __init__(self, width: int = 32, *, form: Form) -> None:
        super().__init__(width, kv_heads=4)
        self.form = form

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, is_prompt: bool) -> Tensor:
        return self.form(query, key, value)


def written(attention: Any) -> Decoder:
    """One layer of an attention, given as a function or as a class."""
    if not isinstance(attention, type):
        attention = partial(Written, form=attention)
    return Decoder(attention, layers=1).eval().requires_grad_(False)


def product(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(2, 3) * SCALE


def masked(scores: Tensor, hidden: float = -math.inf) -> Tensor:
    """Scores [..., L, S] with what a query may not see filled."""
    length, total = scores.shape[-2:]
    seen = torch.arange(total) <= torch.arange(length).unsqueeze(1) + (total - length)
    return scores.masked_fill(~seen, hidden)


def causal_weights(q: Tensor, k: Tensor) -> Tensor:
    return F.softmax(masked(product(q, k)), dim=-1)


# What no rewriting may touch: exactly the model's own at any ratio


class LearnedMemory(SdpaMasked):
    """Softmax over learned keys: a memory, and no cache."""

    def __init__(self, width: int = 32) -> None:
        super().__init__(width)
        self.memory = nn.Parameter(torch.randn(2, 4, 16, 8))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, is_prompt: bool) -> Tensor:
        keys, values = self.memory
        return F.softmax(query @ keys.mT, dim=-1) @ values


class BrokenBetween(SdpaMasked):
    """Dynamo cannot follow from the append to the attention."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, is_prompt: bool) -> Tensor:
        torch._dynamo.graph_break()
        return super().attend(query, key, value, is_prompt=is_prompt)


class Evicts(SdpaMasked):
    """Keeps the tokens with the largest keys."""

    def forward(self, x_BLE: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        output, (key, value) = super().forward(x_BLE, past)
        kept = key.norm(dim=-1).sum((0, 1)).topk(9).indices.sort().values
        return output, (key.index_select(2, kept), value.index_select(2, kept))


class HeavyHitters(SdpaMasked):
    """Keeps the tokens that were looked at most."""

    def forward(self, x_BLE: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        query, key, value = self.project(x_BLE)
        key, value = (states.repeat_interleave(2, 1) for states in (key, value))
        key, value = self.append(past, key, value)
        weights = causal_weights(query, key)
        kept = weights.sum((0, 1, 2)).topk(9).indices.sort().values
        return self.finish(weights @ value), (key[:, :, kept], value[:, :, kept])


class ValuesOfKeys(SdpaMasked):
    """Values are a second copy of the keys, appended to the same past."""

    def append(self, past: KeyValue | None, key: Tensor, value: Tensor) -> KeyValue:
        if past is None:
            return key, key.clone()
        return torch.cat((past[0], key), dim=2), torch.cat((past[0], key), dim=2)


class Streaming(SdpaMasked):
    """Keeps the first two tokens and the last six."""

    def forward(self, x_BLE: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        output, present = super().forward(x_BLE, past)
        key, value = (torch.cat((x[:, :, :2], x[:, :, -6:]), dim=2) for x in present)
        return output, (key, value)


class FirstValues(SdpaMasked):
    """Keeps the last keys and the first values."""

    def forward(self, x_BLE: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        output, (key, value) = super().forward(x_BLE, past)
        return output, (key[:, :, -8:], value[:, :, :8])


class Strided(SdpaMasked):
    """Keeps every other token, the last one among them."""

    def forward(self, x_BLE: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        output, (key, value) = super().forward(x_BLE, past)
        odd = 1 - key.shape[2] % 2
        return output, (key[:, :, odd::2], value[:, :, odd::2])


def weights_as_a_gate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = causal_weights(q, k)
    return weights @ v * weights.amax(-1, keepdim=True)


def dropped_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(causal_weights(q, k), p=0.1, training=True) @ v


def decay_per_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    decay = 0.9 ** torch.arange(k.shape[2]).flip(0)
    return F.softmax(masked(product(q, k) * decay), dim=-1) @ v


def temperature_per_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    temperature = 1 + k.norm(dim=-1).unsqueeze(2)
    return F.softmax(masked(product(q, k) / temperature), dim=-1) @ v


def faintly_chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(torch.where(causal_mask(q, k), product(q, k), -1.0), dim=-1) @ v


def capped_with_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(torch.tanh(masked(product(q, k), -1e9) / 2) * 2, dim=-1) @ v


def score_and_its_tanh(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = product(q, k)
    return F.softmax(masked(scores + torch.tanh(scores)), dim=-1) @ v


def sink_with_a_value(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    sink = torch.ones((*q.shape[:3], 1))
    weights = F.softmax(torch.cat((masked(product(q, k)), sink), dim=-1), dim=-1)
    return weights @ torch.cat((v, v[:, :, :1] * 0 + 1), dim=2)


def renormalized(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax(product(q, k), dim=-1) * causal_mask(q, k)
    return weights / weights.sum(-1, keepdim=True) @ v


def largest_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = masked(product(q, k), -1e9)
    least = scores.topk(4).values[..., -1:]
    return F.softmax(scores.masked_fill(scores < least, -1e9), dim=-1) @ v


def talking_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mix = torch.eye(4) + 0.3
    scores = torch.einsum("bhqk,hg->bgqk", product(q, k), mix)
    return F.softmax(masked(scores), dim=-1) @ v


def distances(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = 2 * product(q, k) - k.square().sum(-1).unsqueeze(2) * SCALE
    return F.softmax(masked(scores), dim=-1) @ v


def gated_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal_weights(q, k) @ F.silu(v)


def latest_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(product(q, k[:, :, -8:]), dim=-1) @ v[:, :, -8:]


def floored_and_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(masked(product(q, k)).clamp(min=-2e4) * 1e-4, dim=-1) @ v


def floored_and_scaled_by_a_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.zeros(q.shape[2], k.shape[2]).masked_fill(~causal_mask(q, k), -math.inf)
    scores = (product(q, k) + hidden).clamp(min=-2e4)
    return F.softmax(scores * torch.linspace(1e-4, 2e-4, 4).reshape(4, 1, 1), dim=-1) @ v


UNTOUCHED: dict[str, Any] = {
    "learned_memory": LearnedMemory,
    "broken_between": BrokenBetween,
    "evicts": Evicts,
    "heavy_hitters": HeavyHitters,
    "values_of_keys": ValuesOfKeys,
    "streaming": Streaming,
    "first_values": FirstValues,
    "strided": Strided,
    "weights_as_a_gate": weights_as_a_gate,
    "dropped_out": dropped_out,
    "decay_per_key": decay_per_key,
    "temperature_per_key": temperature_per_key,
    "faintly_chosen": faintly_chosen,
    "capped_with_the_mask": capped_with_the_mask,
    "score_and_its_tanh": score_and_its_tanh,
    "sink_with_a_value": sink_with_a_value,
    "renormalized": renormalized,
    "largest_scores": largest_scores,
    "talking_heads": talking_heads,
    "distances": distances,
    "gated_values": gated_values,
    "latest_keys": latest_keys,
    "floored_and_scaled": floored_and_scaled,
    "floored_and_scaled_by_a_tensor": floored_and_scaled_by_a_tensor,
}
"""Attention-like, to be refused with a reason."""


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(masked(product(q, k)), dim=-2) @ v


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(k @ q.mT * SCALE, dim=-2).mT @ v


def rectified(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.relu(masked(product(q, k), 0.0)) / k.shape[2] @ v


def sigmoids(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(masked(product(q, k))) @ v


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.mT @ v) / (q @ k.sum(2, keepdim=True).mT)


def softmax_of_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Efficient attention: softmax over features of queries and over tokens of keys."""
    return F.softmax(q, dim=-1) @ (F.softmax(k, dim=-2).mT @ v)


NO_SITE: dict[str, Form] = {
    "over_queries": over_queries,
    "keys_first": keys_first,
    "rectified": rectified,
    "sigmoids": sigmoids,
    "linear": linear,
    "softmax_of_features": softmax_of_features,
}
"""No softmax over keys at all."""


def run_untouched(attention: Any) -> Report:
    """Compare a look-alike at ratio 0.5 with itself, bit for bit."""
    model, tokens = written(attention), prompt(LENGTH, batch=2)
    torch.manual_seed(1)
    # A function does to one token what it does to the next; a class may change what it keeps.
    steps = 2 if isinstance(attention, type) else 1
    exact = decode(model, tokens, None, steps)
    model_c = compiled(model, key_ratio=0.5)
    with collect_report() as report:
        torch.manual_seed(1)
        actual = decode(model_c, tokens, None, steps)
    torch.testing.assert_close(actual, exact, atol=0, rtol=0)
    assert [len(graph.rewritten) for graph in report.graphs] == [0] * len(report.graphs)
    assert [graph.left_alone for graph in report.graphs] == [None] * len(report.graphs)
    return report


@pytest.mark.parametrize("name", some_are_slow(UNTOUCHED))
def test_a_look_alike_is_refused_with_a_reason_and_stays_exact(name: str) -> None:
    report = run_untouched(UNTOUCHED[name])
    refusals = [site.refusal for graph in report.graphs for site in graph.sites]
    assert refusals, "not even reported"
    assert all(refusal and refusal.reason and refusal.node for refusal in refusals)


@pytest.mark.parametrize("name", some_are_slow(NO_SITE))
def test_what_has_no_softmax_over_keys_is_no_site(name: str) -> None:
    assert [graph.sites for graph in run_untouched(NO_SITE[name]).graphs] == [(), ()]


# What is an attention after all, in an odd form: whatever becomes of it, ratio 0 is exact


def inverted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sees what it should not; the latest token sees nothing and looks everywhere alike."""
    return F.softmax(product(q, k).masked_fill(causal_mask(q, k), -1e4), dim=-1) @ v


def nothing_seen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    least = torch.finfo(q.dtype).min
    scores = product(q, k).masked_fill(causal_mask(q, k), least)
    return F.softmax(masked(scores, least), dim=-1) @ v


def nothing_seen_floored(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.zeros(q.shape[2], k.shape[2]).masked_fill(causal_mask(q, k), -math.inf)
    scores = torch.max(product(q, k) + hidden, torch.tensor(torch.finfo(q.dtype).min))
    return F.softmax(scores, dim=-1) @ v


def odd_cap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(masked(torch.tanh(product(q, k) * 0.5) * 3.0), dim=-1) @ v


def capped_at_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(masked(torch.tanh(product(q, k))), dim=-1) @ v


def repelled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(masked(-2 * product(q, k)), dim=-1) @ v


def hidden_then_negated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The fill becomes a huge positive score."""
    return F.softmax(masked(product(q, k), 1e9) * -1.0, dim=-1) @ v


def first_column_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    sinks = torch.linspace(-1, 2, 4).reshape(1, 4, 1, 1).expand(q.shape[0], 4, q.shape[2], 1)
    return F.softmax(torch.cat((sinks, masked(product(q, k))), dim=-1), dim=-1)[..., 1:] @ v


def quiet(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax with one more in the denominator."""
    return F.softmax(F.pad(masked(product(q, k)), (0, 1)), dim=-1)[..., :-1] @ v


def relative(q: Tensor, k: Tensor) -> Tensor:
    """Scores of queries against a vector per distance."""
    places = torch.sin(torch.arange(k.shape[2]).flip(0)[:, None] * torch.arange(1.0, 9.0))
    return q @ places.mT


def two_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(masked((product(q, k) + relative(q, k)) * 0.7), dim=-1) @ v


def two_products_swapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(masked(relative(q, k) + product(q, k)), dim=-1) @ v


def aligned_to_the_first_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def in_double(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(masked(product(q, k)), dim=-1, dtype=torch.float64).to(v.dtype) @ v


def divided_by_the_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(masked(product(q, k) * 20 / k.shape[2]), dim=-1) @ v


def temperature_per_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(masked(product(q, k) * q.norm(dim=-1, keepdim=True)), dim=-1) @ v


class BrokenBehind(SdpaMasked):
    """Dynamo cannot follow behind the attention."""

    def finish(self, output_BHLD: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().finish(output_BHLD)


class Halves(SdpaMasked):
    """Drops tokens from the front now and then, not with every step."""

    def forward(self, x_BLE: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        output, (key, value) = super().forward(x_BLE, past)
        if key.shape[2] > 10:
            key, value = key[:, :, -8:], value[:, :, -8:]
        return output, (key, value)


class TwoWindows(SdpaMasked):
    """Attends to fewer tokens than it keeps."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, is_prompt: bool) -> Tensor:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
        mask = mask.tril(key.shape[2] - query.shape[2]).triu(key.shape[2] - query.shape[2] - 5)
        return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)

    def forward(self, x_BLE: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        output, (key, value) = super().forward(x_BLE, past)
        return output, (key[:, :, -9:], value[:, :, -9:])


ODD: dict[str, Any] = {
    "inverted": inverted,
    "nothing_seen": nothing_seen,
    "nothing_seen_floored": nothing_seen_floored,
    "odd_cap": odd_cap,
    "capped_at_one": capped_at_one,
    "repelled": repelled,
    "hidden_then_negated": hidden_then_negated,
    "first_column_sink": first_column_sink,
    "quiet": quiet,
    "two_products": two_products,
    "two_products_swapped": two_products_swapped,
    "aligned_to_the_first_key": aligned_to_the_first_key,
    "in_double": in_double,
    "divided_by_the_length": divided_by_the_length,
    "temperature_per_query": temperature_per_query,
    "broken_behind": BrokenBehind,
    "halves": Halves,
    "two_windows": TwoWindows,
}


@pytest.mark.parametrize("name", some_are_slow(ODD))
def test_an_odd_attention_is_exact_at_ratio_zero(name: str) -> None:
    model, chunks = written(ODD[name]), [prompt(n, batch=2) for n in (LENGTH, 3, 3, 3)]
    model_c, exact_past, past = compiled(model), None, None
    with collect_report() as report:
        for chunk in chunks:
            exact, exact_past = model(chunk, exact_past)
            logits, past = model_c(chunk, past)
            torch.testing.assert_close(logits, exact, **CLOSE)
    assert [graph.left_alone for graph in report.graphs] == [None] * len(report.graphs)
    assert exact.isfinite().all(), "compares nothing"


# Padding on the left: its queries see nothing, and nobody sees what becomes of them

PADDING = 15


def padded_mask(q: Tensor, k: Tensor) -> Tensor:
    """bool [B, 1, L, S] where the first sequence of a batch starts with padding."""
    starts = torch.zeros(q.shape[0], 1, 1, 1)
    starts[0] = PADDING
    return causal_mask(q, k) & (torch.arange(k.shape[2]) >= starts)


def padded_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=padded_mask(q, k))


def padded_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = product(q, k).masked_fill(~padded_mask(q, k), torch.finfo(q.dtype).min)
    return F.softmax(scores, dim=-1) @ v


def padded_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Padding is hidden, and later tokens are, one after the other."""
    least = torch.finfo(q.dtype).min
    scores = product(q, k).masked_fill(~padded_mask(q, k), least)
    return F.softmax(masked(scores, least), dim=-1) @ v


def padded_and_floored(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two masks are added, which may make -inf, and a lower bound brought in, as OPT has it."""
    least = torch.finfo(q.dtype).min
    later, hidden = ~causal_mask(q, k), ~padded_mask(q, k)
    bias = torch.zeros(hidden.shape).masked_fill(hidden, least)
    bias = bias + torch.zeros(later.shape).masked_fill(later, least)
    scores = torch.max(product(q, k) + bias, torch.tensor(least))
    return F.softmax(scores, dim=-1) @ v


SLOW_FORMS = [pytest.param(form, marks=pytest.mark.slow) for form in (padded_sdpa, padded_fill)]


@pytest.mark.parametrize(
    "form", [padded_twice, padded_and_floored, *SLOW_FORMS], ids=lambda form: form.__name__
)
def test_queries_that_see_nothing_do_not_spoil_the_others(form: Form) -> None:
    model = Decoder(partial(Written, form=form), layers=2).eval().requires_grad_(False)
    model_c, exact_past, past, end = compiled(model, strict=True), None, None, 0
    for chunk in (prompt(n, batch=2) for n in (LENGTH, 4, 4)):
        exact, exact_past = model(chunk, exact_past)
        logits, past = model_c(chunk, past)
        torch.testing.assert_close(logits[1], exact[1], **CLOSE)
        start, end = end, end + chunk.shape[1]
        shown = slice(max(PADDING - start, 0), None)
        torch.testing.assert_close(logits[0, shown], exact[0, shown], **CLOSE)
    assert exact.isfinite().all(), "compares nothing"


# What only a later step reveals: its prefill is an attention like any other


class Decays(SdpaMasked):
    """The past fades with every step."""

    def append(self, past: KeyValue | None, key: Tensor, value: Tensor) -> KeyValue:
        if past is None:
            return key, value
        return torch.cat((past[0] * 0.9, key), dim=2), torch.cat((past[1] * 0.9, value), dim=2)


class Reorders(SdpaMasked):
    """The sequences of the batch change places between two steps."""

    def append(self, past: KeyValue | None, key: Tensor, value: Tensor) -> KeyValue:
        if past is not None:
            past = past[0].flip(0), past[1].flip(0)
        return super().append(past, key, value)


class Crops(SdpaMasked):
    """The latest token of the past is taken back."""

    def append(self, past: KeyValue | None, key: Tensor, value: Tensor) -> KeyValue:
        if past is not None:
            past = past[0][:, :, :-1], past[1][:, :, :-1]
        return super().append(past, key, value)


class Prepends(SdpaMasked):
    """New tokens come before the past."""

    def append(self, past: KeyValue | None, key: Tensor, value: Tensor) -> KeyValue:
        if past is None:
            return key, value
        return torch.cat((key, past[0]), dim=2), torch.cat((value, past[1]), dim=2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, is_prompt: bool) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


class EvictsLater(Evicts):
    """Keeps the tokens with the largest keys once there are more than a prompt."""

    def forward(self, x_BLE: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        if past is None:
            return SdpaMasked.forward(self, x_BLE, past)
        return super().forward(x_BLE, past)


@pytest.mark.parametrize("attention", [Decays, Reorders, Crops, Prepends, EvictsLater])
def test_what_a_later_step_changes_is_not_compressed_again_and_again(attention: type) -> None:
    """The cache of the prompt may be compressed; what is recovered from it stays dense."""
    model, tokens = written(attention), prompt(LENGTH, batch=2)
    model_c, exact_past, past, kinds = compiled(model), None, None, []
    for step in (tokens, *(prompt(1, batch=2) for _ in range(4))):
        exact, exact_past = model(step, exact_past)
        logits, past = model_c(step, past)
        torch.testing.assert_close(logits, exact, **CLOSE)
        kinds.append(type(past[0][0]).__name__)
    assert kinds[1:] == ["Tensor"] * 4


# Shapes that agree by chance: what the passes make of it computes the same


def operands(batch: int = 2, heads: int = 2, length: int = 8) -> tuple[Tensor, ...]:
    """Query, key and value, all [B, H, L, D] with L = S = D = 8 and B = H."""
    return tuple(torch.randn(batch, heads, length, 8) for _ in range(3))


CHANCES: dict[str, Form] = {
    "keys_not_transposed": lambda q, k, v: F.softmax(q @ k, dim=-1) @ v,
    "features_as_tokens": lambda q, k, v: F.softmax(q.mT @ k, dim=-1) @ v,
    "weights_transposed": lambda q, k, v: F.softmax(product(q, k), dim=-1).mT @ v,
    "values_transposed": lambda q, k, v: F.softmax(product(q, k), dim=-1) @ v.mT,
    "over_queries": lambda q, k, v: F.softmax(product(q, k), dim=2) @ v,
    "batch_as_heads": lambda q, k, v: F.softmax(product(q, k.transpose(0, 1)), dim=-1) @ v,
    "values_of_other_heads": lambda q, k, v: F.softmax(product(q, k), dim=-1) @ v.transpose(0, 1),
    "values_of_other_entries": lambda q, k, v: F.softmax(product(q, k), dim=-1) @ v.flip(0),
    "tokens_as_heads": lambda q, k, v: F.softmax(
        product(q, k.reshape(2, 8, 2, 8).transpose(1, 2)), dim=-1) @ v,
    "heads_first": lambda q, k, v: F.softmax(
        q.transpose(0, 1).flatten(0, 1) @ k.flatten(0, 1).mT, dim=-1) @ v.flatten(0, 1),
    "heads_first_throughout": lambda q, k, v: F.softmax(
        q.transpose(0, 1).flatten(0, 1) @ k.transpose(0, 1).flatten(0, 1).mT, dim=-1)
        @ v.transpose(0, 1).flatten(0, 1),
    "einsum_of_features": lambda q, k, v: torch.einsum(
        "bhqk,bhkd->bhqd", torch.einsum("bhqd,bhdk->bhqk", q, k).softmax(-1), v),
    "einsum_swapped": lambda q, k, v: torch.einsum(
        "bhkq,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhkq", q, k).softmax(-1), v),
    "einsum_weights_swapped": lambda q, k, v: torch.einsum(
        "bhkq,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v),
    "einsum_over_all_heads": lambda q, k, v: torch.einsum(
        "bqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bqk", q, k).softmax(-1), v),
    "einsum_batch_as_heads": lambda q, k, v: torch.einsum(
        "bhqk,bhkd->bhqd", torch.einsum("bhqd,hbkd->bhqk", q, k).softmax(-1), v),
    "one_query_for_all_heads": lambda q, k, v: F.softmax(product(q[:, :1], k), dim=-1) @ v,
    "one_entry_for_all": lambda q, k, v: F.softmax(product(q, k[:1]), dim=-1) @ v[:1],
    "groups_of_keys_tiled_values": lambda q, k, v: F.softmax(
        product(q.repeat(1, 2, 1, 1), k.repeat_interleave(2, 1)), dim=-1) @ v.repeat(1, 2, 1, 1),
    "bias_per_head_or_entry": lambda q, k, v: F.softmax(
        product(q, k).unflatten(1, (2, 1)) + v[:, :1], dim=-1).flatten(1, 2) @ v,
    "grouped_with_a_bias_on_heads": lambda q, k, v: (F.softmax(
        q.repeat(1, 2, 1, 1).unflatten(1, (2, 2)) @ k.unsqueeze(2).mT + v[:, :1], dim=-1)
        @ v.unsqueeze(2)).flatten(1, 2),
    "flat_bias_heads_first": lambda q, k, v: F.softmax(torch.baddbmm(
        torch.arange(2.0).repeat_interleave(2).reshape(4, 1, 1) * torch.arange(8.0),
        q.flatten(0, 1), k.flatten(0, 1).mT), dim=-1) @ v.flatten(0, 1),
    "flat_scale_heads_first": lambda q, k, v: F.softmax(
        q.flatten(0, 1) @ k.flatten(0, 1).mT
        * torch.arange(1.0, 3.0).repeat_interleave(2).reshape(4, 1, 1), dim=-1) @ v.flatten(0, 1),
    "flat_sinks_heads_first": lambda q, k, v: F.softmax(torch.cat((
        q.flatten(0, 1) @ k.flatten(0, 1).mT,
        torch.arange(2.0).repeat_interleave(2).reshape(4, 1, 1).expand(4, 8, 1)), dim=-1),
        dim=-1)[..., :-1] @ v.flatten(0, 1),
    "one_entry_repeated": lambda q, k, v: F.softmax(
        product(q, k[:1].repeat(2, 1, 1, 1)), dim=-1) @ v[:1].repeat(2, 1, 1, 1),
    "one_entry_repeated_flat": lambda q, k, v: F.softmax(
        q.flatten(0, 1) @ k[:1].repeat(2, 1, 1, 1).flatten(0, 1).mT, dim=-1)
        @ v[:1].repeat(2, 1, 1, 1).flatten(0, 1),
    "one_entry_tiled": lambda q, k, v: F.softmax(
        product(q, k[:1].repeat(2, 1, 1, 1)), dim=-1) @ v[:1].repeat_interleave(2, dim=0),
    "entries_and_heads_tiled": lambda q, k, v: F.softmax(
        q.repeat(1, 2, 1, 1) @ k[:1].repeat(2, 2, 1, 1).mT, dim=-1) @ v.repeat(1, 2, 1, 1),
    "sinks_of_entries": lambda q, k, v: F.softmax(torch.cat((
        product(q, k), torch.arange(2.0).reshape(2, 1, 1, 1).expand(2, 2, 8, 1)), dim=-1),
        dim=-1)[..., :-1] @ v,
    "sinks_of_queries": lambda q, k, v: F.softmax(torch.cat((
        product(q, k), torch.arange(8.0).reshape(1, 1, 8, 1).expand(2, 2, 8, 1)), dim=-1),
        dim=-1)[..., :-1] @ v,
    "bias_of_one_row": lambda q, k, v: F.softmax(
        torch.baddbmm(v.flatten(0, 1)[:, :1], q.flatten(0, 1), k.flatten(0, 1).mT), dim=-1)
        @ v.flatten(0, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANCES)
def test_shapes_that_agree_by_chance(capture: Any, name: str) -> None:
    form, inputs = CHANCES[name], operands()
    program = capture(form, *inputs, passes=(Normalize(), FindAttention()))
    torch.testing.assert_close(program.module(*program.examples)[0], form(*inputs), **CLOSE)
