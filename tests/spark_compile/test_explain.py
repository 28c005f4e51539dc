"""``explain``: what would be done to a model, without computing with its weights."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
import torch
from decoders import ATTENTIONS, UNUSUAL, Decoder, Past, prompt
from rich.console import Console
from torch import Tensor
from torch._dynamo.utils import counters

from spark_compile import SparkError, explain


class Output(NamedTuple):
    logits: Tensor
    past_key_values: Past


class Named(Decoder):
    """A decoder with the argument and output names that transformers gives them."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, past_key_values: Past | None = None, use_cache: bool = True
    ) -> Output:
        return Output(*super().forward(input_ids, past_key_values))


def named(name: str, layers: int = 1) -> Named:
    return Named((ATTENTIONS | UNUSUAL)[name], layers=layers).requires_grad_(False)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_both_phases_and_every_site_are_reported(name: str) -> None:
    report = explain(named(name, layers=2), {"input_ids": prompt(13)}, window=4)
    assert [graph.phase for graph in report.graphs] == ["prefill", "decode"]
    for graph in report.graphs:
        assert [site.layer for site in graph.rewritten] == ["attentions.0", "attentions.1"]
        assert graph.matches["FindAttention"] == 2
        assert graph.left_alone is None
        assert graph.passes_ms > 0


def test_bytes_per_token_follow_the_ratio() -> None:
    stored = []
    for ratio in (0.0, 0.5):
        report = explain(named("manual"), {"input_ids": prompt(13)}, window=4, key_ratio=ratio)
        site = report.graphs[0].sites[0]
        assert (site.query_heads, site.kv_heads, site.key_dim, site.value_dim) == (4, 2, 8, 8)
        assert site.dense_token_bytes == 2 * (8 + 8) * 4
        stored.append(site.stored_token_bytes)
    # Dense keys, then 4 of 8 channels, an amplitude and two bytes of planes.
    assert stored == [2 * (32 + 32), 2 * (22 + 32)]


REASONS = {
    "scaled_late": "computed from what is cached",
    "key_norms": "the cache is also read by",
    "one_tensor": "same tensor",
}


@pytest.mark.parametrize("name", REASONS)
def test_refusals_are_reported_with_node_and_cause(name: str) -> None:
    report = explain(named(name, layers=2), {"input_ids": prompt(13)}, window=4)
    refusals = [site.refusal for graph in report.graphs for site in graph.sites if site.refusal]
    assert refusals
    assert all(REASONS[name] in refusal.reason and refusal.node for refusal in refusals)
    assert report.summary().count(REASONS[name]) == len(
        {r.phase for r in report.graphs if r.refusals()}
    )
    assert [graph.phase for graph in report.graphs] == ["prefill", "decode"]
    with pytest.raises(SparkError, match=REASONS[name]):
        explain(named(name), {"input_ids": prompt(13)}, window=4, strict=True)


def test_the_report_as_data_text_and_table() -> None:
    report = explain(named("sdpa_masked", layers=2), {"input_ids": prompt(13)}, window=4)
    data = json.loads(json.dumps(report.as_dict()))
    assert [graph["rewritten"] for graph in data["graphs"]] == [2, 2]
    assert "prefill: 2 of 2 sites rewritten" in report.summary()
    console = Console(record=True, width=200)
    console.print(report.table())
    text = console.export_text()
    assert text.count("attentions.1") == text.count("attentions.0") == 2
    assert text.count("rewritten") == 4


@pytest.mark.parametrize("meta_inputs", [False, True])
def test_weights_on_the_meta_device(meta_inputs: bool) -> None:
    with torch.device("meta"):
        model = named("sdpa_masked")
        tokens = prompt(13) if meta_inputs else None
    before = dict(model.named_parameters())
    report = explain(model, {"input_ids": prompt(13) if tokens is None else tokens}, window=4)
    assert [len(graph.rewritten) for graph in report.graphs] == [1, 1]
    assert [graph.phase for graph in report.graphs] == ["prefill", "decode"]
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] and after[name].is_meta for name in before)


def test_nothing_is_computed_or_changed() -> None:
    class Counting(Named):
        def __init__(self) -> None:
            super().__init__(ATTENTIONS["sdpa_masked"], layers=1)
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, *args: Any, **kwargs: Any) -> Output:
            self.steps.add_(1)
            return super().forward(*args, **kwargs)

    model = Counting().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    explain(model, {"input_ids": prompt(13)}, window=4)
    torch.testing.assert_close(dict(model.state_dict()), before)


def test_a_wrong_option_is_named() -> None:
    with pytest.raises(ValueError, match="option 'key_ratio' is 2"):
        explain(named("manual"), {"input_ids": prompt(13)}, key_ratio=2)


def test_times_are_told_and_the_share_of_compiling_where_it_was_asked_for() -> None:
    inputs = {"input_ids": prompt(13)}
    (traced, _), (compiled, _) = (
        explain(named("manual"), inputs, window=4, inner="eager", compile=asked).graphs
        for asked in (False, True)
    )
    assert traced.passes_ms > 0 < traced.lower_ms
    assert traced.compile_ms is None
    assert compiled.compile_ms is not None


@pytest.mark.slow
def test_the_share_is_of_compiling_and_not_of_finding_in_a_cache() -> None:
    for _ in range(2):
        torch._dynamo.reset()
        counters["inductor"].clear()
        report = explain(named("manual"), {"input_ids": prompt(13)}, window=4, compile=True)
        assert len(report.graphs) == 2
        assert not counters["inductor"]["fxgraph_cache_hit"]
        assert counters["inductor"]["fxgraph_cache_miss"] == 2
