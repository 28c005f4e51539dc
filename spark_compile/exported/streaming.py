"""Text in and out of an exported folder."""

from __future__ import annotations

import time
from typing import Any, cast

from torch import Tensor
from transformers import AutoTokenizer, TextStreamer

from .decoder import ExportError
from .model import ExportedModel


class TimedStreamer(TextStreamer):
    """Prints text as it comes, and notes how fast."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tokens = 0
        self.first_s = 0.0
        """Seconds until the first token."""
        self._start_s = time.perf_counter()
        self._last_s = 0.0

    def put(self, value: Tensor) -> None:
        """Take the prompt, or a token."""
        is_prompt = self.next_tokens_are_prompt
        super().put(value)  # type: ignore[no-untyped-call]
        if is_prompt:
            return
        self._last_s = time.perf_counter() - self._start_s
        self.first_s = self.first_s or self._last_s
        self.tokens += 1

    @property
    def rate(self) -> float:
        """Tokens per second after the first one."""
        return (self.tokens - 1) / max(self._last_s - self.first_s, 1e-9)


def prompt_tokens(model: ExportedModel, text: str, *, raw: bool) -> tuple[Any, Tensor]:
    """The tokenizer, and a prompt as ids [1, S].

    Args:
        raw: leave out the chat template, if there is one.

    Raises:
        ExportError: there is no tokenizer, or the prompt leaves no room for an answer.
    """
    tokenizer = tokenizer_of(model)
    chat = tokenizer.chat_template and not raw
    ids = encoded(tokenizer, [{"role": "user", "content": text}] if chat else text)
    room_after(model, ids)
    return tokenizer, ids


def room_after(model: ExportedModel, ids: Tensor) -> int:
    """How many tokens may follow a prompt of ids [1, S].

    Raises:
        ExportError: the prompt is empty, or leaves no room for an answer.
    """
    most = model.manifest.max_tokens
    if not 0 < ids.shape[1] < most:
        raise ExportError(f"the prompt has {ids.shape[1]} tokens: allowed are 1 to {most - 1}")
    return most - ids.shape[1]


def tokenizer_of(model: ExportedModel) -> Any:
    """The tokenizer of an exported folder.

    Raises:
        ExportError: there is none.
    """
    try:
        return cast(Any, AutoTokenizer).from_pretrained(model.folder)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"{model.folder} has no tokenizer: text needs one") from error


def encoded(tokenizer: Any, what: str | list[dict[str, str]]) -> Tensor:
    """A text, or the messages of a chat before the answer, as ids [1, S]."""
    if isinstance(what, str):
        return tokenizer(what, return_tensors="pt").input_ids  # type: ignore[no-any-return]
    filled = tokenizer.apply_chat_template(
        what, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return filled["input_ids"]  # type: ignore[no-any-return]
