"""Pictures of the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, no window

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator

Rows = Sequence[dict[str, Any]]
LEAST_KL = 1e-8
"""What is below is rounding of float32."""


def history(
    metrics: dict[str, list[float | None]], commits: Sequence[str], path: Path, kind: str
) -> Path:
    """Metrics relative to their first values over commits; those that never moved are left out."""
    moved = {
        name: values
        for name, values in metrics.items()
        if any(value is not None and abs(value - 1) > 0.005 for value in values)
    }
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    for name, values in moved.items():
        axis.plot(range(len(commits)), values, marker=".", label=name.removeprefix(f"{kind}: "))
    axis.axhline(1, color="0.7", linewidth=0.8)
    axis.set_xticks(range(len(commits)), commits, rotation=60, ha="right", fontsize=7)
    axis.set_ylabel("relative to the first run")
    axis.set_title(f"{kind}: {len(moved)} of {len(metrics)} metrics have changed")
    if moved:
        axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def kernels(rows: Rows, path: Path) -> Path:
    """Speed of attention relative to the best dense form, one panel per shape and batch."""
    operation = rows[0]["operation"]  # attend, unless a run left it out
    rows = [row for row in rows if row["operation"] == operation]
    panels = list(dict.fromkeys((row["shape"], row["batch"]) for row in rows))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5 * len(panels), 4.6), sharey=True, squeeze=False
    )
    for axis, (shape, batch) in zip(axes[0], panels, strict=True):
        own = [r for r in rows if (r["shape"], r["batch"]) == (shape, batch)]
        _lines(axis, own, "contender", "context", "speedup")
        axis.set(title=f"{operation}: {shape}, B {batch}", xlabel="cached tokens")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k"))
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    axes[0, 0].set_ylabel("speed, x dense (packed queries)")
    return _save(figure, axes, path)


def decode(rows: Rows, path: Path) -> Path:
    """One row of panels per model: time per token and the memory of the job over the context, and
    the longest context over the memory for keys and values."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(len(models), 3, figsize=(16, 4.2 * len(models)), squeeze=False)
    tokens = ("context", "tokens of context", 1)
    panels = (
        (tokens, ("median_ms", "ms per token", 1)),
        (tokens, ("peak_bytes", "peak memory of the job, MB", 1e6)),
        (("kv_bytes", "memory for keys and values, MB", 1e6), ("context", "longest context", 1)),
    )
    for line, model in zip(axes, models, strict=True):
        own = [row for row in rows if row["model"] == model and "error" not in row]
        for axis, ((x, x_label, x_unit), (y, y_label, y_unit)) in zip(line, panels, strict=True):
            scaled = [{**row, x: row[x] / x_unit, y: row[y] / y_unit} for row in own]
            _lines(axis, scaled, "competitor", x, y)
            axis.set(title=model, xlabel=x_label, ylabel=y_label)
            axis.set_ylim(bottom=0)
    return _save(figure, axes, path)


def quality(rows: Rows, path: Path, title: str) -> Path:
    """KL and change of perplexity over the bytes of a packed token, a point per method.

    The dense cache, of which the KL is 0, has no place on a logarithmic axis.
    """
    rows = [row for row in rows if row["kl"] > LEAST_KL]
    figure, axes = plt.subplots(1, 2, figsize=(13, 6), squeeze=False)
    for axis, column, scale, label in (
        (axes[0, 0], "kl", 1, "KL from the dense model, nats"),
        (axes[0, 1], "perplexity_change", 100, "change of perplexity, %"),
    ):
        _points(axis, rows, column, scale)
        axis.set(title=title, xlabel="bytes of a packed token, % of bfloat16", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0, 0].set_yscale("log")
    axes[0, 1].set_yscale("symlog", linthresh=1)
    return _save(figure, axes, path)


def _points(axis: Any, rows: Rows, column: str, scale: float) -> None:
    """Named points with their standard errors; ours are filled. A line joins the Pareto front."""
    for family, style in (("ours", "o"), ("peer", "s")):
        own = [row for row in rows if row["family"] == family]
        errors = [scale * (row[f"{column}_se"] or 0) for row in own]
        at = [[100 * row["packed_share"] for row in own], [scale * row[column] for row in own]]
        fill = {} if family == "ours" else {"markerfacecolor": "none"}
        axis.errorbar(*at, errors, fmt=style, markersize=5, label=family, **fill)
        for row, x, y in zip(own, *at, strict=True):
            axis.annotate(row["method"], (x, y), (4, 4), textcoords="offset points", fontsize=7)
    front = [(100 * row["packed_share"], scale * row[column]) for row in rows if row["front"]]
    if front:
        axis.plot(*zip(*sorted(front), strict=True), "--", linewidth=1, label="Pareto front of KL")


def _lines(axis: Any, rows: Rows, group: str, x: str, y: str) -> None:
    """One line per value of the column ``group``; ours are drawn solid, the dense ones dashed."""
    for name in dict.fromkeys(row[group] for row in rows):
        points = sorted((row[x], row[y]) for row in rows if row[group] == name)
        style = "-" if name.startswith("spark") else "--"
        axis.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=name)
    axis.grid(alpha=0.3)


def _save(figure: Any, axes: Any, path: Path) -> Path:
    handles, labels = axes[0, 0].get_legend_handles_labels()
    columns = max(1, int(figure.get_figwidth() / 2.4))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
