"""Private parts of torch are used through one file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "spark_compile" / "torch_private.py"
PROTOTYPES = ("torch.fx.experimental", "torch.fx.passes")
ALLOWED = ("torch._check", "torch.ops.")
"""Names with an underscore that torch documents, and operators, which graphs are made of."""
SOURCES = [
    path
    for folder in ("spark_compile", "passes", "kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != FILE and not {"passes", "kernels"} & set(path.relative_to(ROOT).parts[1:])
]


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of an expression of names, else empty."""
    if isinstance(node, ast.Name):
        return node.id
    below = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{below}.{node.attr}" if below else ""


def names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield dotted(node)
            if node.attr in ("_cdata", "_call_impl", "_compiled_call_impl", "_version"):
                yield f"torch.{node.attr}"


def is_private(name: str) -> bool:
    first, *parts = name.split(".")
    if first != "torch" or name.startswith(ALLOWED):
        return False
    return any(part.startswith("_") and part[:2] != "__" for part in parts) or name.startswith(
        PROTOTYPES
    )


def test_what_is_private_is_found() -> None:
    text = "import torch._dynamo\nfrom torch._guards import x\ntorch._inductor.a(b._version)"
    assert [name for name in names(ast.parse(text)) if is_private(name)] == [
        "torch._dynamo",
        "torch._guards.x",
        "torch._inductor.a",
        "torch._version",
        "torch._inductor",
    ]
    assert not is_private("torch.nn.Module.__call__")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_private_elsewhere(path: Path) -> None:
    found = [name for name in names(ast.parse(path.read_text())) if is_private(name)]
    assert not found, f"through spark_compile/torch_private.py, with a reason: {found}"
