"""``find_attention``: every way to write attention becomes one canonical operator, or a refusal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decoders import expanded
from torch import Tensor

from spark_compile.passes.find_attention import CANONICAL, FindAttention
from spark_compile.passes.normalize import Normalize

PASSES = (Normalize(), FindAttention())
SCALE = 1 / math.sqrt(8)
SDPA = F.scaled_dot_product_attention
Form = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def operands(groups: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query [B, Hq, L, D], key and value [B, Hkv, S, D], additive mask [B, 1, L, S]."""
    key, value = torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    mask = torch.zeros(1, 1, 5, 7).masked_fill(torch.rand(5, 7) < 0.3, -1e4)
    return torch.randn(1, 2 * groups, 5, 8), key, value, mask


def weighted(scores: Tensor, value: Tensor) -> Tensor:
    return F.softmax(scores, dim=-1) @ value


def product(query: Tensor, key: Tensor) -> Tensor:
    return query @ expanded(key, 2).transpose(2, 3)


def hugging_face(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q, expanded(k, 2).transpose(2, 3)) * SCALE + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.0, training=False), expanded(v, 2))


def repeated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    return weighted(q @ k.permute(0, 1, 3, 2) / math.sqrt(8) + mask, v)


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return weighted(torch.tanh(product(q, k) * SCALE / 30.0) * 30.0 + mask, expanded(v, 2))


def scaled_behind_the_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return weighted((product(q, k) + mask) * SCALE, expanded(v, 2))


def scaled_by_a_tensor(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    heads = torch.arange(1.0, 5.0).reshape(4, 1, 1)
    return weighted((product(q, k) / torch.tensor(8.0) - mask.abs()) * heads, expanded(v, 2))


def filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return weighted((product(q, k) * SCALE).masked_fill(mask < 0, -1e4), expanded(v, 2))


def chosen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    least = torch.full([], torch.finfo(q.dtype).min)
    return weighted(torch.where(mask < 0, least, product(q, k) * SCALE), expanded(v, 2))


def several_biases(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    slopes = torch.arange(4.0).reshape(4, 1, 1) * torch.arange(7.0)
    scores = torch.where(mask < 0, -torch.inf, slopes + (product(q, k) * SCALE + mask))
    return weighted(scores - scores.amax(-1, keepdim=True), expanded(v, 2))


def flat(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Batch and heads in one dimension, the bias inside the product, as BLOOM has it."""
    key, value = expanded(k, 2).flatten(0, 1), expanded(v, 2).flatten(0, 1)
    bias = torch.arange(4.0).reshape(4, 1, 1) * torch.arange(7.0)
    scores = torch.baddbmm(bias, q.reshape(4, 5, 8), key.mT, beta=0.5, alpha=SCALE)
    weights = F.softmax(scores.view(1, 4, 5, 7) + mask, dim=-1)
    return torch.bmm(weights.view(4, 5, 7), value).view(1, 4, 5, 8)


def five_dimensional(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q.unflatten(1, (2, 2)) @ k.unsqueeze(2).mT * SCALE + mask.unsqueeze(2)
    return (F.softmax(scores, dim=-1) @ v.unsqueeze(2)).flatten(1, 2)


def squeezed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q[None, None] @ expanded(k, 2)[None, None].mT).squeeze((0, 1)) * SCALE + mask
    return weighted(scores, expanded(v, 2))


def summed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("blhd,bshd->bhls", q.transpose(1, 2), expanded(k, 2).transpose(1, 2))
    weights = F.softmax(scores * SCALE + mask, dim=-1)
    return torch.einsum("bhls,bhsd->blhd", weights, expanded(v, 2)).transpose(1, 2)


def grouped_sums(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("bhgld,bhsd->bhgls", q.unflatten(1, (2, 2)), k) * SCALE
    weights = F.softmax(scores + mask.unsqueeze(2), dim=-1)
    return torch.einsum("bhgls,bhsd->bhgld", weights, v).flatten(1, 2)


def with_sinks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    sinks = torch.arange(4.0).reshape(1, -1, 1, 1).expand(1, -1, 5, -1)
    scores = torch.cat((product(q, k) * SCALE + mask, sinks), dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return F.softmax(scores, dim=-1)[..., :-1] @ expanded(v, 2)


def tiled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Head h of four reads key head h % 2, with a bias and a sink for each head."""
    k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
    slopes = torch.arange(4.0).reshape(4, 1, 1) * torch.arange(7.0)
    scores = (q @ k.mT * SCALE + mask + slopes) / (torch.arange(4.0).reshape(4, 1, 1) + 1)
    return weighted(scores, v) * sink_gate(scores, torch.arange(4.0))


def tiled_in_five_dimensions(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q.unflatten(1, (2, 2)) @ k.unsqueeze(1).mT * SCALE + mask.unsqueeze(1)
    return (F.softmax(scores, dim=-1) @ v.unsqueeze(1)).flatten(1, 2)


def tiled_and_flat(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    key, value = (x.repeat(1, 2, 1, 1).flatten(0, 1) for x in (k, v))
    scores = torch.bmm(q.flatten(0, 1), key.mT) * SCALE + mask[0]
    return torch.bmm(F.softmax(scores, dim=-1), value).unflatten(0, q.shape[:2])


def sink_gate(scores: Tensor, sinks: Tensor) -> Tensor:
    """What a softmax loses to one more logit per head, as Granite SWA writes it: [B, H, L, 1]."""
    total = torch.logsumexp(scores, dim=-1)
    return (total - sinks.reshape(1, -1, 1)).to(torch.float32).sigmoid().unsqueeze(-1)


def gated_by_sinks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = product(q, k) * SCALE + mask
    return weighted(scores, expanded(v, 2)) * sink_gate(scores, torch.arange(4.0)).to(q.dtype)


def gated_by_sinks_as_columns(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores, sinks = product(q, k) * SCALE + mask, torch.arange(4.0).reshape(4, 1, 1)
    gate = torch.sigmoid(scores.logsumexp(-1, keepdim=True) - sinks)
    return gate * weighted(scores, expanded(v, 2))


FORMS: dict[str, tuple[Form, int | None, bool, float, float]] = {
    # name: form, causal offset, has a mask, scale, softcap
    "gqa": (lambda q, k, v, m: SDPA(q, k, v, m, enable_gqa=True), None, True, SCALE, 0.0),
    "gqa_keyword": (
        lambda q, k, v, m: SDPA(q, k, v, attn_mask=m > -1, scale=0.5, enable_gqa=True),
        None, True, 0.5, 0.0,
    ),
    "expanded": (
        lambda q, k, v, m: SDPA(q, expanded(k, 2), expanded(v, 2), m), None, True, SCALE, 0.0,
    ),
    "causal": (
        lambda q, k, v, m: SDPA(q, expanded(k, 2), expanded(v, 2), is_causal=True),
        0, False, SCALE, 0.0,
    ),
    "open": (lambda q, k, v, m: SDPA(q, k, v, enable_gqa=True), None, False, SCALE, 0.0),
    "eager": (hugging_face, None, True, SCALE, 0.0),
    "repeated": (repeated, None, True, SCALE, 0.0),
    "capped": (capped, None, True, SCALE, 30.0),
    "mask_first": (
        lambda q, k, v, m: weighted(m + SCALE * product(q, k), expanded(v, 2)),
        None, True, SCALE, 0.0,
    ),
    "adjoint": (
        lambda q, k, v, m: weighted(q @ expanded(k, 2).mT * 0.3, expanded(v, 2)),
        None, False, 0.3, 0.0,
    ),
    "upcast": (
        lambda q, k, v, m: F.softmax((product(q, k) * SCALE).double() + m, dim=-1).type(q.dtype)
        @ expanded(v, 2),
        None, True, SCALE, 0.0,
    ),
    "late_scale": (scaled_behind_the_mask, None, True, SCALE, 0.0),
    "tensor_scale": (scaled_by_a_tensor, None, True, 1 / 8, 0.0),
    "filled": (filled, None, True, SCALE, 0.0),
    "chosen": (chosen, None, True, SCALE, 0.0),
    "several_biases": (several_biases, None, True, SCALE, 0.0),
    "flat": (flat, None, True, SCALE, 0.0),
    "five_dimensional": (five_dimensional, None, True, SCALE, 0.0),
    "squeezed": (squeezed, None, True, SCALE, 0.0),
    "einsum": (summed, None, True, SCALE, 0.0),
    "grouped_einsum": (grouped_sums, None, True, SCALE, 0.0),
    "sinks": (with_sinks, None, True, SCALE, 0.0),
    "sinks_gate": (gated_by_sinks, None, True, SCALE, 0.0),
    "sinks_columns": (gated_by_sinks_as_columns, None, True, SCALE, 0.0),
    "sinks_tiled": (tiled, None, True, SCALE, 0.0),
    "tiled_sdpa": (
        lambda q, k, v, m: SDPA(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), m),
        None, True, SCALE, 0.0,
    ),
    "tiled_in_five_dimensions": (tiled_in_five_dimensions, None, True, SCALE, 0.0),
    "tiled_and_flat": (tiled_and_flat, None, True, SCALE, 0.0),
    "bare": (lambda q, k, v, m: weighted(product(q, k), expanded(v, 2)), None, False, 1.0, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_becomes_one_canonical_attention(capture: Any, count: Any, name: str) -> None:
    form, causal_offset, has_mask, scale, softcap = FORMS[name]
    inputs = operands()
    program = capture(form, *inputs, passes=PASSES)
    (node,) = program.graph.find_nodes(op="call_function", target=CANONICAL)
    assert program.matches["FindAttention"] == 1
    assert program.sites == []
    assert count(program, "aten.scaled_dot_product", "aten.softmax", "aten.matmul") == 0
    assert count(program, "spark.attention") == 1
    query, key, value, mask, offset, found_scale, found_softcap, sinks = node.args
    shapes = [tuple(operand.meta["val"].shape) for operand in (query, key, value)]
    assert shapes == [(1, 4, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8)]
    assert key.op == value.op == "placeholder"
    assert (mask is not None) == has_mask
    assert (offset, sinks is not None) == (causal_offset, name.startswith("sinks"))
    assert found_scale == pytest.approx(scale)
    assert found_softcap == pytest.approx(softcap)
    actual = program.module(*program.examples)[0]
    torch.testing.assert_close(actual.to(torch.float32), form(*inputs).to(torch.float32))


def test_causal_with_a_past_is_aligned_to_the_first_key(capture: Any) -> None:
    """is_causal over more keys than queries hides the later keys, as torch defines it."""

    def attend(q: Tensor, past: Tensor, new: Tensor) -> Tensor:
        key = torch.cat((past, new), dim=2)
        return SDPA(q, key, key, is_causal=True)

    inputs = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 3, 8)
    program = capture(attend, *inputs, passes=PASSES)
    (node,) = program.graph.find_nodes(op="call_function", target=CANONICAL)
    assert node.args[4] == 0
    torch.testing.assert_close(program.module(*program.examples)[0], attend(*inputs))


def test_the_output_keeps_its_dtype(capture: Any) -> None:
    """Queries and keys in float32, as some rotary embeddings leave them, values in bfloat16."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.softmax(product(q, k) * SCALE, dim=-1).to(v.dtype) @ expanded(v, 2)

    query, key, value, _ = operands()
    program = capture(attend, query, key, value.bfloat16(), passes=PASSES)
    assert program.returned()[0].meta["val"].dtype == torch.bfloat16
    assert program.module(*program.examples)[0].dtype == torch.bfloat16


def weights_returned(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    weights = F.softmax(product(q, k) * SCALE + mask, dim=-1)
    return weights @ expanded(v, 2), weights


def sink_per_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.cat((product(q, k) * SCALE, q[..., :1]), dim=-1)
    return F.softmax(scores, dim=-1)[..., :-1] @ expanded(v, 2)


def wrong_column_dropped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    sinks = torch.arange(4.0).reshape(1, -1, 1, 1).expand(1, -1, 5, -1)
    scores = torch.cat((product(q, k) * SCALE, sinks), dim=-1)
    return F.softmax(scores, dim=-1)[..., 1:] @ expanded(v, 2)


def scaled_per_key(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return weighted(product(q, k) * torch.arange(1.0, 8.0), expanded(v, 2))


def faintly_filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return weighted((product(q, k) * SCALE).masked_fill(mask < 0, -1.0), expanded(v, 2))


def gated_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (F.softmax(product(q, k), dim=-1) * mask) @ expanded(v, 2)


def gate_of_other_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = product(q, k) * SCALE
    return weighted(scores + mask, expanded(v, 2)) * sink_gate(scores, torch.arange(4.0))


def gate_per_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = product(q, k) * SCALE
    gate = torch.sigmoid(scores.logsumexp(-1) - torch.arange(5.0))
    return weighted(scores, expanded(v, 2)) * gate.unsqueeze(-1)


def gate_the_other_way(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores, sinks = product(q, k) * SCALE, torch.arange(4.0).reshape(4, 1)
    gate = torch.sigmoid(sinks - scores.logsumexp(-1))
    return weighted(scores, expanded(v, 2)) * gate.unsqueeze(-1)


def gate_over_queries(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As many queries as keys: only the dimension tells."""
    k, v = k[:, :, :5], v[:, :, :5]
    scores, sinks = product(q, k) * SCALE, torch.arange(4.0).reshape(4, 1)
    gate = torch.sigmoid(scores.logsumexp(-2) - sinks)
    return weighted(scores, expanded(v, 2)) * gate.unsqueeze(-1)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "dropout": (lambda q, k, v, m: SDPA(q, k, v, m, dropout_p=0.1, enable_gqa=True), "dropout_p"),
    "weights": (weights_returned, "the attention weights are also used elsewhere"),
    "flat": (lambda q, k, v, m: SDPA(q[0], expanded(k, 2)[0], expanded(v, 2)[0]), "3 dimensions"),
    "sink_per_query": (sink_per_query, "not a logit per head"),
    "wrong_column_dropped": (
        wrong_column_dropped,
        "the attention weights are changed by aten.slice.Tensor",
    ),
    "tiled_keys_alone": (
        lambda q, k, v, m: SDPA(q, k.repeat(1, 2, 1, 1), expanded(v, 2), m),
        "other heads",
    ),
    "gate_of_other_scores": (gate_of_other_scores, "the attention weights are also used elsewhere"),
    "gate_per_query": (gate_per_query, "not a logit per head"),
    "gate_the_other_way": (gate_the_other_way, "the attention weights are also used elsewhere"),
    "gate_over_queries": (gate_over_queries, "the attention weights are also used elsewhere"),
    "scaled_per_key": (scaled_per_key, "aten.mul.Tensor between queries, keys and softmax"),
    "faintly_filled": (faintly_filled, "masked_fill"),
    "gated_weights": (gated_weights, "weights are changed by aten.mul.Tensor before the values"),
    "scores_without_nan": (
        lambda q, k, v, m: weighted((product(q, k) + m).nan_to_num(), expanded(v, 2)),
        "aten.nan_to_num.default between queries, keys and softmax",
    ),
    "rounded_scores": (
        lambda q, k, v, m: weighted(
            (product(q, k).double().round() / 2).float() + m, expanded(v, 2)
        ),
        "aten.round.default between queries, keys and softmax",
    ),
    "running_scores": (
        lambda q, k, v, m: weighted(product(q, k).cumsum(-1), expanded(v, 2)),
        "aten.cumsum.default between queries, keys and softmax",
    ),
    "weights_without_nan": (
        lambda q, k, v, m: F.softmax(product(q, k) + m, dim=-1).nan_to_num(0.0) @ expanded(v, 2),
        "the attention weights are changed by aten.nan_to_num.default before the values",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_bound_is_refused_and_reported(capture: Any, calls: Any, name: str) -> None:
    form, reason = REFUSED[name]
    inputs = operands()
    program = capture(form, *inputs, passes=PASSES)
    assert program.matches["FindAttention"] == 0
    assert calls(program) == calls(capture(form, *inputs, passes=[Normalize()]))
    assert len(program.sites) == 1, "not even reported"
    refusal = program.sites[0].refusal
    assert refusal.node in {node.name for node in program.graph.nodes}
    assert reason in refusal.reason


def router(x: Tensor, weight: Tensor) -> Tensor:
    return F.softmax(x @ weight, dim=-1).topk(2).values


NO_ATTENTION: dict[str, Callable[..., Any]] = {
    "router": lambda q, k, v, m: router(q[0, 0], k[0, 0].mT),
    "softmax_4d": lambda q, k, v, m: F.softmax(q, dim=-1) @ q.mT,
    "softmax_of_features": lambda q, k, v, m: F.softmax(F.layer_norm(q, (8,)), dim=-1) @ q.mT,
    "experts": lambda q, k, v, m: (
        F.softmax(F.linear(q, k[0, 0]).exp(), dim=-1).exp() @ expanded(v, 2)
    ),
    "softmax_of_scores_alone": lambda q, k, v, m: F.softmax(product(q, k), dim=-1).sum(),
    "over_queries": lambda q, k, v, m: F.softmax(product(q, k), dim=-2) @ expanded(v, 2),
}


@pytest.mark.parametrize("name", NO_ATTENTION)
def test_other_softmaxes_are_no_sites(capture: Any, calls: Any, name: str) -> None:
    program = capture(NO_ATTENTION[name], *operands(), passes=PASSES)
    before = calls(capture(NO_ATTENTION[name], *operands(), passes=[Normalize()]))
    assert calls(program) == before
    assert program.sites == []
