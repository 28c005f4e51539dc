"""One generation of the endpoint: in a thread of its own, with its text as it comes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from .model import ExportedModel

END = object()
"""After the last piece of text."""


class Job(BaseStreamer, StoppingCriteria):
    """One generation in a thread of its own; tokens go in on its side, text comes out on ours."""

    def __init__(
        self, model: ExportedModel, tokenizer: Any, ids: Tensor, stops: list[str],
        seed: int | None, keywords: dict[str, Any],
    ) -> None:  # fmt: skip
        """
        Args:
            ids: of the prompt, [1, S].
            stops: texts that end the answer, and are not in it.
            keywords: of ``generate``.
        """
        self._model, self._ids, self._keywords = model, ids, keywords
        self._seed = seed
        self._text = _Text(tokenizer, stops)
        self._tokens: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._is_prompt = True
        self._pieces: Iterator[str] = self._decoded()
        self.cancelled = threading.Event()
        self.count = 0
        self.reason = "length"

    def start(self, ended: Callable[[], object]) -> None:
        """Begin; ``ended`` is called at the end, which comes soon after ``cancelled`` is set."""
        threading.Thread(target=self._generate, args=(ended,), daemon=True).start()

    def next_piece(self) -> Any:
        """The next text, or ``END``."""
        return next(self._pieces, END)

    def put(self, value: Tensor) -> None:
        """Take the prompt, or a token."""
        if not self._is_prompt:
            self._tokens.put(int(value.flatten()[0]))
        self._is_prompt = False

    def end(self) -> None:
        """Nothing: ``_generate`` tells the end, of a failure, too."""

    def __call__(self, input_ids: Tensor, scores: Any, **_kwargs: Any) -> Any:
        """Whether to stop."""
        return torch.full((input_ids.shape[0],), self.cancelled.is_set())

    def _generate(self, ended: Callable[[], object]) -> None:
        try:
            if self._seed is not None:
                torch.manual_seed(self._seed)
            self._model.generate(
                self._ids, streamer=self, stopping_criteria=[self], **self._keywords
            )
        except BaseException as error:
            self._tokens.put(error)
        finally:
            self._tokens.put(END)
            ended()

    def _decoded(self) -> Iterator[str]:
        ends = self._model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        while (token := self._tokens.get()) is not END:
            if isinstance(token, BaseException):
                raise token
            self.count += 1
            if token in ends:
                self.reason = "stop"
                continue
            if piece := self._text.add(token):
                yield piece
            if self._text.stopped:
                self.reason = "stop"
                self.cancelled.set()
                return
        if piece := self._text.rest():
            yield piece


class _Text:
    """Text of tokens that come one by one, up to the first of some stop texts."""

    def __init__(self, tokenizer: Any, stops: list[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._tokens: list[int] = []
        self._told = 0
        self.stopped = False

    def add(self, token: int) -> str:
        """What is certain after one token more."""
        self._tokens.append(token)
        text = self._whole()
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._upto(text, min(found))
        # A character, or a stop text, may have begun.
        begun = (n for stop in self._stops for n in range(len(stop)) if text.endswith(stop[:n]))
        held = max(begun, default=0)
        return self._upto(text, len(text) - max(held, int(text.endswith("\ufffd"))))

    def rest(self) -> str:
        """What was held back."""
        text = self._whole()
        return self._upto(text, len(text))

    def _whole(self) -> str:
        return self._tokenizer.decode(self._tokens, skip_special_tokens=True)  # type: ignore[no-any-return]

    def _upto(self, text: str, end: int) -> str:
        piece = text[self._told : end]
        self._told = max(self._told, end)
        return piece
