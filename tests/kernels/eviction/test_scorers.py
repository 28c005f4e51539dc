"""Each scorer against its formula, written another way; and the texts of scorers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spark_compile.kernels.eviction import Prompt, PyramidKV, Scorer, SnapKV, parse_scorer

BATCH, QUERY_HEADS, HEADS, TOKENS, DIM = 2, 6, 3, 17, 8
TEXTS = [
    "snapkv(tokens=9,window=3,kernel=5,pooling=average)",
    "snapkv(tokens=9,window=3,kernel=1,pooling=max)",
    "pyramidkv(tokens=40,window=8,kernel=5,pooling=average,layers=5,beta=20)",
    "streamingllm(tokens=9,n_sink=2)",
    "knorm(tokens=9)",
    "keydiff(tokens=9)",
]


def causal() -> Tensor:
    return torch.ones(TOKENS, TOKENS).tril().bool().view(1, 1, TOKENS, TOKENS)


def prompt(padding: int = 0, softcap: float = 0.0, causal_offset: int | None = None) -> Prompt:
    """A prompt whose first batch entry begins with padding."""
    key = torch.randn(BATCH, HEADS, TOKENS, DIM)
    query = torch.randn(BATCH, QUERY_HEADS, TOKENS, DIM)
    mask = causal().repeat(BATCH, 1, 1, 1)
    mask[0, ..., :padding] = False
    given = None if causal_offset is not None else mask
    return Prompt(key, [query], given, causal_offset, 0.7, softcap)


def scored(text: str, given: Prompt) -> Tensor:
    score = parse_scorer(text).score(given)
    assert score.shape == (BATCH, HEADS, TOKENS)
    assert score.dtype == torch.float32
    return score


def test_a_text_comes_back() -> None:
    for text in TEXTS:
        assert parse_scorer(text).text == text
    assert {parse_scorer(text).NAME for text in TEXTS} == set(Scorer.KNOWN)
    assert parse_scorer(" snapkv( tokens = 128 , kernel=7)") == SnapKV(128, kernel=7)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("h2o(tokens=4)", "scorer 'h2o.*allowed is one of keydiff, knorm, pyramidkv, snapkv"),
        ("knorm(tokens=4,kernel=3)", "has no option 'kernel': allowed is tokens"),
        ("knorm(tokens=4,tokens=4)", "has option 'tokens' twice"),
        ("knorm", "missing 1 required positional argument: 'tokens'"),
        ("knorm(tokens=1.5)", "'tokens' of scorer 'knorm' is 1.5: allowed is an integer from 1"),
        ("snapkv(tokens=4,window=0)", "'window' of scorer 'snapkv' is 0"),
        ("pyramidkv(tokens=70,layers=0)", "'layers' of scorer 'pyramidkv' is 0"),
        ("pyramidkv(tokens=63,layers=2)", "'tokens' of scorer 'pyramidkv' is 63.*from 64"),
    ],
)
def test_a_wrong_text_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_scorer(text)


@pytest.mark.parametrize("by_mask", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("pooling", ["average", "max"])
def test_snapkv_pools_the_attention_of_the_latest_queries(
    by_mask: bool, softcap: float, pooling: str
) -> None:
    window, kernel = 3, 5
    given = prompt(softcap=softcap, causal_offset=None if by_mask else 0)
    text = f"snapkv(tokens=9,window={window},kernel={kernel},pooling={pooling})"
    score, query = scored(text, given), given.queries[0]
    for b in range(BATCH):
        for h in range(HEADS):
            heads = []
            for head in range(h * QUERY_HEADS // HEADS, (h + 1) * QUERY_HEADS // HEADS):
                weights = torch.zeros(TOKENS)
                for i in range(TOKENS - window, TOKENS):
                    dots = 0.7 * given.key[b, h, : i + 1] @ query[b, head, i]
                    dots = softcap * (dots / softcap).tanh() if softcap else dots
                    weights[: i + 1] += dots.softmax(0) / window
                before = weights[: TOKENS - window]
                near = [before[max(j - 2, 0) : j + 3] for j in range(len(before))]
                pooled = [n.max() if pooling == "max" else n.sum() / kernel for n in near]
                heads.append(torch.stack(pooled))
            expected = torch.stack(heads).mean(0)
            torch.testing.assert_close(score[b, h, : TOKENS - window], expected)


def test_snapkv_takes_the_mean_of_attentions_that_share_a_cache() -> None:
    given = prompt()
    other = torch.randn(BATCH, HEADS, TOKENS, DIM)
    both = Prompt(given.key, [*given.queries, other], given.mask, None, 0.7, 0.0)
    alone = Prompt(given.key, [other], given.mask, None, 0.7, 0.0)
    expected = (scored(TEXTS[0], given) + scored(TEXTS[0], alone)) / 2
    torch.testing.assert_close(scored(TEXTS[0], both), expected)


def test_snapkv_has_no_weights_of_queries_that_see_nothing() -> None:
    score = scored("snapkv(tokens=9,window=9)", prompt(padding=12))
    assert score.isfinite().all()
    assert not score[0].any()  # all tokens before the window are padding


def test_pyramidkv_falls_linearly_and_keeps_the_mean() -> None:
    scorer = parse_scorer("pyramidkv(tokens=328,window=8,layers=5,beta=20)")
    assert isinstance(scorer, PyramidKV)
    shares = [scorer.share(layer) for layer in range(5)]
    assert shares == [8 + 624, 8 + 472, 8 + 320, 8 + 168, 8 + 16]
    assert sum(shares) / 5 == 328
    assert scorer.in_layer("model.layers.3.self_attn") == SnapKV(176, 8, 5, "average")
    assert parse_scorer("pyramidkv(tokens=70,layers=1)").in_layer("h.0").tokens == 64 + 12
    for path in ("model.layers.5.attn", "model.attn2", ""):
        with pytest.raises(ValueError, match="has to know which of 5 layers"):
            scorer.in_layer(path)


def test_streamingllm_prefers_the_first_and_the_latest_that_are_no_padding() -> None:
    score = scored("streamingllm(tokens=9,n_sink=2)", prompt(padding=4))
    assert score[0, 0, 4:6].isinf().all()
    assert score[1, 0, :2].isinf().all()
    assert (score[1, :, 2:].diff(dim=-1) > 0).all()
    assert (score[0, :, 6:].diff(dim=-1) > 0).all()


def test_knorm_is_the_norm_of_the_key() -> None:
    given = prompt()
    expected = -(given.key**2).sum(-1).sqrt()
    torch.testing.assert_close(scored("knorm(tokens=9)", given), expected)


def test_keydiff_is_the_cosine_with_the_mean_direction() -> None:
    given = prompt(padding=4)
    score = scored("keydiff(tokens=9)", given)
    for b, first in ((0, 4), (1, 0)):
        unit = given.key[b] / given.key[b].norm(dim=-1, keepdim=True)
        anchor = unit[:, first:].mean(1, keepdim=True)
        expected = -(unit * anchor).sum(-1) / anchor.norm(dim=-1)
        torch.testing.assert_close(score[b, :, first:], expected[:, first:])


@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("mask_heads", [1, QUERY_HEADS])
def test_padding_is_what_the_latest_query_of_no_head_sees(kind: str, mask_heads: int) -> None:
    seen = causal().repeat(BATCH, mask_heads, 1, 1)
    seen[0, :, :, :5] = False
    if mask_heads > 1:
        seen[1, 0, -1, 7] = False  # one head of a group: the other one sees it
        seen[1, 2:4, -1, 8] = False
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -3e38)
    key = torch.randn(BATCH, HEADS, TOKENS, DIM)
    padding = Prompt(key, [], mask, None, 1.0, 0.0).padding
    expected = torch.zeros(BATCH, HEADS, TOKENS, dtype=torch.bool)
    expected[0, :, :5] = True
    expected[1, 1, 8] = mask_heads > 1
    assert torch.equal(padding, expected)
