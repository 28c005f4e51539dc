"""The page with a layer's graph before and after: what is in it, and that it can be drawn."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from xml.etree import ElementTree

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from spark_compile.config import SparkConfig
from spark_compile.exported.decoder import PHASES, decoder_of
from spark_compile.exported.graph import Graph
from spark_compile.exported.layout import arrange
from spark_compile.exported.picture import report_page
from spark_compile.exported.tracing import trace
from spark_compile.report import Refusal

SVG = "{http://www.w3.org/2000/svg}"
Box = tuple[float, float, float, float]


@pytest.fixture(scope="module")
def graphs() -> list[Graph]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    decoder = decoder_of(LlamaForCausalLM(config).eval(), 64, 1)
    options = SparkConfig.from_options({"key_format": "int8", "value_format": "int8"})
    return [trace(decoder, phase, options, 64, 1) for phase in PHASES]


@pytest.fixture(scope="module")
def drawn(graphs: list[Graph]) -> dict[str, ElementTree.Element]:
    page = report_page("a model", graphs, None, {})
    pictures = [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.S)]
    return {picture.attrib["aria-label"]: picture for picture in pictures}


def titles(picture: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in picture.iterfind(f".//{SVG}text[@class='title']")]


def rectangle(box: ElementTree.Element) -> Box:
    rect = box.find(f"{SVG}rect")
    assert rect is not None
    x, y, width, height = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


def boxes(picture: ElementTree.Element) -> dict[str, Box]:
    found = picture.iterfind(f"{SVG}g[@data-key]")
    return {box.attrib["data-key"]: rectangle(box) for box in found}


def overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def test_both_phases_are_drawn_before_and_after(drawn: dict[str, ElementTree.Element]) -> None:
    assert list(drawn) == ["prefill before", "prefill after", "decode before", "decode after"]


def test_what_the_passes_did_is_seen(drawn: dict[str, ElementTree.Element]) -> None:
    assert "spark.step" in titles(drawn["decode after"])
    assert "spark.build" in titles(drawn["prefill after"])
    for name in ("prefill before", "decode before"):
        assert not any(title.startswith("spark.") for title in titles(drawn[name]))
        assert titles(drawn[name]).count("index_copy") == 2
    assert "sdpa" in titles(drawn["prefill after"])
    assert "sdpa" not in titles(drawn["decode after"])


def test_only_the_attention_of_one_layer_is_drawn(drawn: dict[str, ElementTree.Element]) -> None:
    for picture in drawn.values():
        shown = titles(picture)
        assert [shown.count(f"{name}_proj") for name in "qkvo"] == [1, 1, 1, 1]
        assert not {"gate_proj", "view", "transpose", "expand", "slice", "layers_1_keys"} & {*shown}


def test_every_value_leads_somewhere(drawn: dict[str, ElementTree.Element]) -> None:
    """All boxes but the layer's result and what is written back are read, and arrows have ends."""
    for name, picture in drawn.items():
        keys = boxes(picture)
        arrows = [
            (arrow.attrib["data-from"], arrow.attrib["data-to"])
            for arrow in picture.iterfind(f"{SVG}g[@data-from]")
        ]
        assert all(end in keys for arrow in arrows for end in arrow)
        ends = keys.keys() - {source for source, _ in arrows}
        written = {key for key in keys if key.startswith("new ")}
        assert len(ends - written) == 1, name  # o_proj
        assert len(written) == (0 if name == "decode after" else 2)


def test_boxes_do_not_overlap_and_hold_their_texts(drawn: dict[str, ElementTree.Element]) -> None:
    for picture in drawn.values():
        left, top, width, height = map(float, picture.attrib["viewBox"].split())
        for one, other in combinations(boxes(picture).values(), 2):
            assert not overlap(one, other)
        for group in picture.iterfind(f"{SVG}g[@data-key]"):
            x, y, right, bottom = rectangle(group)
            assert left <= x
            assert top <= y
            assert right <= left + width
            assert bottom <= top + height
            for text in group.iterfind(f"{SVG}text"):
                size = 12.5 if text.attrib["class"] == "title" else 10.0
                assert len(text.text or "") * size * 0.62 <= right - x
                assert y < float(text.attrib["y"]) < bottom


def test_shapes_name_the_only_symbol(drawn: dict[str, ElementTree.Element]) -> None:
    told = [text.text or "" for text in drawn["prefill before"].iter(f"{SVG}text")]
    assert "[1, 4, S, 8] f32" in told
    assert not any(re.search(r"\bs\d+", line) for line in told)
    stored = [text.text or "" for text in drawn["decode after"].iter(f"{SVG}text")]
    assert any(re.fullmatch(r"pages \[.*\] u8", line) for line in stored)


def test_a_state_that_is_changed_in_place_has_two_heads(
    drawn: dict[str, ElementTree.Element],
) -> None:
    heads = {
        arrow.attrib["data-from"]: (arrow[1].attrib["d"]).count("z")
        for arrow in drawn["decode after"].iterfind(f"{SVG}g[@data-from]")
    }
    assert {source for source, count in heads.items() if count == 2} == {
        "cache layers_0_keys", "cache layers_0_values",
    }  # fmt: skip


def test_texts_of_a_model_are_escaped(graphs: list[Graph]) -> None:
    page = report_page("<b>&'", graphs[1:], "<i>.layer", {"<u>": "<s>"})
    assert not any(tag in page for tag in ("<b>", "<i>.", "<u>", "<s>"))
    assert "&lt;b&gt;&amp;" in page
    assert "No operator of this graph is of that module" in page


def test_a_refused_site_says_why(graphs: list[Graph]) -> None:
    first, second = graphs[1].report.sites
    refused = replace(first, refusal=Refusal("a mask of <unknown> kind", "node_7"))
    report = replace(graphs[1].report, sites=(refused, second))
    page = report_page("a model", [replace(graphs[1], report=report)], None, {})
    assert "refused: a mask of &lt;unknown&gt; kind (node node_7)" in page
    assert f"<code>{second.layer}</code>" in page  # the first that was rewritten is drawn


def test_the_page_needs_nothing_else(graphs: list[Graph]) -> None:
    page = report_page("a model", graphs, None, {"capacity": "64 tokens"})
    assert "<script" not in page
    assert set(re.findall(r"https?://[^\"' ]*", page)) == {"http://www.w3.org/2000/svg"}
    assert "64 tokens" in page


def test_the_graph_before_is_a_copy(graphs: list[Graph]) -> None:
    for graph in graphs:
        names = {str(node.target) for node in graph.before.find_nodes(op="placeholder")}
        assert {"layers_0_keys", "position"} <= names
        graph.before.lint()
        calls = graph.before.find_nodes(
            op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
        )
        assert len(calls) == 2
        assert all(tree_leaves(call.meta["val"]) for call in calls)


def test_rows_and_arrows_of_a_layout() -> None:
    """Readers are below what they read, and an arrow past a row keeps clear of its boxes."""
    sizes = dict.fromkeys("abcd", (100.0, 40.0))
    layout = arrange(sizes, [("a", "b"), ("b", "c"), ("a", "c"), ("d", "c")])
    top = {name: place.y for name, place in layout.places.items()}
    assert top["a"] < top["b"] == top["d"] < top["c"]
    beside = {x for x, y in layout.paths["a", "c"] if top["b"] <= y <= top["b"] + 40}
    assert len(beside) == 1
    for name in "bd":
        assert abs(beside.copy().pop() - layout.places[name].x) > 50


def test_nothing_is_no_trouble(graphs: list[Graph]) -> None:
    assert arrange({}, []).places == {}
    empty = replace(graphs[0].report, sites=())
    assert "<svg" not in report_page("a", [replace(graphs[0], report=empty)], None, {})
