"""A compiler that takes no time, and what it made."""

from __future__ import annotations

import time
from pathlib import Path

from spark_compile.kernels.cpu import build

FAKE = """#!/bin/sh
case "$*" in *--version*) echo "fake 1.0"; exit;; esac
echo >> "$0.count"
sleep 0
for word; do out="$word"; done
printf "the library" > "$out"
"""


def compilations(fake: Path) -> int:
    return len(fake.with_name("fake c++.count").read_text().splitlines())


def obtain() -> tuple[Path, bool]:
    """The library of the level "plain", and whether it is still there when it has been loaded."""
    with build.library("plain") as path:
        assert path.read_text() == "the library"
    return path, path.exists()


def files(folder: Path) -> list[Path]:
    """All but locks."""
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


def ended(process: int) -> bool:
    """Whether a process ends soon; one that nobody has waited for has no command line any more."""
    command = Path(f"/proc/{process}/cmdline")
    for _ in range(100):
        if not command.exists() or not command.read_bytes():
            return True
        time.sleep(0.05)
    return False
