"""Options of the backend on the command line, and how a command ends that cannot go on."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import typer

from .by_layer import Formats
from .config import SparkConfig
from .report import OptionError


def with_spark_options(command: Callable[..., None]) -> Callable[..., None]:
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
        if field.name == "context_parallel":
            continue  # a command is one process
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
            parser=number_or_name if is_budget else None,
            metavar="SHARE" if is_budget else None,
        )
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[(str if is_budget else hint) | None, option],
        )


def number_or_name(text: str) -> float | str:
    """What a user means by a budget."""
    try:
        return float(text)
    except ValueError:
        return text


def check(options: dict[str, Any]) -> None:
    """End the command if an option of the backend is wrong."""
    try:
        SparkConfig.from_options(options)
    except OptionError as error:
        fail(str(error))


def first_line(error: BaseException, most: int = 120) -> str:
    """The first line of an error's message, at most that many characters of it."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:most]


def fail(message: str, code: int = 2) -> NoReturn:
    """End the command with a message."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)
