"""``python -m benchmarks``: everything that is measured, each a command."""

from __future__ import annotations

import typer

from . import (
    bench_decode,
    bench_kernels,
    compare,
    coverage,
    gpu,
    history,
    prefill_memory,
    quality,
    regressions,
    spread_cost,
    step_overhead,
    sweep,
    tasks,
)

COMMANDS = {
    "check": regressions.main,
    "compare": compare.main,
    "coverage": coverage.main,
    "decode": bench_decode.main,
    "gpu": gpu.main,
    "history": history.main,
    "kernels": bench_kernels.main,
    "memory": prefill_memory.main,
    "overhead": step_overhead.main,
    "quality": quality.main,
    "spread": spread_cost.main,
    "sweep": sweep.main,
    "tasks": tasks.main,
}
app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
for name, command in COMMANDS.items():
    app.command(name)(command)

if __name__ == "__main__":
    app()
