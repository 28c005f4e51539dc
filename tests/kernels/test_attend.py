"""The reference attention against torch's own, and against direct formulas where torch has none."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spark_compile.kernels.reference.attend import attention


def inputs(
    length: int, tokens: int, heads: tuple[int, int] = (4, 2), dims: tuple[int, int] = (8, 8)
) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(2, heads[0], length, dims[0])
    key, value = (torch.randn(2, heads[1], tokens, dim) for dim in dims)
    return query, key, value


def check_against_sdpa(
    qkv: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, offset: int | None, **sdpa: object
) -> None:
    output, lse = attention(*qkv, mask, offset, 0.3, 0.0, None)
    expected = F.scaled_dot_product_attention(*qkv, scale=0.3, enable_gqa=True, **sdpa)  # type: ignore[arg-type]
    torch.testing.assert_close(output, expected)
    assert output.dtype == lse.dtype == torch.float32


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1), (9, 3)])
@pytest.mark.parametrize("dims", [(8, 8), (7, 3), (3, 12)])
def test_plain_attention(length: int, heads: tuple[int, int], dims: tuple[int, int]) -> None:
    check_against_sdpa(inputs(length, 11, heads, dims), None, None)


@pytest.mark.parametrize("shape", [(2, 6, 5, 11), (2, 1, 5, 11), (1, 1, 1, 11), (5, 11), (5, 1)])
def test_masks_broadcast(shape: tuple[int, ...]) -> None:
    qkv = inputs(5, 11, (6, 2))
    visible = torch.rand(shape) < 0.6
    visible[..., 0] = True  # no query without a key: there torch has NaN or 0, by backend
    check_against_sdpa(qkv, visible, None, attn_mask=visible)
    bias = torch.randn(shape).masked_fill(~visible, -torch.inf)
    check_against_sdpa(qkv, bias, None, attn_mask=bias)


def test_causal_offset_zero_is_is_causal() -> None:
    check_against_sdpa(inputs(6, 6), None, 0, is_causal=True)
    check_against_sdpa(inputs(4, 9), None, 0, is_causal=True)


@pytest.mark.parametrize("offset", [0, 3, 20, -2])
def test_causal_offset_is_a_mask_and_adds_to_one(offset: int) -> None:
    qkv = inputs(5, 11)
    mask = torch.ones(5, 11, dtype=torch.bool).tril(offset)
    output, lse = attention(*qkv, None, offset, 0.3, 0.0, None)
    as_mask, as_mask_lse = attention(*qkv, mask, None, 0.3, 0.0, None)
    torch.testing.assert_close(output, as_mask)
    torch.testing.assert_close(lse, as_mask_lse)
    padding = torch.rand(2, 1, 1, 11) < 0.7
    both, _ = attention(*qkv, padding, offset, 0.3, 0.0, None)
    torch.testing.assert_close(both, attention(*qkv, padding & mask, None, 0.3, 0.0, None)[0])


def test_softcap_sinks_and_mask_follow_the_formula() -> None:
    query, key, value = inputs(3, 7, (4, 2), (8, 5))
    bias, sinks = torch.randn(2, 1, 3, 7), torch.tensor([0.5, -1.0, 2.0, 0.0])
    output, lse = attention(query, key, value, bias, None, 0.7, 1.5, sinks)
    for b in range(2):
        for h in range(4):
            for i in range(3):
                raw = [0.7 * float(query[b, h, i] @ key[b, h // 2, j]) for j in range(7)]
                scores = [1.5 * math.tanh(s / 1.5) + float(bias[b, 0, i, j])
                          for j, s in enumerate(raw)]  # fmt: skip
                total = sum(map(math.exp, scores)) + math.exp(sinks[h])
                expected = sum(math.exp(s) / total * value[b, h // 2, j]
                               for j, s in enumerate(scores))  # fmt: skip
                torch.testing.assert_close(output[b, h, i], expected)
                torch.testing.assert_close(
                    float(lse[b, h, i]), math.log(total), rtol=1e-5, atol=1e-5
                )


def test_a_sink_takes_a_share_and_has_no_value() -> None:
    query, key, value = inputs(2, 6)
    sinks = torch.tensor([0.3, 3.0, -torch.inf, 9.0])
    output, lse = attention(query, key, value, None, None, 0.3, 0.0, sinks)
    plain, plain_lse = attention(query, key, value, None, None, 0.3, 0.0, None)
    share = torch.exp(plain_lse - lse)
    torch.testing.assert_close(output, plain * share.unsqueeze(-1))
    torch.testing.assert_close(share[:, 2], torch.ones(2, 2))


@pytest.mark.parametrize("kind", ["bool", "additive", "causal"])
def test_a_query_that_sees_nothing_has_output_zero(kind: str) -> None:
    qkv, mask, offset = inputs(3, 6), torch.ones(3, 6, dtype=torch.bool), None
    mask[0] = False
    if kind == "additive":
        mask = torch.zeros(3, 6).masked_fill(~mask, -torch.inf)
    if kind == "causal":
        mask, offset = None, -1  # type: ignore[assignment]
    output, lse = attention(*qkv, mask, offset, 0.3, 0.0, None)
    assert (output[:, :, 0] == 0).all()
    assert (lse[:, :, 0] == -torch.inf).all()
    assert output.isfinite().all()
    assert lse[:, :, 1:].isfinite().all()


@pytest.mark.parametrize("split", [1, 4, 10])
def test_two_parts_merge_by_their_log_sum_exp(split: int) -> None:
    query, key, value = inputs(3, 11, (6, 2), (8, 5))
    mask = torch.rand(2, 1, 3, 11) < 0.7
    mask[0, :, 0, :split] = False  # one part sees nothing
    mask[..., -1] = True
    whole, whole_lse = attention(query, key, value, mask, None, 0.3, 2.0, None)
    parts = [
        attention(query, key[:, :, part], value[:, :, part], mask[..., part], None, 0.3, 2.0, None)
        for part in (slice(None, split), slice(split, None))
    ]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(output * torch.exp(own - lse).unsqueeze(-1) for output, own in parts)
    torch.testing.assert_close(lse, whole_lse)
    torch.testing.assert_close(merged, whole)
