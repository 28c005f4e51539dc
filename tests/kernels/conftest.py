"""A cache and a compiler for building the CPU kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch._inductor.config
from fake_compiler import FAKE


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache."""
    monkeypatch.setenv("SPARK_COMPILE_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The path of the script that is the compiler."""
    path = tmp_path_factory.mktemp("compiler") / "fake c++"
    path.write_text(FAKE)
    path.chmod(0o755)
    with torch._inductor.config.patch({"cpp.cxx": (None, str(path))}):
        yield path
