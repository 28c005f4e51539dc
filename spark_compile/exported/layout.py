"""Where the boxes of a diagram stand: in rows from top to bottom, with few crossings of arrows.

The way of Sugiyama, Tagawa and Toda (1981, doi:10.1109/TSMC.1981.4308636): rows by
the longest path, order within rows by barycentres, then positions that draw readers below what
they read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

Point = tuple[float, float]
_GAP_X, _GAP_Y, _LANE = 16.0, 40.0, 8.0
"""Between boxes of a row, between rows, and how wide an arrow that passes a row is."""
_WIDE = 700.0
"""No box goes into a row that it would make wider, if there is a choice."""
_SWEEPS = 12


@dataclass(frozen=True)
class Place:
    """A rectangle by its middle at the top and its size."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Layout:
    """What stands where, in pixels."""

    width: float
    height: float
    places: Mapping[str, Place]
    paths: Mapping[tuple[str, str], tuple[Point, ...]]
    """Of each arrow: pairs of points, straight lines down through rows. Curves join those."""


_Lane = tuple[str, str, int]
_Slot = str | _Lane


def arrange(sizes: Mapping[str, tuple[float, float]], arrows: list[tuple[str, str]]) -> Layout:
    """Lay out boxes of the sizes (width, height); the arrows have no cycle."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(sizes)
    graph.add_edges_from(arrows)
    rank = _ranks(graph, {name: width for name, (width, _) in sizes.items()})
    slots: nx.DiGraph[_Slot] = nx.DiGraph()
    slots.add_nodes_from(sizes)
    rows: list[list[_Slot]] = [[] for _ in range(max(rank.values(), default=-1) + 1)]
    for name in nx.lexicographical_topological_sort(graph, list(sizes).index):
        rows[rank[name]].append(name)
    for start, end in graph.edges:
        lanes: list[_Slot] = [(start, end, row) for row in range(rank[start] + 1, rank[end])]
        for lane in lanes:
            rows[lane[2]].append(lane)  # type: ignore[index]
        nx.add_path(slots, [start, *lanes, end])
    rows = _ordered(rows, slots)
    widths = {
        slot: sizes[slot][0] if isinstance(slot, str) else _LANE for row in rows for slot in row
    }
    middles = _positions(rows, slots, widths)
    left = min((middles[slot] - widths[slot] / 2 for slot in widths), default=0.0)
    right = max((middles[slot] + widths[slot] / 2 for slot in widths), default=0.0)
    places: dict[str, Place] = {}
    bands: list[tuple[float, float]] = []
    top = 0.0
    for row in rows:
        height = max((sizes[slot][1] for slot in row if isinstance(slot, str)), default=0.0)
        for slot in row:
            if isinstance(slot, str):
                width, own = sizes[slot]
                places[slot] = Place(middles[slot] - left, top + (height - own) / 2, width, own)
        bands.append((top, top + height))
        top += height + _GAP_Y
    paths: dict[tuple[str, str], tuple[Point, ...]] = {}
    for name in sizes:
        ends = _ends(places[name], sorted(graph.predecessors(name), key=lambda source: (
            middles[_last(source, name, rank)]
        )))  # fmt: skip
        for source, x in ends.items():
            above = places[source]
            passed = [
                (middles[source, name, row] - left, y)
                for row in range(rank[source] + 1, rank[name])
                for y in bands[row]
            ]
            leaves = [(above.x, above.y + above.height), (above.x, bands[rank[source]][1])]
            arrives = [(x, bands[rank[name]][0]), (x, places[name].y)]
            paths[source, name] = (*leaves, *passed, *arrives)
    return Layout(right - left, max(top - _GAP_Y, 0.0), places, paths)


def _last(start: str, end: str, rank: Mapping[str, int]) -> _Slot:
    """Where an arrow comes from in the row above its end."""
    return start if rank[end] - rank[start] == 1 else (start, end, rank[end] - 1)


def _ends(place: Place, sources: list[str]) -> dict[str, float]:
    """Arrows arrive side by side, in the order in which they come."""
    step = min(22.0, place.width / (len(sources) + 1))
    first = place.x - (len(sources) - 1) / 2 * step
    return {source: first + index * step for index, source in enumerate(sources)}


def _ranks(graph: nx.DiGraph[str], widths: Mapping[str, float]) -> dict[str, int]:
    """Rows by the longest path from above.

    What reads nothing stands right above its readers, or higher where that row is wide already.
    """
    generations = enumerate(nx.topological_generations(graph))
    rank = {name: row for row, names in generations for name in names}
    free = [name for name in graph if not graph.in_degree(name) and graph.out_degree(name)]
    used: dict[int, float] = {}
    for name in graph:
        if name not in free:
            used[rank[name]] = used.get(rank[name], 0.0) + widths[name] + _GAP_X
    for name in sorted(free, key=lambda name: -widths[name]):
        lowest = min(rank[reader] for reader in graph.successors(name)) - 1
        fits = (row for row in range(lowest, -1, -1) if used.get(row, 0.0) + widths[name] <= _WIDE)
        rank[name] = row = next(fits, lowest)
        used[row] = used.get(row, 0.0) + widths[name] + _GAP_X
    first = min(rank.values(), default=0)
    return {name: row - first for name, row in rank.items()}


def _ordered(rows: list[list[_Slot]], slots: nx.DiGraph[_Slot]) -> list[list[_Slot]]:
    """Sweeps down and up that sort each row by the mean place of the neighbours in the last one."""
    best, fewest = rows, _crossings(rows, slots)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        rows = [list(row) for row in rows]
        order = range(1, len(rows)) if down else range(len(rows) - 2, -1, -1)
        for index in order:
            other = rows[index - 1 if down else index + 1]
            at = {slot: place for place, slot in enumerate(other)}
            own = {slot: float(place) for place, slot in enumerate(rows[index])}
            for slot in rows[index]:
                near = slots.predecessors(slot) if down else slots.successors(slot)
                places = [at[neighbour] for neighbour in near if neighbour in at]
                own[slot] = sum(places) / len(places) if places else own[slot]
            rows[index].sort(key=own.__getitem__)
        if (count := _crossings(rows, slots)) < fewest:
            best, fewest = rows, count
    return best


def _crossings(rows: list[list[_Slot]], slots: nx.DiGraph[_Slot]) -> int:
    count = 0
    for upper, lower in pairwise(rows):
        at = {slot: place for place, slot in enumerate(lower)}
        ends = [sorted(at[reader] for reader in slots.successors(slot)) for slot in upper]
        flat = [end for group in ends for end in group]
        count += sum(one > other for i, one in enumerate(flat) for other in flat[i + 1 :])
    return count


def _positions(
    rows: list[list[_Slot]], slots: nx.DiGraph[_Slot], widths: Mapping[_Slot, float]
) -> dict[_Slot, float]:
    """Middles of slots: as near to the mean of their neighbours as the order and the gaps allow."""
    middles: dict[_Slot, float] = {}
    for row in rows:
        middles.update(
            zip(row, _spaced(row, [0.0] * len(row), [1.0] * len(row), widths), strict=True)
        )
    for sweep in range(_SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = []
            for slot in row:
                above = list(slots.predecessors(slot))
                below = list(slots.successors(slot))
                near = above if sweep % 2 == 0 else below
                if sweep >= _SWEEPS - 2:
                    near = above + below
                near = near or above + below
                wanted.append(sum(middles[n] for n in near) / len(near) if near else middles[slot])
            weights = [1.0 if isinstance(slot, str) else 3.0 for slot in row]
            middles.update(zip(row, _spaced(row, wanted, weights, widths), strict=True))
    return middles


def _spaced(
    row: list[_Slot], wanted: list[float], weights: list[float], widths: Mapping[_Slot, float]
) -> list[float]:
    """The places nearest to the wanted ones (least squares) that keep the order and the gaps."""
    offsets = [0.0]
    for one, other in pairwise(row):
        gap = _GAP_X if isinstance(one, str) and isinstance(other, str) else _GAP_X / 2
        offsets.append(offsets[-1] + (widths[one] + widths[other]) / 2 + gap)
    blocks: list[tuple[float, float, int]] = []  # mean, weight, number of slots
    for want, weight, offset in zip(wanted, weights, offsets, strict=False):
        mean, total, count = want - offset, weight, 1
        while blocks and blocks[-1][0] >= mean:
            before, heavy, many = blocks.pop()
            mean = (mean * total + before * heavy) / (total + heavy)
            total, count = total + heavy, count + many
        blocks.append((mean, total, count))
    means = [mean for mean, _, count in blocks for _ in range(count)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=False)]
