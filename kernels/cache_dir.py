"""The folder of what is made or downloaded once: native kernels, tuning results, demo models."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$SPARK_COMPILE_CACHE, else spark-compile in the user's folder of caches."""
    own = os.environ.get("SPARK_COMPILE_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "spark-compile"
