"""``SPARK_COMPILE_DEBUG=DIR``: every graph as each pass leaves it, as readable code in files.

A graph gets the folder ``DIR/process-PID-graph-N``. In it, ``0-Lower.py`` is the graph before the
passes, ``1-Normalize.py`` the same after the first of them and so on, and ``summary.txt`` has a
line per pass: time with its checks, number of nodes, matches.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from ..report import warn_once
from .program import Program

VARIABLE = "SPARK_COMPILE_DEBUG"
_numbers = itertools.count()


class GraphDump:
    """The files of one graph; one that cannot be written gives a warning, never an exception."""

    def __init__(self, program: Program, directory: Path) -> None:
        self._program, self._directory = program, directory
        self._folder = directory / f"process-{os.getpid()}-graph-{next(_numbers)}"
        self._lines = [str(program.config), _line("pass", "ms", "nodes", "matches")]
        self._count = itertools.count()
        self.write("Lower")

    @classmethod
    def open(cls, program: Program) -> GraphDump | None:
        """The dump of a new graph, which is written as it is now.

        None if none was asked for, or into the home folder of nobody, which a warning says.
        """
        directory = os.environ.get(VARIABLE)
        if not directory:
            return None
        try:
            folder = Path(directory).expanduser()
        except RuntimeError as error:
            warn_once(f"{VARIABLE}={directory}: a graph could not be written: {error}")
            return None
        return cls(program, folder)

    def write(self, name: str, seconds: float | None = None, result: str = "") -> None:
        """Write the graph as the pass ``name`` has left it, and bring the summary up to date."""
        ms = "" if seconds is None else f"{seconds * 1e3:.1f}"
        self._lines.append(_line(name, ms, str(len(self._program.graph.nodes)), result))
        summary = "\n".join(self._lines) + "\n"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "summary.txt").write_text(summary, encoding="utf-8")
            # Last, because it may raise: a pass that has failed can leave a graph without code.
            code = self._program.module.print_readable(print_output=False)
            (self._folder / f"{next(self._count)}-{name}.py").write_text(code, encoding="utf-8")
        except Exception as error:
            reason = getattr(error, "strerror", None) or error
            warn_once(f"{VARIABLE}={self._directory}: a graph could not be written: {reason}")


def _line(name: str, ms: str, nodes: str, result: str) -> str:
    return f"{name:<16}{ms:>8}{nodes:>8}  {result}".rstrip()
