"""Native kernels for the CPU, compiled at first use for the machine that they run on."""

from __future__ import annotations

import functools
import warnings

import torch

from .build import BuildFailed, level, library


@functools.cache
def load() -> bool:
    """Register the kernels with torch, for ``torch.ops.spark`` on CPU tensors.

    Returns:
        False where they are turned off or cannot be built, which a warning says.

    Raises:
        ValueError: the environment asks for a level that is unknown or that the CPU lacks.
    """
    chosen = level()
    if chosen == "off":
        return False
    try:
        torch.ops.load_library(str(library(chosen)))
    except (BuildFailed, OSError) as error:
        message = f"no native CPU kernels, the slow reference runs instead: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return False
    return True
