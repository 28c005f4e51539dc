"""What ``spark-optimize tune`` does: a model and a text from files, and a plan as a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from .calibrate import calibrate
from .cli_models import pretrained
from .kernels.spec import DTYPES
from .plan import Plan
from .report import OptionError


def plan_for(
    place: str, keywords: Mapping[str, str], text: Path, dtype: str, budget: float | str,
    context: int, windows: int,
) -> Plan:  # fmt: skip
    """Load a causal language model with its tokenizer and calibrate it on the text of a file.

    Args:
        place: folder or hub id, as ``from_pretrained`` takes it; ``keywords`` go with it.
        dtype: of the model when it follows the plan; "auto": that of the weights. The measuring
            is in float32.

    Raises:
        OptionError: the model, its tokenizer or the text cannot be read, or as ``calibrate``
            raises it.
        SparkError: as ``calibrate`` raises it.
    """
    import torch
    import transformers

    try:
        written = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"text {text} cannot be read: {error}") from error
    model, tokenizer = pretrained(place, keywords, torch.float32)
    if isinstance(tokenizer, Exception):
        raise OptionError(f"model {place!r} has no tokenizer: {tokenizer}") from tokenizer
    config = transformers.AutoConfig.from_pretrained(place, **keywords)
    tokens = tokenizer(written, return_tensors="pt", verbose=False).input_ids
    kept = (config.dtype or torch.float32) if dtype == "auto" else DTYPES[dtype]
    return calibrate(model, tokens, budget=budget, dtype=kept, context=context, windows=windows)


def plan_table(plan: Plan) -> Table:
    """What each layer got, and what all of them take."""
    measured = plan.measured
    table = Table(
        title=f"{measured.model}, {measured.dtype}, budget {plan.budget:.1%}",
        caption=f"KL in nats: {measured.windows} prompts of {measured.context} tokens, "
        f"{measured.scored} scored tokens each; their sum is an estimate.",
    )
    for column in ("layer", "keys", "values"):
        table.add_column(column, overflow="fold")
    for column in ("KL keys", "KL values", "share"):
        table.add_column(column, justify="right")
    for layer in plan.layers:
        kl = layer.key_kl[layer.key], layer.value_kl[layer.value]
        row = escape(layer.layer), short(layer.key), short(layer.value), *(f"{x:.1e}" for x in kl)
        table.add_row(*row, f"{layer.share:.1%}")
    table.add_section()
    table.add_row("all", "", "", "", f"{plan.kl:.1e}", f"{plan.share:.1%}")
    return table


def short(text: str) -> str:
    """The text of a format without the options that have their usual values."""
    return escape(text.replace(",scaled=False", "").replace(",rotated=True", ""))
