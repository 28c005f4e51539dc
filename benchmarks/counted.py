"""Instructions of kernels and passes by Callgrind: as many on a busy machine as on an idle one.

Valgrind knows no AVX-512, so that the kernels are those of the levels below it. What depends on the
kind of processor (the C library's ways to copy memory, torch's kernels) is fixed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from spark_compile.kernels.cpu import build

from .attend_case import SHAPES
from .counted_worker import TOKENS
from .measure import machine_facts
from .results import Metric, Result, Row

ROOT = Path(__file__).parents[1]
SOURCE = Path(__file__).with_name("callgrind.c")
RUNS = {"plain": ("kernels",), "avx2": ("kernels",), "off": ("passes",)}
"""Levels of the kernels (docs/kernels.md), and what is counted at each."""
WAYS = "AVX2,AVX512VL,AVX512F,AVX_Fast_Unaligned_Load,ERMS,FSRM,SSSE3,Fast_Unaligned_Copy"
FIXED = {
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "GLIBC_TUNABLES": f"glibc.cpu.hwcaps=-{WAYS.replace(',', ',-')}"
    ":glibc.cpu.x86_non_temporal_threshold=0xc0000",
}
METRICS = {"instructions": Metric("counted")}
"""Of attend and build per token and key head, of passes on one graph."""


class Missing(RuntimeError):
    """What is needed to count is not installed."""


def check_installed() -> None:
    """Raises Missing if Valgrind or its header is not there."""
    if not shutil.which("valgrind"):
        raise Missing("valgrind is not installed: instructions cannot be counted")


def run_level(level: str, folder: Path) -> list[Row]:
    """Rows of one process under Callgrind.

    Raises:
        Missing: a compiler or Valgrind's header is not there.
        RuntimeError: the process failed; the message has its output.
    """
    library = folder / "requests.so"
    compile_c = [*build.compiler_command(), "-x", "c", "-O1", "-shared", "-fPIC", str(SOURCE)]
    done = subprocess.run([*compile_c, "-o", str(library)], capture_output=True, text=True)
    if done.returncode:
        why = f"{SOURCE.name} cannot be compiled (is valgrind's header there?)"
        raise Missing(f"{why}: {done.stderr}")
    command = ["valgrind", "--tool=callgrind", "--instr-atstart=no"]
    command += [f"--callgrind-out-file={folder / 'counts'}", sys.executable]
    command += ["-m", "benchmarks.counted_worker", str(library), *RUNS[level]]
    environment = {**os.environ, **FIXED, "SPARK_COMPILE_CPU": level}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"counting at level {level} failed:\n{done.stdout}{done.stderr}")
    return list(rows_of(level, dict(counts(folder))))


def counts(folder: Path) -> Iterator[tuple[str, int]]:
    """Names and instructions in the files that Callgrind wrote."""
    for path in folder.glob("counts.*"):
        text = path.read_text()
        name = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
        total = re.search(r"^totals: (\d+)$", text, re.MULTILINE)
        if name and total:
            yield name[1], int(total[1])


def rows_of(level: str, found: dict[str, int]) -> Iterator[Row]:
    """Rows of named counts."""
    for name, count in sorted(found.items()):
        what, _, case = name.partition("|")
        if what != "passes":
            count = round(count / TOKENS / SHAPES["llama"].kv_heads)
        where = "python" if what == "passes" else level
        yield {"what": what, "case": case, "level": where, "instructions": count}


def run(levels: Iterable[str] = RUNS, jobs: int = 2) -> list[Row]:
    """Rows of all levels.

    Raises:
        Missing: Valgrind, its header or a compiler is not there.
    """
    check_installed()
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as pool:
        folders = {level: Path(scratch, level) for level in levels}
        for folder in folders.values():
            folder.mkdir()
        return [row for rows in pool.map(run_level, folders, folders.values()) for row in rows]


def result(rows: list[Row]) -> Result:
    """The rows as a file; another compiler, Python or torch has other instructions."""
    done = subprocess.run([*build.compiler_command(), "--version"], capture_output=True, text=True)
    machine = machine_facts()
    machine["compiler"] = done.stdout.partition("\n")[0]
    machine["python"] = machine["python"].rpartition(".")[0]
    comparable = ["compiler", "python", "torch", "transformers"]
    return Result("counted", ["what", "case", "level"], METRICS, rows, {}, machine, comparable)
