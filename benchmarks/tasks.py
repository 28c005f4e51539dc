"""``python -m benchmarks tasks``: scores of tasks when the cache is stored in some way.

RULER's tasks and LongBench's through lm-eval, the compiled model answering, and the perplexity of
essays after a prompt that is stored. Each measurement is written at once, and a later run goes on
from there. docs/results.md is made from the result files. Needs the extra ``tasks``.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from importlib.metadata import version
from importlib.util import find_spec
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from . import measure, quality, tasks_report, tasks_suites
from .quality_models import MODELS, disjoint_windows, essays, load
from .quality_run import SCORED_TOKENS
from .tasks_methods import methods
from .tasks_results import ESSAYS, HIDDEN, VISIBLE, Results, ResultsError

NO_LM_EVAL = "tasks needs lm-eval: pip install -c .venv/torch.txt -e '.[tasks]'"
SUITES = ("ruler", ESSAYS, "longbench")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def matching(patterns: str, names: Sequence[str]) -> list[str]:
    """The names that one of some patterns, separated by commas, matches."""
    return [n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns.split(","))]


def check_names(option: str, text: str, allowed: Collection[str]) -> None:
    """Raise BadParameter unless each name of a text, separated by commas, is allowed."""
    if wrong := [name for name in text.split(",") if name not in allowed]:
        raise typer.BadParameter(f"--{option} is {wrong[0]!r}: allowed is {', '.join(allowed)}")


def ruler_tasks(
    patterns: str, contexts: Sequence[int], tokenizer: Any, text: str, console: Console
) -> list[tuple[dict[str, Any], int]]:
    """RULER's tasks by name, with the tokens of their prompts."""
    console.print(tasks_report.LEFT_OUT)
    names, path = matching(patterns, tasks_suites.RULER), tokenizer.name_or_path
    return [(tasks_suites.ruler(names, tokens, path, text), tokens) for tokens in contexts]


def longbench_tasks(patterns: str, console: Console) -> dict[str, Any]:
    """LongBench's tasks by name; none without a hub, which is told."""
    names = matching(patterns, tasks_suites.LONGBENCH)
    if names and not tasks_suites.hub_is_there():
        console.print(tasks_suites.NO_HUB)
        return {}
    return tasks_suites.longbench(names) if names else {}


def main(
    model: Annotated[str, typer.Option(help=f"one of {', '.join(MODELS)}")] = "smollm2",
    context: Annotated[str, typer.Option(help="tokens of RULER's prompts")] = "1024,2048,4096",
    question: Annotated[str, typer.Option(help="what eviction sees")] = f"{VISIBLE},{HIDDEN}",
    samples: Annotated[int, typer.Option(help="of each task")] = 20,
    suites: Annotated[str, typer.Option(help="separated by commas")] = ",".join(SUITES),
    only: Annotated[str, typer.Option(help="patterns of methods, separated by commas")] = "*",
    tasks: Annotated[str, typer.Option(help="patterns of tasks, separated by commas")] = "*",
    answer_tokens: Annotated[int, typer.Option(help="most of an answer; 0: a task's own")] = 0,
    dtype: Annotated[str, typer.Option(help=f"one of {', '.join(DTYPES)}")] = "bfloat16",
    inner: Annotated[str, typer.Option(help="compiler of our graphs")] = "inductor",
    threads: Annotated[int, typer.Option(help="of torch")] = 1,
    fresh: Annotated[bool, typer.Option(help="begin the result file anew")] = False,
    report: Annotated[bool, typer.Option(help="only write docs/results.md again")] = False,
) -> None:
    """Measure what storing the cache in some way costs in tasks."""
    console = measure.wide_console()
    if report:
        tasks_report.write(console)
        return
    check_names("model", model, MODELS)
    check_names("dtype", dtype, DTYPES)
    check_names("suites", suites, SUITES)
    check_names("question", question, (VISIBLE, HIDDEN))
    if find_spec("lm_eval") is None:
        typer.echo(NO_LM_EVAL, err=True)
        raise typer.Exit(2)
    from .tasks_bench import Bench

    torch.set_num_threads(threads)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it notes each step of each task
    loaded, tokenizer = load(model)
    loaded, text = loaded.to(DTYPES[dtype]).requires_grad_(False), essays()
    settings = {"model": model, "dtype": dtype, "inner": inner, "answer_tokens": answer_tokens}
    machine = measure.machine_facts() | {"lm_eval": version("lm_eval")}
    try:
        results = Results(model, settings, machine, fresh)
    except ResultsError as error:
        raise typer.BadParameter(f"{error}; --fresh throws it away") from error
    bench = Bench(loaded, tokenizer, results, samples, console)
    known = methods(MODELS[model].head_dim, loaded.config.num_hidden_layers)
    contexts, wanted = [int(tokens) for tokens in context.split(",")], suites.split(",")
    runs: list[tuple[dict[str, Any], int]] = []
    if "ruler" in wanted:
        runs += ruler_tasks(tasks, contexts, tokenizer, text, console)
    if "longbench" in wanted:
        runs.append((longbench_tasks(tasks, console), loaded.config.max_position_embeddings))
    for method in quality.chosen(only, known):
        for asked in question.split(","):
            for found, tokens in runs:
                bench.run(method, found, tokens, asked)
        for tokens in contexts if ESSAYS in wanted else ():
            length = tokens + SCORED_TOKENS + 1
            bench.run_essays(method, disjoint_windows(tokenizer, text, length, samples), tokens)
    tasks_report.write(console)
