"""The scores of tasks as a table, as docs/results.md and as a picture, from the result files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import measure
from .pictures import plt
from .quality_models import MODELS
from .results import Result
from .tasks_compare import (
    PAPER,
    Line,
    Rows,
    Value,
    lines,
    not_compared,
    relative,
    settings,
)
from .tasks_methods import SNAPKV_NAME
from .tasks_results import Key, by_key

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
LEFT_OUT = "RULER's ruler_qa_squad and ruler_qa_hotpot are left out: their texts come from a hub."
_INTRODUCTION = f"""# Scores of tasks

Made by `python -m benchmarks tasks --report` from `benchmarks/results/tasks-*.jsonl`: do not edit.

lm-eval's RULER, answered greedily by the compiled model on the cache that it really stores.
*Stored* is what `kv_bytes` counts once the prompt is stored, over its tokens' dense bytes in the
same dtype. Everything is in it, also room to grow: a dense cache takes more than 100 %, and a
budget, which is stated for 4,096 tokens, more at fewer. Scores are in percent, with standard errors
over the samples. *Change* is the average less that of the dense cache, and ↓ marks a task that is
lower than with it by more than a standard error; both errors are those of differences on the same
samples (± 0.0 says that all came out alike, no more). A *hidden* question is fed when the prompt
before it has been stored, so that no format and no eviction knows of it. *Perplexity* is that of
256 tokens of the essays after a prompt of that length. An answer ends as soon as it has all that
RULER looks for.

{LEFT_OUT}
"""
_COMPARISON = """## Beside the paper

The paper (arXiv 2508.15212) has LongBench averages with SnapKV at a budget of 128 tokens. That
data is on a hub: ours are of RULER's tasks, on a far smaller model, so that neither scores nor what
SnapKV itself loses can be compared. What can be set side by side is what pruning keys costs on top
of SnapKV: each average over that of SnapKV alone, if that is not 0. RULER's answers are numbers
whose digits are a token each, of which eviction to 128 tokens may keep one or two; then no format
can show anything. So keys are pruned without eviction, too, which is not in the paper's table.
"""


def write(console: Console) -> None:
    """Print the tables and write the page with its pictures."""
    parts = [_INTRODUCTION]
    compared: list[tuple[str, dict[str, tuple[float, float]]]] = []
    for path in sorted(measure.RESULTS.glob("tasks-*.jsonl")):
        result = Result.read(path)
        if not result.rows:
            continue
        title, rows = MODELS[result.settings["model"]].title, by_key(result)
        parts.append(f"## {title}\n\n{_conditions(result)}\n")
        picture = draw(rows, path.with_suffix(".png"), title)
        parts.append(f"![Scores over stored bytes](../benchmarks/results/{picture.name})\n")
        for setting in settings(rows):
            found = lines(rows, setting)
            name = f"{title}, {setting.context:,} tokens, question {setting.question}"
            besides = _besides(not_compared(rows, setting, found))
            console.print(table(name, found))
            parts.append(f"### {name}\n\n{_page_table(found)}\n{_findings(found)}{besides}")
            compared.append((name, relative(found)))
    parts.append(_paper([(name, own) for name, own in compared if own]))
    PAGE.write_text("\n".join(parts))
    console.print(f"{PAGE}", markup=False)


def table(title: str, found: Sequence[Line]) -> Table:
    """Methods with their bytes, averages and changes."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("", no_wrap=True)
    for name in ("stored", "average", "change", "lower than dense", "perplexity"):
        shown.add_column(name, justify="right")
    for line in found:
        lost = ", ".join(_short(task) for task in line.lost())
        shown.add_row(
            line.method, f"{line.share:.1%}", percent(line.average), percent(line.change), lost,
            _perplexity(line),
        )  # fmt: skip
    return shown


def draw(rows: Rows, path: Path, title: str) -> Path:
    """Average score over stored bytes, a panel per context and question with several methods."""
    compared = {setting: lines(rows, setting) for setting in settings(rows)}
    panels = {s: found for s, found in compared.items() if len(found) > 1} or compared
    figure, axes = plt.subplots(
        1, len(panels), figsize=(8 * len(panels), 5.5), sharey=True, squeeze=False
    )
    for axis, (setting, found) in zip(axes[0], panels.items(), strict=True):
        for line in found:
            _point(axis, line)
        axis.set_title(f"{title}, {setting.context:,} tokens, question {setting.question}")
        axis.set(xlabel="stored bytes, % of dense", xlim=(0, 125), ylim=(-4, 104))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("average score, %")
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _point(axis: Any, line: Line) -> None:
    """Squares are of methods that evict."""
    x, (mean, error) = 100 * line.share, line.average
    marker = "s" if "KV" in line.method else "o"
    axis.errorbar(x, 100 * mean, 100 * (error or 0), fmt=marker, markersize=5)
    axis.annotate(line.method, (x, 100 * mean), (5, 5), textcoords="offset points", fontsize=8)


def percent(value: Value | None) -> str:
    """A value as percent, with its standard error."""
    if value is None:
        return "-"
    return f"{100 * value.mean:.1f}" + (
        "" if value.error is None else f" ± {100 * value.error:.1f}"
    )


def _perplexity(line: Line) -> str:
    if line.perplexity is None:
        return "-"
    error = line.perplexity.error
    return f"{line.perplexity.mean:.2f}" + ("" if error is None else f" ± {error:.2f}")


def _short(task: str) -> str:
    return task.removeprefix("niah_").removeprefix("ruler_").removeprefix("longbench_")


def _conditions(result: Result) -> str:
    machine, chosen = result.machine, result.settings
    answer = chosen["answer_tokens"]
    limit = f"answers of at most {answer} tokens" if answer else "answers as long as RULER allows"
    return (
        f"{chosen['dtype']}, {limit}, {chosen['inner']}; {machine['cpu']} ({machine['threads']} "
        f"thread), torch {machine['torch']}, transformers {machine['transformers']}, lm-eval "
        f"{machine['lm_eval']}; settings as of {machine['date'][:10]}: {json.dumps(chosen)}"
    )


def _page_table(found: Sequence[Line]) -> str:
    tasks = list(found[0].scores)
    names = ["method", "stored", "average", "change", *map(_short, tasks), "perplexity"]
    rows = [[*names, "samples"]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for line in found:
        lost = line.lost()
        cells = [percent(line.scores[task]) + " ↓" * (task in lost) for task in tasks]
        summary = [f"{line.share:.1%}", percent(line.average), percent(line.change)]
        rows.append([line.method, *summary, *cells, _perplexity(line), str(line.samples)])
    return _markdown(rows)


def _findings(found: Sequence[Line]) -> str:
    """What the targets say: nothing lost at 52 %, less than 1 % of the average at 28 %."""
    named = {line.method: line for line in found}
    said = []
    if line := named.get("budget 0.52"):
        lost = ", ".join(map(_short, line.lost())) or "none"
        said.append(f"Budget 0.52: tasks lower than dense by more than a standard error: {lost}.")
    for name in ("budget 0.28", "balanced"):
        if (line := named.get(name)) and line.change:
            dense = line.average.mean - line.change.mean
            said.append(f"{name}: {line.change.mean / dense:+.1%} of the dense average.")
    said += [_margin(named, before, r) for before in (SNAPKV_NAME, "") for r in (".5", ".8")]
    return "".join(f"- {sentence}\n" for sentence in said if sentence)


def _margin(named: Mapping[str, Line], before: str, ratio: str) -> str:
    """How much better SparK's keys are than ThinK's, on top of an eviction or without one."""
    start = f"{before} + " if before else ""
    pair = [f"{start}{format} {ratio}" for format in ("spark", "think")]
    if not set(pair) <= set(named):
        return ""
    points = [100 * named[name].average.mean for name in pair]
    paper = f" (the paper, on LongBench: {PAPER[pair[0]] - PAPER[pair[1]]:+.1f})" if before else ""
    on = f"on {before}" if before else "without eviction"
    return f"SparK over ThinK at {ratio}, {on}: {points[0] - points[1]:+.1f} points{paper}."


def _besides(found: Mapping[Key, Value]) -> str:
    """Measurements that are in no table, since other methods lack them."""
    named = [f"{key.method} {_short(key.task)} {percent(value)}" for key, value in found.items()]
    return f"- Measured besides: {', '.join(named)}.\n" if named else ""


def _paper(compared: Sequence[tuple[str, dict[str, tuple[float, float]]]]) -> str:
    rows = [["method", "LongBench (paper)", "of SnapKV (paper)", *(name for name, _ in compared)]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for method, score in PAPER.items():
        ours = [f"{own[method][1]:.1%}" if method in own else "-" for _, own in compared]
        rows.append([method, f"{score:.2f}", f"{score / PAPER[SNAPKV_NAME]:.1%}", *ours])
    return f"{_COMPARISON}\n{_markdown(rows)}"


def _markdown(rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
