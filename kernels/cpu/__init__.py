"""Native kernels for the CPU, compiled at first use for the machine that they run on."""

from __future__ import annotations

import functools
import os
import threading
import warnings

import torch

from .build import BuildFailed, level, library

_loading = threading.Lock()


def _forget_loading() -> None:
    """A thread that was loading is not there in the child of a fork, and would never be done."""
    global _loading
    _loading = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_loading)


def load() -> bool:
    """Register the kernels with torch, for ``torch.ops.spark`` on CPU tensors.

    Returns:
        False where they are turned off or cannot be built, which a warning says.

    Raises:
        ValueError: the environment asks for a level that is unknown or that the CPU lacks, or for a
            limit of the compiler's time that is none.
    """
    with _loading:  # two libraries would both be registered
        return _load()


@functools.cache
def _load() -> bool:
    chosen = level()
    if chosen == "off":
        return False
    try:
        with library(chosen) as path:
            torch.ops.load_library(str(path))
    except (BuildFailed, OSError) as error:
        why = f"{error}"
        if isinstance(error, OSError) and error.__cause__:  # torch names the file alone
            why += f": {error.__cause__}"
        message = f"no native CPU kernels, the slow reference runs instead: {why}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        return False
    return True
