"""lm-eval's model around a compiled one: hidden questions, and the bytes that are stored."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor

from spark_compile import kv_bytes
from spark_compile.transformers_names import cache_argument

from .tasks_results import HIDDEN

_RULER_QUESTION = re.compile(r"\n(?=Question: |What (?:is|are all) the special magic )")


def question_start(prompt: str, doc: dict[str, Any]) -> int:
    """Where in a prompt the question begins, with all that follows it.

    Raises:
        ValueError: there is none.
    """
    if "context" in doc:  # LongBench
        place = prompt.find(doc["context"])
        return place + len(doc["context"]) if place >= 0 else _no_question(prompt)
    found = [match.start() for match in _RULER_QUESTION.finditer(prompt)]
    return found[-1] if found else _no_question(prompt)  # an example may have one, too


def _no_question(prompt: str) -> int:
    raise ValueError(f"no question in a prompt that ends with {prompt[-80:]!r}")


def stored_share(cache: Any) -> float:
    """Bytes that a cache stores over those of its tokens' dense keys and values."""
    sides = [side for layer in cache.layers for side in (layer.keys, layer.values)]
    return kv_bytes(cache) / sum(math.prod(side.shape) * side.dtype.itemsize for side in sides)


class _First(transformers.StoppingCriteria):
    """Notes the stored share when the cache has the prompt and nothing else."""

    def __init__(self, cache: Any, shares: list[float]) -> None:
        self._cache, self._shares, self._called = cache, shares, False

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if not self._called:
            self._shares.append(stored_share(self._cache))
            self._called = True
        return torch.zeros(len(input_ids), dtype=torch.bool)


class _Answered(transformers.StoppingCriteria):
    """Stops when an answer has all that RULER looks for: its score cannot change any more."""

    def __init__(self, tokenizer: Any, prompt_tokens: int, outputs: Sequence[str]) -> None:
        self._tokenizer, self._tokens = tokenizer, prompt_tokens
        self._outputs = [text.lower() for text in outputs]

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        text = self._tokenizer.decode(input_ids[0, self._tokens :]).lower()
        return torch.tensor([all(output in text for output in self._outputs)])


class TasksLM(HFLM):  # type: ignore[misc]
    """Answers one prompt at a time, greedily, and notes what its cache stores."""

    def __init__(self, model: Any, tokenizer: Any, question: str, answer_tokens: int = 0) -> None:
        """
        Args:
            question: "visible": a prompt is read at once. "hidden": what comes before the question
                is read and stored first, so that no format and no eviction knows of the question.
            answer_tokens: the most that an answer may take; 0 stands for a task's own number.
        """
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1)
        self._hides, self._answer_tokens = question == HIDDEN, answer_tokens
        self._request: Instance | None = None
        self.shares: list[float] = []
        """Stored share after each prompt."""

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = []
        for self._request in requests:
            answers += super().generate_until([self._request], disable_tqdm=True)
        return answers

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left",
        left_truncate_len: int | None = None, truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What is too long loses its middle, as in LongBench's own code; HFLM cuts the start."""
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len is None or ids.shape[1] <= left_truncate_len:
            return ids, mask
        half = left_truncate_len // 2
        return tuple(torch.cat((t[:, :half], t[:, -half:]), dim=1) for t in (ids, mask))

    def _question_tokens(self) -> int:
        prompt, doc = self._request.args[0], self._request.doc
        start = question_start(prompt, doc)
        offsets = self.tokenizer(prompt, return_offsets_mapping=True).offset_mapping
        return sum(end > start for _, end in offsets)

    @torch.no_grad()
    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        cache, length = transformers.DynamicCache(config=self.config), context.shape[1]
        if self._hides:
            before = context[:, : -self._question_tokens()]
            past = {cache_argument(self.model.forward): cache}
            self.model(input_ids=before, use_cache=True, logits_to_keep=1, **past)
        criteria = stop_sequences_criteria(self.tokenizer, stop, length, 1)
        criteria.append(_First(cache, self.shares))
        if "outputs" in self._request.doc:
            criteria.append(_Answered(self.tokenizer, length, self._request.doc["outputs"]))
        if self._answer_tokens:
            max_length = min(max_length, length + self._answer_tokens)
        past = {cache_argument(self.model.prepare_inputs_for_generation): cache}
        return self.model.generate(
            input_ids=context, attention_mask=torch.ones_like(context), max_length=max_length,
            stopping_criteria=criteria, pad_token_id=self.tokenizer.pad_token_id,
            do_sample=False, use_cache=True, **past,
        )  # fmt: skip
