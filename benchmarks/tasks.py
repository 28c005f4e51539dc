"""``python -m benchmarks tasks``: scores of tasks when the cache is stored in some way.

RULER's tasks and LongBench's through lm-eval, the compiled model answering, and the perplexity of
essays after a prompt that is stored. Each measurement is written at once, and a later run goes on
from there. docs/results.md is made from the result files. Needs the extra ``tasks``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from importlib.metadata import version
from typing import Annotated, Any

import lm_eval
import torch
import torch.nn.functional as F
import transformers
import typer
from rich.console import Console
from torch import Tensor

from . import measure, quality, tasks_report, tasks_suites
from .quality_methods import Ours
from .quality_models import MODELS, disjoint_windows, essays, load
from .quality_run import SCORED_TOKENS, read
from .tasks_methods import compiled, methods
from .tasks_model import TasksLM, stored_share
from .tasks_results import ESSAYS, HIDDEN, VISIBLE, Key, Results

SUITES = ("ruler", ESSAYS, "longbench")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Bench:
    """A model, what it is asked, and where its results go."""

    def __init__(
        self, model: Any, tokenizer: Any, results: Results, samples: int, console: Console
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._results, self._samples, self._console = results, samples, console
        self._compiled: tuple[str, Any] = "", None

    def run(self, method: Ours, tasks: dict[str, Any], context: int, question: str) -> None:
        """Measure a method on the samples of lm-eval's tasks that its rows do not have."""
        for name, task in tasks.items():
            key = Key(method.name, name, context, question)
            count = min(self._samples, len(task.eval_docs))
            todo = self._results.missing(key, method.what, count)
            if todo:
                start_s = time.perf_counter()
                answers = self._settings["answer_tokens"]
                model = TasksLM(self._reader(method), self._tokenizer, question, answers)
                scores = answer(model, name, task, todo)
                self._add(key, method, scores, model.shares, start_s)

    def run_essays(self, method: Ours, windows: Sequence[Tensor], context: int) -> None:
        """Measure the likelihood of what follows a prompt that the method stores."""
        key = Key(method.name, ESSAYS, context, VISIBLE)
        todo = self._results.missing(key, method.what, len(windows))
        start_s = time.perf_counter()
        pairs = [essay_nll(self._reader(method), windows[number]) for number in todo]
        if pairs:
            scores, shares = zip(*pairs, strict=True)
            self._add(key, method, scores, shares, start_s)

    @property
    def _settings(self) -> dict[str, Any]:
        return self._results.header["settings"]

    def _reader(self, method: Ours) -> Any:
        """The compiled model, kept until another method's turn."""
        if self._compiled[0] != method.name:
            self._compiled = method.name, compiled(self._model, method, self._settings["inner"])
        return self._compiled[1]

    def _add(
        self, key: Key, method: Ours, scores: Sequence[float], shares: Sequence[float],
        start_s: float,
    ) -> None:  # fmt: skip
        row = self._results.add(key, method, scores, shares, time.perf_counter() - start_s)
        error = row["stderr"] or 0
        self._console.print(
            f"{key.method}, {key.task}, {key.context}, {key.question}: {row['score']:.3f} +- "
            f"{error:.3f} of {row['samples']}, {row['share']:.1%}, {row['seconds']} s",
            highlight=False,
        )


def answer(model: TasksLM, name: str, task: Any, numbers: Sequence[int]) -> list[float]:
    """Scores between 0 and 1 of samples of a task."""
    task._instances = None  # those of an earlier method, with their answers
    task.set_config(key="num_fewshot", value=0)
    done = lm_eval.evaluate(
        model, {"tasks": {name: task}, "groups": {}}, samples={name: list(numbers)},
        bootstrap_iters=0,
    )  # fmt: skip
    found = sorted(done["samples"][name], key=lambda sample: sample["doc_id"])
    return [score_of(sample) for sample in found]


def score_of(sample: dict[str, Any]) -> float:
    """The score of what lm-eval says of a sample: LongBench's, or RULER's at its own length."""
    length = sample["doc"].get("max_length")
    return float(sample["score" if length is None else str(length)])


def essay_nll(model: Any, ids: Tensor) -> tuple[float, float]:
    """Mean negative log-likelihood of the last tokens [1, S] of a text, and the stored share.

    What comes before the last ``SCORED_TOKENS`` + 1 is read and stored, those are one chunk.
    """
    prompt, scored = ids.split([ids.shape[1] - SCORED_TOKENS - 1, SCORED_TOKENS + 1], dim=1)
    cache = transformers.DynamicCache(config=model.config)
    read(model, prompt, cache, logits_to_keep=1)
    share = stored_share(cache)
    logits = read(model, scored[:, :-1], cache).float()
    return float(F.cross_entropy(logits, scored[0, 1:])), share


def matching(patterns: str, names: Sequence[str]) -> list[str]:
    """The names that one of some patterns, separated by commas, matches."""
    return [n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns.split(","))]


def check_names(option: str, text: str, allowed: Collection[str]) -> None:
    """Raise BadParameter unless each name of a text, separated by commas, is allowed."""
    if wrong := [name for name in text.split(",") if name not in allowed]:
        raise typer.BadParameter(f"--{option} is {wrong[0]!r}: allowed is {', '.join(allowed)}")


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
    question: Annotated[
        str, typer.Option(help="visible to eviction, or hidden")
    ] = "visible,hidden",
    samples: Annotated[int, typer.Option(help="of each task")] = 20,
    suites: Annotated[str, typer.Option(help="separated by commas")] = ",".join(SUITES),
    only: Annotated[str, typer.Option(help="patterns of methods, separated by commas")] = "*",
    tasks: Annotated[str, typer.Option(help="patterns of tasks, separated by commas")] = "*",
    answer_tokens: Annotated[int, typer.Option(help="most of an answer; 0: a task's own")] = 0,
    dtype: Annotated[str, typer.Option(help=f"one of {', '.join(DTYPES)}")] = "bfloat16",
    inner: Annotated[str, typer.Option(help="compiler of our graphs")] = "inductor",
    threads: Annotated[int, typer.Option(help="of torch")] = 1,
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
    torch.set_num_threads(threads)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it notes each step of each task
    loaded, tokenizer = load(model)
    loaded, text = loaded.to(DTYPES[dtype]).requires_grad_(False), essays()
    settings = {
        "model": model,
        "dtype": dtype,
        "answer_tokens": answer_tokens or None,
        "inner": inner,
    }
    machine = measure.machine_facts() | {"lm_eval": version("lm_eval")}
    bench = Bench(loaded, tokenizer, Results(model, settings, machine), samples, console)
    known = methods(MODELS[model].head_dim, loaded.config.num_hidden_layers)
    chosen = quality.chosen(only, known)
    contexts = [int(tokens) for tokens in context.split(",")]
    wanted, runs = suites.split(","), []
    if "ruler" in wanted:
        console.print(tasks_report.LEFT_OUT)
        names = matching(tasks, tasks_suites.RULER)
        path = tokenizer.name_or_path
        runs += [(tasks_suites.ruler(names, tokens, path, text), tokens) for tokens in contexts]
    if "longbench" in wanted:
        runs.append((longbench_tasks(tasks, console), loaded.config.max_position_embeddings))
    for method in chosen:
        for asked in question.split(","):
            for found, tokens in runs:
                bench.run(method, found, tokens, asked)
        for tokens in contexts if ESSAYS in wanted else ():
            length = tokens + SCORED_TOKENS + 1
            bench.run_essays(method, disjoint_windows(tokenizer, text, length, samples), tokens)
    tasks_report.write(console)


if __name__ == "__main__":
    typer.run(main)
