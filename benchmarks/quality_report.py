"""The quality of all methods over their windows: statistics, the Pareto front, the table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table


def summary(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """One row per method: means over its windows, with standard errors (None of a single one).

    Args:
        entry: of ``Results``: "family", "what" and "windows", rows by number.
    """
    rows = list(entry["windows"].values())
    kl, kl_se = mean_and_error([row["kl"] for row in rows])
    change, change_se = mean_and_error([row["nll"] - row["dense_nll"] for row in rows])
    return {
        "method": name,
        "family": entry["family"],
        "what": entry["what"],
        "windows": len(rows),
        "packed_share": statistics.fmean(row["packed_share"] for row in rows),
        "whole_share": statistics.fmean(row["whole_share"] for row in rows),
        "kl": kl,
        "kl_se": kl_se,
        "perplexity": math.exp(statistics.fmean(row["nll"] for row in rows)),
        "perplexity_change": math.expm1(change),
        "perplexity_change_se": None if change_se is None else math.exp(change) * change_se,
        "seconds": statistics.median(row["seconds"] for row in rows),
        "compile_s": entry.get("compile_s"),
        "commits": sorted({row["commit"] for row in rows}),
        "cpus": sorted({row["machine"]["cpu"] for row in rows}),
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, which a single value does not have."""
    if len(values) < 2:
        return values[0], None
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def with_front(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows from most to fewest bytes, "front" being true of those on the Pareto front.

    Such a row has no other that takes no more bytes per packed token and has no greater KL, unless
    it is equal in both. Rows of fewer windows than others have are not compared.
    """
    most = max((row["windows"] for row in rows), default=0)
    points = {(r["packed_share"], r["kl"]) for r in rows if r["windows"] == most}
    marked = [
        {**row, "front": row["windows"] == most and not _is_beaten(row, points)} for row in rows
    ]
    return sorted(marked, key=lambda row: (-row["packed_share"], row["kl"]))


def _is_beaten(row: Mapping[str, Any], points: Collection[tuple[float, float]]) -> bool:
    own = row["packed_share"], row["kl"]
    return any(
        other != own and all(a <= b for a, b in zip(other, own, strict=True)) for other in points
    )


def quality_table(
    title: str, rows: Sequence[dict[str, Any]], errors: Mapping[str, str], left_out: Sequence[str]
) -> Table:
    """The rows of ``with_front``; below, methods that failed and those that were left out."""
    commits, cpus = ({each for row in rows for each in row[name]} for name in ("commits", "cpus"))
    notes = [
        "* on the Pareto front of bytes and KL; +- standard error over windows",
        "packed: bytes of packed tokens over dense ones in bfloat16; whole: with tail, norms, room",
        *left_out,
        *_several("at several commits", commits),
        *_several("on several machines", cpus),
    ]
    table = Table(
        title=title,
        caption=escape("\n".join(notes)),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for name in ("", "packed", "whole", "KL", "+-", "perplexity", "change", "+-", "windows"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in rows:
        table.add_row(row["method"] + " *" * row["front"], *_cells(row))
    for name, error in errors.items():
        table.add_row(name, escape(error.strip().splitlines()[-1][:60]), style="red")
    return table


def _several(what: str, names: Collection[str]) -> list[str]:
    return [f"measured {what}: {', '.join(sorted(names))}"] if len(names) > 1 else []


def _cells(row: Mapping[str, Any]) -> list[str]:
    kl_se, change_se = row["kl_se"], row["perplexity_change_se"]
    return [
        row["family"],
        f"{row['packed_share']:.1%}",
        f"{row['whole_share']:.1%}",
        f"{row['kl']:.5f}",
        "-" if kl_se is None else f"{kl_se:.5f}",
        f"{row['perplexity']:.2f}",
        f"{row['perplexity_change']:+.2%}",
        "-" if change_se is None else f"{change_se:.2%}",
        str(row["windows"]),
    ]
