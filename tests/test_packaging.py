"""The project as it is installed: package names, entry points, and no stray top-level package."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def test_kernels_from_the_repository_root_is_not_ours() -> None:
    code = "import kernels; print(kernels.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert str(ROOT) not in done.stdout
    if done.returncode:
        assert "ModuleNotFoundError" in done.stderr
        assert "spark_compile.kernels" in done.stderr or "No module named" in done.stderr


def test_kernels_is_not_importable_next_to_the_tests() -> None:
    spec = importlib.util.find_spec("kernels")
    assert spec is None or str(ROOT / "kernels") not in str(spec.origin)


@pytest.mark.parametrize("name", ["kernels", "passes"])
def test_linked_packages_are_imported_under_spark_compile(name: str) -> None:
    module = importlib.import_module(f"spark_compile.{name}")
    assert module.__name__ == f"spark_compile.{name}"
    assert Path(str(module.__file__)).resolve().parent == ROOT / name


def test_dynamo_lists_the_backend() -> None:
    assert "spark" in torch._dynamo.list_backends(exclude_tags=())
