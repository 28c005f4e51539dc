"""What MODEL names on the command line."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .cli_options import fail, first_line
from .report import OptionError

MODEL_KINDS = "a folder with config.json, a folder with one .gguf file, a .gguf file or a hub id"
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def meta_model(model: str) -> Any:
    """The model of the config that ``model`` names, in eval mode, on "meta"."""
    place, keywords = locate(model)
    import torch
    from huggingface_hub.utils import logging as hub_logging
    from transformers import AutoConfig

    hub_logging.set_verbosity_error()  # else every retry of an unreachable hub is a line
    try:
        config = AutoConfig.from_pretrained(place, **keywords)
    except (OSError, ValueError, KeyError, ImportError) as error:
        why = first_line(error)
        fail(f"model {model!r} has no readable config ({why}): allowed is {MODEL_KINDS}")
    try:
        with torch.device("meta"):
            return automatic(lambda kind: kind.from_config(config)).eval()
    except ValueError as error:
        fail(f"model {model!r} is no causal language model ({first_line(error)})")


def automatic(make: Callable[[Any], Any]) -> Any:
    """What ``make`` makes with one of transformers' automatic classes: the one for causal language
    models or, where that does not know the config, the one for those that take images as well.

    Raises:
        ValueError: neither knows it.
    """
    import transformers

    for kind in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        try:
            return make(kind)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            unknown = error
    raise unknown


def locate(model: str) -> tuple[str, dict[str, str]]:
    """What to hand to ``AutoConfig.from_pretrained``: a folder or hub id, and keywords."""
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        ggufs = [file.name for file in path.glob("*.gguf")]
        if len(ggufs) != 1:
            fail(
                f"model {model!r} is a folder without config.json and with {len(ggufs)} .gguf "
                f"files: allowed is {MODEL_KINDS}"
            )
        return str(path), {"gguf_file": ggufs[0]}
    if path.is_dir():
        return str(path), {}
    if path.exists() or not HUB_ID.fullmatch(model):
        what = "is another kind of file" if path.exists() else "does not exist"
        fail(f"model {model!r} {what}: allowed is {MODEL_KINDS}")
    return model, {}


def pretrained(place: str, keywords: Mapping[str, str], dtype: Any) -> tuple[Any, Any]:
    """A model of :func:`automatic` in eval mode, and its tokenizer or why there is none.

    Args:
        place: folder or hub id, as ``from_pretrained`` takes it; ``keywords`` go with it.
        dtype: of the weights; "auto": that of the file.

    Raises:
        OptionError: the model cannot be read.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    load: dict[str, Any] = {**keywords, "dtype": dtype}
    if "gguf_file" in keywords and hasattr(transformers, "GgufConfig"):
        load["quantization_config"] = transformers.GgufConfig(dequantize=True)
        if dtype == "auto":
            load["dtype"] = torch.bfloat16  # what the file has is no dtype
    tokenizer: Any
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **keywords)
    except (OSError, ValueError, KeyError, ImportError) as error:
        tokenizer = error
    try:
        model = automatic(lambda kind: kind.from_pretrained(place, **load)).eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise OptionError(f"model {place!r} cannot be loaded: {first_line(error, 400)}") from error
    return model, tokenizer


def handwritten(model: str) -> Any:
    """The module that ``module:factory`` makes, in eval mode.

    Raises:
        OptionError: there is no such factory, or it makes something else.
    """
    import torch

    name, _, factory = model.partition(":")
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, folder)  # as `python -m` has it
    try:
        make = getattr(importlib.import_module(name), factory)
    except (ImportError, AttributeError, ValueError) as error:
        raise OptionError(f"model {model!r} cannot be imported: {first_line(error)}") from error
    made = make()
    if not isinstance(made, torch.nn.Module):
        raise OptionError(f"{model} makes a {type(made).__name__}: allowed is an nn.Module")
    return made.eval()
