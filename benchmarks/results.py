"""What every benchmark writes and ``compare`` reads: JSON lines, the first about the others.

It has the name of the benchmark, the machine with its versions and commit, the settings, which
fields of a row say what was measured (``keys``), which ones are measurements and of what kind
(``metrics``), and which facts of the machine two results must share to be compared
(``comparable``). Each line after it is a row.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .measure import RESULTS, machine_facts

Row = dict[str, Any]
Kind = Literal["exact", "counted", "ratio"]


@dataclass(frozen=True)
class Metric:
    """One measurement of each row.

    exact: equal in every run. counted: instructions and the like, which hardly vary. ratio: a time
    over another one of the same run, or what varies as much; a row may say how sure it is in
    ``<name>_interval``, [low, high].
    """

    kind: Kind
    better: Literal["less", "more"] = "less"


@dataclass
class Result:
    """A file of one benchmark."""

    name: str
    keys: list[str]
    metrics: dict[str, Metric]
    rows: list[Row]
    settings: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=machine_facts)
    comparable: list[str] = field(default_factory=list)

    def by_key(self) -> dict[str, Row]:
        """Rows by the text of their keys."""
        return {", ".join(str(row[key]) for key in self.keys): row for row in self.rows}

    def lines(self) -> Iterator[str]:
        """The lines of the file."""
        head = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "rows"}
        head["metrics"] = {name: dataclasses.asdict(m) for name, m in self.metrics.items()}
        yield from (json.dumps(line) for line in (head, *self.rows))

    def write(self, path: Path | None = None) -> Path:
        """Write the file, by default ``results/<name>.jsonl``, and return its path."""
        path = path or RESULTS / f"{self.name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Replaced as a whole: a run that is stopped here must not lose what it has.
        scratch = path.with_suffix(".tmp")
        scratch.write_text("\n".join(self.lines()) + "\n")
        scratch.replace(path)
        return path

    @classmethod
    def read(cls, path: Path) -> Result:
        """The result in a file.

        Raises:
            ValueError: the file is not one of a benchmark; the message names it.
        """
        try:
            head, *rows = [json.loads(line) for line in path.read_text().splitlines()]
            metrics = {name: Metric(**metric) for name, metric in head.pop("metrics").items()}
            return cls(**head, metrics=metrics, rows=rows)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no result of a benchmark: {error}") from error


def ratios(better: Literal["less", "more"], names: Iterable[str]) -> dict[str, Metric]:
    """Metrics that are ratios of times."""
    return {name: Metric("ratio", better) for name in names}


def differing(one: Result, other: Result, versions: Iterable[str]) -> str:
    """What two results differ in: their machines' versions of packages, and settings."""
    names = dict.fromkeys((*one.settings, *other.settings))
    pairs = [(name, one.machine.get(name), other.machine.get(name)) for name in versions]
    pairs += [(name, one.settings.get(name), other.settings.get(name)) for name in names]
    return ", ".join(f"{name} {a}, now {b}" for name, a, b in pairs if a != b)
