"""The page that shows what became of a model: a layer's graphs before and after, and all sites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise

from ..report import GraphReport, Site
from ..storage import STORED
from .boxes import Box, Diagram, Sources, diagram
from .graph import Graph
from .layout import Place, Point, arrange
from .page import LEGEND, PAGE

_TITLE, _DETAIL = 12.5, 10.0
"""Sizes of letters in pixels; a letter of a monospaced font is at most 0.62 of that wide."""
_LETTER = 0.62
_LINE, _PAD, _MARGIN = 14.0, 9.0, 6.0
_LONGEST = 25
"""Letters of a line; what is longer is cut."""


def report_page(
    title: str, graphs: Sequence[Graph], layer: str | None, facts: Mapping[str, str]
) -> str:
    """A page of HTML that needs nothing else.

    Args:
        title: the model's name.
        graphs: the phases, as ``trace`` returns them.
        layer: whose attention is drawn, as ``Site.layer`` has it; None draws the first that was
            rewritten, or else the first.
        facts: what is told of the model and its files, by name.
    """
    reports = [graph.report for graph in graphs]
    layer = layer or _first_layer(reports)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in facts.items()
    )
    drawn = "".join(_phase(graph, layer) for graph in graphs) if layer else ""
    return PAGE.substitute(
        title=escape(title),
        facts=f'<table class="facts">{rows}</table>' if rows else "",
        bars=_bars(reports),
        layer=f"<h2>Attention of <code>{escape(layer)}</code></h2>" if layer else "",
        legend=LEGEND if layer else "",
        phases=drawn,
        sites=_sites(reports),
    )


def _first_layer(reports: Sequence[GraphReport]) -> str | None:
    sites = [site for report in reports for site in report.sites]
    return min(sites, key=lambda site: site.refusal is not None).layer if sites else None


def _bars(reports: Sequence[GraphReport]) -> str:
    """What a token takes in the caches of all layers, before and after."""
    sites = next((report.rewritten for report in reports if report.rewritten), ())
    dense = sum(site.dense_token_bytes for site in sites)
    stored = sum(site.stored_token_bytes for site in sites)
    if not dense:
        return ""
    most = max(dense, stored)
    bars = "".join(
        f'<div class="name">{name}</div><div class="bar {name}">'
        f'<i style="width:{100 * value / most:.1f}%"></i></div>'
        f'<div class="number">{value:,} bytes</div>'
        for name, value in (("before", dense), ("after", stored))
    )
    return (
        f'<figure class="bars">{bars}<figcaption>What a packed token takes at all sites '
        f"that were rewritten ({len(sites)}): {stored / dense:.0%} of before.</figcaption></figure>"
    )


def _phase(graph: Graph, layer: str) -> str:
    """Both drawings of a phase, side by side where there is room."""
    phase, after = escape(graph.phase), graph.module.graph
    kinds = {name: kind for kind, name in graph.sources}
    kinds.update({_side(name): kind for kind, name in graph.sources if kind == "state"})
    written: Sources = {
        # What shares a tensor with another weight is in ``sources`` under that one's name.
        node: (kinds.get(str(node.target), "weight"), str(node.target))
        for node in graph.before.find_nodes(op="placeholder")
    }
    rewritten: Sources = dict(zip(after.find_nodes(op="placeholder"), graph.sources, strict=True))
    figures = "".join(
        f'<figure class="graph"><figcaption>{when}</figcaption><div class="scroll">'
        f"{drawing(diagram(what, layer, sources), f'{phase} {when}')}</div></figure>"
        for when, what, sources in (("before", graph.before, written), ("after", after, rewritten))
    )
    return f'<h3>{phase.capitalize()}</h3><div class="pair">{figures}</div>'


def _side(name: str) -> str:
    """The cache that a stored tensor is of."""
    side, _, part = name.rpartition(".")
    return side if part in STORED else name


def drawing(shown: Diagram, label: str) -> str:
    """A diagram as SVG, or a word that there is nothing to draw."""
    if not shown.boxes:
        return '<p class="none">No operator of this graph is of that module.</p>'
    read = Counter(reader for _, reader in shown.arrows)
    sizes = {key: _size(box, read[key]) for key, box in shown.boxes.items()}
    layout = arrange(sizes, list(shown.arrows))
    width, height = layout.width + 2 * _MARGIN, layout.height + 2 * _MARGIN
    arrows = "".join(
        _arrow(ends, layout.paths[ends], shown.boxes[ends[0]].kind, both)
        for ends, both in shown.arrows.items()
    )
    boxes = "".join(_box(key, box, layout.places[key]) for key, box in shown.boxes.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(label)}" '
        f'viewBox="{-_MARGIN:g} {-_MARGIN:g} {width:.1f} {height:.1f}" width="{width:.0f}" '
        f'height="{height:.0f}">{arrows}{boxes}</svg>'
    )


def _size(box: Box, arrows: int) -> tuple[float, float]:
    """Width and height for its lines, and for the arrows that arrive at it."""
    title = min(len(box.title), _LONGEST) * _TITLE
    details = max((min(len(line), _LONGEST) for line in box.details), default=0) * _DETAIL
    width = max(title, details) * _LETTER + 2 * _PAD
    return max(width, 64.0, 22 * (arrows + 1)), _TITLE + len(box.details) * _LINE + 2 * _PAD


def _box(key: str, box: Box, place: Place) -> str:
    left, baseline = place.x - place.width / 2, place.y + _PAD + _TITLE * 0.8
    lines = "".join(
        f'<text class="detail" x="{place.x:.1f}" y="{baseline + 2 + _LINE * number:.1f}">'
        f"{escape(_cut(line))}</text>"
        for number, line in enumerate(box.details, start=1)
    )
    told = "\n".join((box.title, *box.details, f"nodes: {', '.join(box.nodes)}"))
    return (
        f'<g class="box {box.kind}" data-key="{escape(key)}"><title>{escape(told)}</title>'
        f'<rect x="{left:.1f}" y="{place.y:.1f}" width="{place.width:.1f}" '
        f'height="{place.height:.1f}" rx="6"/>'
        f'<text class="title" x="{place.x:.1f}" y="{baseline:.1f}">{escape(_cut(box.title))}</text>'
        f"{lines}</g>"
    )


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _arrow(ends: tuple[str, str], path: tuple[Point, ...], kind: str, both: bool) -> str:
    """Straight down through rows, curved between them, with a head at the end."""
    (x, y), *_, (end_x, end_y) = path
    line = [f"M{x:.1f},{y:.1f}"]
    for index, ((from_x, from_y), (to_x, to_y)) in enumerate(pairwise(path)):
        bend = (from_y + to_y) / 2
        if index % 2 == 0:
            line.append(f"V{to_y:.1f}")
        else:
            line.append(f"C{from_x:.1f},{bend:.1f} {to_x:.1f},{bend:.1f} {to_x:.1f},{to_y:.1f}")
    heads = f"M{end_x - 3.5:.1f},{end_y - 7:.1f}h7l-3.5,7z"
    if both:
        heads += f"M{x - 3.5:.1f},{y + 7:.1f}h7l-3.5,-7z"
    source, reader = (escape(end) for end in ends)
    return (
        f'<g class="arrow {kind}" data-from="{source}" data-to="{reader}">'
        f'<path class="line" d="{"".join(line)}"/><path class="head" d="{heads}"/></g>'
    )


def _sites(reports: Sequence[GraphReport]) -> str:
    """The rows of the table of all sites, as those of ``Report.table``."""
    return "".join(row for report in reports for row in _rows(report))


def _rows(report: GraphReport) -> Iterator[str]:
    for site in report.sites:
        done = site.refusal is None
        cells = (
            report.phase,
            site.layer,
            f"{site.query_heads}/{site.kv_heads}",
            f"{site.key_dim}/{site.value_dim}",
            f"{site.dense_token_bytes:,}",
            f"{site.stored_token_bytes:,}" if done else "-",
            " / ".join(site.formats) if done else "-",
            _result(site),
        )
        told = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        yield f'<tr class="{"rewritten" if done else "refused"}">{told}</tr>'
    if report.left_alone is not None:
        why = f"left alone: {report.left_alone}"
        told = f"<td>{escape(report.phase)}</td>{'<td></td>' * 6}<td>{escape(why)}</td>"
        yield f'<tr class="refused">{told}</tr>'


def _result(site: Site) -> str:
    if site.refusal is not None:
        return f"refused: {site.refusal}"
    return f"rewritten, evicts: {site.evict}" if site.evict else "rewritten"
