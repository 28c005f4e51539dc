"""``spark-optimize export``, which is the default, and ``inspect``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from ..cli_models import MODEL_KINDS, handwritten, locate, pretrained
from ..cli_options import check, fail, first_line, with_spark_options
from ..kernels.spec import DTYPES
from ..report import SparkError
from .run_commands import run, serve
from .telling import Folder, as_size, shown_progress, shown_warnings

if TYPE_CHECKING:
    from .folder import Manifest
    from .graph import Graph


class ExportIsDefault(TyperGroup):
    """`spark-optimize MODEL -o DIR` is `spark-optimize export MODEL -o DIR`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Take a first word that is no command for a model, if an output folder is named."""
        if args[0] not in self.commands and any(a.startswith(("-o", "--output")) for a in args):
            args = ["export", *args]
        return super().resolve_command(ctx, args)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (export, run, serve, inspect):
        app.command()(command)


@with_spark_options
def export(
    model: Annotated[
        str,
        typer.Argument(
            help=f"What to export: {MODEL_KINDS}, or module:factory, a function that makes a "
            "module which is called with tokens and positions and has its caches in buffers."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")],
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Capacity of the caches; if not given, 8192, or what the model allows."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Number of sequences.")] = 1,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto: that of the weights.")
    ] = "auto",
    plan: Annotated[Path | None, typer.Option(help="Plan that `tune` has written.")] = None,
    check_graphs: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Compare the graphs with the model on a text."),
    ] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace an exported folder.")] = False,
    engine: Annotated[
        str | None,
        typer.Option(
            help="tensorrt also shows which parts of the graphs TensorRT would run, and which stay "
            "with torch: a dry run, which needs neither it nor a GPU."
        ),
    ] = None,
    portable: Annotated[
        bool,
        typer.Option(help="Write ATen operators alone, which torch runs without this library."),
    ] = False,
    aot: Annotated[
        bool,
        typer.Option("--aot/--no-aot", help="Also compile the graphs, for machines like this one."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest alone.")] = False,
    *,
    options: dict[str, Any],
) -> None:
    """Write MODEL as graphs that run without its code, with the cache compressed.

    DIR gets prefill.pt2 and decode.pt2 (programs of torch.export), the weights once, a manifest,
    and config and tokenizer as the model has them. `spark-optimize run DIR` generates with it, and
    so does spark_compile.load(DIR). With --aot it also gets packages of AOTInductor, which run
    without compiling, and libspark.so, with which C++ programs run them.
    """
    if dtype not in ("auto", *DTYPES):
        fail(f"option 'dtype' is {dtype!r}: allowed is one of 'auto', {', '.join(DTYPES)}")
    if engine not in (None, "tensorrt"):
        fail(f"option 'engine' is {engine!r}: allowed is 'tensorrt'")
    check(options)
    is_factory = ":" in model and not Path(model).exists()
    place, keywords = ("", {}) if is_factory else locate(model)
    from .export import export as write
    from .partition import Partition, partition, partition_table

    parts: dict[str, Partition] = {}

    def split(graphs: Mapping[str, Graph]) -> None:
        if engine is not None:
            parts.update((phase, partition(graph.module)) for phase, graph in graphs.items())

    try:
        with shown_progress(quiet=as_json) as told, shown_warnings(as_json):
            told("loading the model")
            made, tokenizer = _loaded(model if is_factory else "", place, keywords, dtype)
            manifest = write(
                made, output, max_tokens=max_tokens, batch=batch, plan=plan, tokenizer=tokenizer,
                check=check_graphs, overwrite=overwrite, portable=portable, aot=aot, told=told,
                seen=split, **options,
            )  # fmt: skip
    except (SparkError, OSError) as error:
        fail(first_line(error, 600), code=1)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(manifest), indent=2))
        return
    console = Console()
    _describe(console, output, manifest)
    if parts:
        console.print(partition_table(parts))


def _loaded(factory: str, place: str, keywords: Mapping[str, str], dtype: str) -> tuple[Any, Any]:
    """The model and its tokenizer, None if it has none."""
    kind = "auto" if dtype == "auto" else DTYPES[dtype]
    if factory:
        made = handwritten(factory)
        return (made if dtype == "auto" else made.to(kind)), None
    model, tokenizer = pretrained(place, keywords, kind)
    return model, None if isinstance(tokenizer, Exception) else tokenizer


def inspect(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest alone.")] = False,
) -> None:
    """Say what is in an exported folder, after checking that it is what was written."""
    from .folder import check_files, read_manifest

    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest)
    except SparkError as error:
        fail(first_line(error, 600))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(manifest), indent=2))
        return
    console = Console()
    console.print(manifest.reported().table())
    _describe(console, folder, manifest)


def _describe(console: Console, folder: Path, manifest: Manifest) -> None:
    """A table of what a user wants to know."""
    table = Table(show_header=False, title=str(folder))
    rows = {
        "model": f"{manifest.model}, {manifest.dtype}",
        "cache": f"{manifest.max_tokens:,} tokens, batch {manifest.batch}",
        "bytes per token": f"{manifest.dense_token_bytes:,} dense, {manifest.stored_token_bytes:,} "
        "in a page",
        "cache in all": f"{as_size(manifest.state_bytes)}, dense {as_size(manifest.dense_bytes)}",
        "files": ", ".join(
            f"{name} {as_size((folder / name).stat().st_size)}"
            for name in manifest.files
            if name.endswith((".pt2", ".safetensors", ".so"))
        ),
    }
    if (found := manifest.verified) is not None:
        rows["every bit stored"] = (
            f"{found['equal']} of {found['scored']} tokens as the model, KL {found['kl_exact']:.1e}"
        )
        rows["as exported"] = (
            f"KL {found['kl']:.1e} nats after a prompt of {found['prompt']} tokens"
        )
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
