"""What ``coverage`` found: figures, a table for the screen and ``docs/coverage.md``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from spark_compile.passes.eligibility import LATENT

from .coverage_case import ATTENTIONS, NOT_FOUND, RECOMPILE_LIMIT

CHECKS = {"exact": "ratio 0", "pruned": "ratio 0.5", "static": "static cache"}
PLAIN = {"exact": "plain", "pruned": "plain", "static": "plain_static"}
"""Where the same run under plain ``torch.compile`` is."""
BLIND = 1e-3
"""Where pruning changes the logits by less, the comparison has no power."""


@dataclass
class Summary:
    """Figures over all architectures and implementations of attention."""

    architectures: int = 0
    ran: int = 0
    without: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Why architectures could not be built or run, with their names."""
    growing: int = 0
    sliding: int = 0
    rewritten: int = 0
    rewritten_sliding: int = 0
    latent: int = 0
    """Growing sites whose cache holds no keys."""
    static: int = 0
    rewritten_static: int = 0
    reasons: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Why growing sites were left alone, and in which models."""
    static_reasons: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    not_static: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Why models did not run with a static cache."""
    wrong: list[str] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)
    not_ours: list[str] = field(default_factory=list)
    blind: list[str] = field(default_factory=list)


def summarize(rows: dict[str, Any]) -> Summary:
    """The figures of all rows."""
    result = Summary(architectures=len(rows))
    for name, row in sorted(rows.items()):
        cases = [(attention, row[attention]) for attention in ATTENTIONS if attention in row]
        failed = {why for _, case in cases if (why := why_not(case))}
        ran = [(attention, case) for attention, case in cases if "sites" in case]
        result.ran += bool(ran)
        for why in failed | ({row["error"]} if "error" in row else set()):
            result.without[why].append(name)
        for attention, case in ran:
            _count(result, f"{name} ({attention})", case)
    return result


def why_not(case: dict[str, Any]) -> str | None:
    """Why a case was not run, if it was meant to be."""
    return case.get("not_built") or case.get("not_run")


def _count(result: Summary, where: str, case: dict[str, Any]) -> None:
    growing, sliding, rewritten, slid = counts(case)
    result.growing += growing
    result.sliding += sliding
    result.rewritten += rewritten
    result.rewritten_sliding += slid
    if rewritten < growing:
        found = reasons(case)
        result.latent += (growing - rewritten) * all(LATENT in reason for reason in found)
        for reason in found:
            result.reasons[reason].append(where)
    static, taken = static_counts(case)
    result.static += static
    result.rewritten_static += taken
    if why := case.get("not_static"):
        result.not_static[why].append(where)
    if taken < static:
        for reason in reasons(case, "static"):
            result.static_reasons[reason].append(where)
    for check, title in CHECKS.items():
        verdict = judge(case, check)
        if verdict != "ok":
            listed = {"crash": result.crashes, "not ours": result.not_ours}.get(
                verdict, result.wrong
            )
            listed.append(f"{where}, {title}: {detail(case[check])}")
    effect = case["pruned"].get("effect")
    if effect is not None and effect < BLIND:
        result.blind.append(where)


def counts(case: dict[str, Any]) -> tuple[int, int, int, int]:
    """Growing and sliding sites, and how many of each were rewritten at the real ratio."""
    sites, compressed = case["sites"], set(case["pruned"].get("compressed", ()))
    rewritten = (len(compressed & set(sites[kind])) for kind in ("growing", "sliding"))
    return (len(sites["growing"]), len(sites["sliding"]), *rewritten)  # type: ignore[return-value]


def static_counts(case: dict[str, Any]) -> tuple[int, int]:
    """Static sites, and how many of them were rewritten."""
    sites = case["sites"].get("static", ())
    taken = set(case.get("static", {}).get("compressed", ())) & set(sites)
    return len(sites), len(taken)


def reasons(case: dict[str, Any], check: str = "pruned") -> list[str]:
    """Why sites were left alone."""
    if case[check]["status"] == "crash":
        return ["the run crashed"]
    return list(case[check]["refusals"]) or [NOT_FOUND]


def judge(case: dict[str, Any], check: str) -> str:
    """``ok``, ``crash`` or ``wrong``, or ``not ours`` where plain torch.compile has that fault."""
    status = case[check]["status"] if check in case else "ok"
    if status == "ok":
        return "ok"
    if case[PLAIN[check]]["status"] != "ok":  # run wherever something fails
        return "not ours"
    return "crash" if status == "crash" else "wrong"


def detail(result: dict[str, Any]) -> str:
    """What happened in one check, in a few words."""
    if result["status"] == "crash":
        return str(result["crash"])
    if result["status"] == "given up":
        return "no step continues what the prompt has pruned"
    if result["status"] == "left alone":
        return f"at other sizes only layers {result['again']} are rewritten"
    if result["status"] == "no oracle":
        return f"the simulation lost the keys of layers {result['lost']}"
    return f"relative error {result['error']:.0e} after {result['same_tokens']} equal tokens"


def figures(summary: Summary) -> list[tuple[str, str]]:
    """The summary in lines."""
    share = summary.rewritten / max(summary.growing, 1)
    static = summary.rewritten_static / max(summary.static, 1)
    others = summary.growing - summary.latent
    return [
        ("architectures", str(summary.architectures)),
        ("of which generated eagerly", str(summary.ran)),
        ("growing sites", str(summary.growing)),
        ("of which rewritten", f"{summary.rewritten} ({share:.1%})"),
        ("growing sites whose cache holds no keys (latent attention)", str(summary.latent)),
        ("rewritten of the others", f"{summary.rewritten / max(others, 1):.1%}"),
        ("sliding sites", str(summary.sliding)),
        ("of which rewritten", str(summary.rewritten_sliding)),
        ("static sites", str(summary.static)),
        ("of which rewritten", f"{summary.rewritten_static} ({static:.1%})"),
        ("wrong results", str(len(summary.wrong))),
        ("crashes that plain torch.compile has not", str(len(summary.crashes))),
        ("faults of plain torch.compile", str(len(summary.not_ours))),
    ]


def summary_table(rows: dict[str, Any]) -> Table:
    """The figures and the reasons for the screen."""
    summary = summarize(rows)
    table = Table(title="Coverage", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", overflow="fold")
    for line in figures(summary):
        table.add_row(*line)
    table.add_section()
    for reason, where in by_frequency(summary.reasons):
        table.add_row(reason, f"{len(where)}: {', '.join(where[:4])}{' ...' * (len(where) > 4)}")
    table.add_section()
    for title, found in (("wrong", summary.wrong), ("crash", summary.crashes)):
        for line in found:
            table.add_row(title, line)
    return table


def by_frequency(groups: dict[str, list[str]]) -> list[tuple[str, list[str]]]:
    """Groups with the largest first, then by name."""
    return sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))


def markdown(header: dict[str, Any], rows: dict[str, Any]) -> str:
    """The whole of ``docs/coverage.md``."""
    summary = summarize(rows)
    introduction = INTRODUCTION.format(
        **header, **header["settings"], recompile_limit=RECOMPILE_LIMIT
    )
    parts = (*_figures(summary), *_lists(summary), *_rows(rows))
    return "\n".join([introduction, *parts, ""])


INTRODUCTION = """# Coverage

Every architecture that transformers {transformers} maps to a causal language model, or to a model
that takes images and writes text (here its prompts are text alone), tiny and with random weights,
under torch {torch} with `inner="{inner}"`. Made by `make coverage`.

A model continues a prompt of {prompt} tokens by {steps}, greedily, with its own `generate`:
eagerly, under spark at key ratio 0, which must equal eager, and at {key_ratio:g} (window {window}),
which must equal the method simulated on the eager model (`benchmarks/simulated.py`). At ratio 0 the
compiled model then continues {again[0]} prompts of {again[1]} tokens by {again[2]}. With
`cache_implementation="static"`, spark at ratio 0 must equal eager too. What fails is run under
plain `torch.compile` as well, to see whether spark causes it. Dynamo may recompile a function
{recompile_limit} times, as models with graph breaks need it; with its own limit of 8 it would leave
their last layers uncompiled, with spark and without.

A *growing site* is a layer of the eager model's cache that gets longer with every token; a
*sliding* one drops its oldest tokens; a *static* one has a fixed capacity, and may slide. All are
counted in the cache, whatever the passes find.
"""


def _figures(summary: Summary) -> Iterator[str]:
    yield from ("| | |", "|---|---|")
    yield from (f"| {name} | {value} |" for name, value in figures(summary))


def _lists(summary: Summary) -> Iterator[str]:
    yield from _groups("Growing sites that were left alone", "reason", summary.reasons)
    yield from _groups("Static sites that were left alone", "reason", summary.static_reasons)
    yield from _groups("Not run with a static cache", "why", summary.not_static)
    yield from _groups("Not run", "why", summary.without)
    lists = {
        "Wrong results": summary.wrong,
        "Crashes that plain torch.compile has not": summary.crashes,
        "Faults that plain torch.compile has too": summary.not_ours,
        "Cases in which pruning changes too little to tell": summary.blind,
    }
    for title, found in lists.items():
        yield from ("", f"## {title}", "", *([f"- {_cell(line)}" for line in found] or ["None."]))


def _groups(title: str, column: str, groups: dict[str, list[str]]) -> Iterator[str]:
    yield from ("", f"## {title}", "", f"| {column} | cases | where |", "|---|---|---|")
    for reason, where in by_frequency(groups):
        yield f"| {_cell(reason)} | {len(where)} | {', '.join(where)} |"


def _rows(rows: dict[str, Any]) -> Iterator[str]:
    yield from (
        "",
        "## Architectures",
        "",
        "Rewritten / growing sites, `+` sliding ones, `;` static ones; `-`: no such attention in",
        "transformers.",
        "",
        "| architecture | sdpa | eager | results | left alone because |",
        "|---|---|---|---|---|",
    )
    for name, row in sorted(rows.items()):
        cases = [row.get(attention, {}) for attention in ATTENTIONS]
        ran = [case for case in cases if "sites" in case]
        verdicts = {judge(case, check) for case in ran for check in CHECKS}
        why = {r for case in ran if counts(case)[2] < counts(case)[0] for r in reasons(case)}
        cells = (name, *map(_sites, cases), _result(verdicts), _cell("; ".join(sorted(why))))
        yield f"| {' | '.join(cells)} |"


def _sites(case: dict[str, Any]) -> str:
    if case.get("supported") is False:
        return "-"
    if "sites" not in case:
        return "not run"
    growing, sliding, rewritten, slid = counts(case)
    extra = f" + {slid}/{sliding}" if sliding else ""
    static, taken = static_counts(case)
    extra += f"; {taken}/{static}" if static else ""
    return f"{rewritten}/{growing}{extra}" if growing or sliding else "no cache that grows"


def _result(verdicts: set[str]) -> str:
    order = ("crash", "wrong", "not ours", "ok")
    return next((verdict for verdict in order if verdict in verdicts), "")


def _cell(text: str) -> str:
    """Text inside a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")
