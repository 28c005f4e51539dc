"""Measuring a method on tasks: lm-eval's, answered by the compiled model, and the essays."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import lm_eval
import torch.nn.functional as F
import transformers
from rich.console import Console
from torch import Tensor

from .quality_methods import Ours
from .quality_run import SCORED_TOKENS, read
from .tasks_methods import compiled
from .tasks_model import TasksLM, stored_share
from .tasks_results import ESSAYS, VISIBLE, Key, Results


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
                most = self._settings["answer_tokens"]
                model = TasksLM(self._reader(method), self._tokenizer, question, most)
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
        return self._results.settings

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
