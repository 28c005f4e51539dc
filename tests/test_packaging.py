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


def run_in_root(code: str) -> str:
    """What a script prints that finds the repository root on its sys.path."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_kernels_from_the_repository_root_is_not_ours() -> None:
    code = "import kernels; print(vars(kernels).get('__file__'), vars(kernels).get('__path__'))"
    assert str(ROOT) not in run_in_root(code)


def test_transformers_works_from_the_repository_root() -> None:
    code = (
        "from transformers import LlamaForCausalLM\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "import importlib.util; importlib.util.find_spec('kernels')\n"
        "print(LlamaForCausalLM.__name__, is_kernels_available())"
    )
    assert run_in_root(code) == "LlamaForCausalLM False"


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
