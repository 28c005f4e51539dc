"""Choosing a format for the keys and the values of each layer by what they do to a model's text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor, nn

from .config import QUANTIZED_SINKS, SparkConfig
from .kernels.spec import DTYPES, SIDES
from .knapsack import solve
from .plan import Measured, Plan, PlannedLayer
from .presets import NAMES, TOKENS, dense_bytes, share_named, side_bytes
from .report import OptionError, warn_once
from .sensitivity import Layer, Sensitivity, site_spec
from .torch_private import compiled_call


def calibrate(
    model: nn.Module,
    tokens: Tensor,
    *,
    budget: float | str,
    dtype: torch.dtype | None = None,
    windows: int = 4,
    context: int = 1024,
    scored: int = 128,
    progress: bool = True,
) -> Plan:
    """Measure each layer's keys and values in each candidate format, and choose under a budget.

    A candidate's divergence is the mean KL divergence of the next-token distributions of
    ``scored`` tokens after a prompt of ``context`` tokens, whose cache has one side of one layer
    in the format and everything else dense. The sum over all layers and sides is minimized.

    Args:
        model: a causal language model that takes ``input_ids`` and ``use_cache`` and returns
            logits and a cache of transformers. It is not changed. It should be in float32: what
            rounding to 16 bits does to predictions is more than most formats do, and a SparkWarning
            says so.
        tokens: ids of text, [S], or [texts, S] without padding, such as
            ``tokenizer(text, return_tensors="pt").input_ids``.
        budget: as the option of that name; here of all layers together, at 4,096 tokens.
        dtype: that the model will have when it follows the plan, whose dense bytes the budget is
            a share of; None: the dtype that it has.
        windows: pieces of the text, spread evenly.
        context: tokens of a prompt.
        scored: tokens after it.
        progress: show a progress bar, on the standard error.

    Raises:
        OptionError: an argument is wrong, or no choice of formats fits into the budget. It is a
            SparkError and a ValueError.
        SparkError: the model cannot be calibrated; the message says why.
    """
    if (share := share_named(budget)) is None:
        raise OptionError(
            f"budget is {budget!r}: allowed is a number with 0 < budget <= 1, or one of {NAMES}"
        )
    if any(compiled_call(m) is not None or hasattr(m, "_orig_mod") for m in model.modules()):
        raise OptionError("the model is compiled: allowed is one as it was before optimize")
    least = SparkConfig().recent + SparkConfig().window + QUANTIZED_SINKS
    if dtype is not None and dtype not in DTYPES.values():
        raise OptionError(f"dtype is {dtype!r}: allowed is one of {[*DTYPES.values()]}")
    for name, value, smallest in (("windows", windows, 1), ("context", context, least),
                                  ("scored", scored, 1)):  # fmt: skip
        if not isinstance(value, int) or value < smallest:
            raise OptionError(f"{name} is {value!r}: allowed is an integer from {smallest}")
    pieces = _pieces(tokens, windows, context + scored)
    pieces = pieces.to(next(model.parameters()).device)
    sensitivity = Sensitivity(model, context)
    with _evaluating(model), torch.no_grad(), _bar(progress) as bar:
        task = bar.add_task("calibrating", total=None)
        bar.update(task, total=windows * sensitivity.begin(pieces[0]))
        for piece in pieces:
            sensitivity.measure(piece, lambda count: bar.advance(task, count))
    layers = sensitivity.layers
    own = layers[0].formats["key"][-1].dtype
    if own.itemsize < 4:
        warn_once(
            f"the model was calibrated in {own}: rounding hides what most formats do; calibrate it "
            f"in float32, with dtype={own}"
        )
    chosen, taken = choose(layers, share, dtype or own)
    packages = ("spark-compile", "torch", "transformers")
    measured = Measured(
        model=type(model).__name__,
        dtype=str(dtype or own).removeprefix("torch."),
        computed_in=str(own).removeprefix("torch."),
        noise=sensitivity.noise,
        head_sizes=tuple(sorted({(layer.site.key_dim, layer.site.value_dim) for layer in layers})),
        windows=windows,
        context=context,
        scored=scored,
        versions={name: version(name) for name in packages},
    )
    return Plan(share, taken, tuple(chosen), measured)


def choose(
    layers: list[Layer], share: float, dtype: torch.dtype
) -> tuple[list[PlannedLayer], float]:
    """The formats of all layers with the least divergence that a share of the bytes allows.

    Args:
        dtype: that bytes are counted for.

    Returns:
        The layers, and the share that they take.

    Raises:
        OptionError: even the smallest formats take a larger share.
    """
    items, dense = [], []
    for layer in layers:
        held = layer.tokens if layer.slides else TOKENS
        for side in SIDES:
            formats = [replace(format, dtype=dtype) for format in layer.formats[side]]
            heads = layer.site.kv_heads
            specs = [site_spec(side, format, slides=layer.slides) for format in formats]
            sizes = [heads * side_bytes(spec, side, held) for spec in specs]
            items.append(list(zip(sizes, layer.kl[side], strict=True)))
            dense.append(heads * dense_bytes(formats[-1], held))
    least = sum(min(size for size, _ in choices) for choices in items)
    if least > share * sum(dense):
        smallest = -(-least * 10**4 // sum(dense)) / 1e4
        raise OptionError(f"budget is {share:g}: allowed is {smallest} or more for this model")
    picks = solve(items, int(share * sum(dense)))
    taken = [choices[pick][0] for choices, pick in zip(items, picks, strict=True)]
    planned: list[PlannedLayer] = []
    for layer in layers:
        pair = slice(2 * len(planned), 2 * len(planned) + 2)
        planned.append(_planned(layer, picks[pair], sum(taken[pair]) / sum(dense[pair])))
    return planned, sum(taken) / sum(dense)


def _planned(layer: Layer, picks: list[int], share: float) -> PlannedLayer:
    texts = [[format.text for format in layer.formats[side]] for side in SIDES]
    key, value = (found[pick] for found, pick in zip(texts, picks, strict=True))
    key_kl, value_kl = (
        dict(zip(found, layer.kl[side], strict=True))
        for found, side in zip(texts, SIDES, strict=True)
    )
    return PlannedLayer(layer.site.layer, key, value, share, key_kl, value_kl)


def _pieces(tokens: Any, windows: int, size: int) -> Tensor:
    """Disjoint windows [windows, 1, size] of text."""
    if (
        not isinstance(tokens, Tensor)
        or tokens.dtype.is_floating_point
        or tokens.dim() not in (1, 2)
    ):
        shape = (
            f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens)
        )
        raise OptionError(
            f"tokens are {shape}: allowed is a tensor of ids [S] or [texts, S], such as "
            'tokenizer(text, return_tensors="pt").input_ids'
        )
    rows = tokens.long().reshape(-1, tokens.shape[-1])
    pieces = rows[:, : rows.shape[1] // size * size].reshape(-1, size)
    if len(pieces) < windows:
        raise OptionError(
            f"tokens are {list(tokens.shape)}: {windows} windows of {size} tokens are needed, each "
            "in one text"
        )
    at = [len(pieces) * number // windows for number in range(windows)]
    return pieces[at].unsqueeze(1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode inside the ``with`` block."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _bar(shown: bool) -> Progress:
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)
