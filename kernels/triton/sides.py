"""What the kernels are told of one side of a cache, and which sides they can work on."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats import Dense, Format, Int8, Pruned, Spark
from ..formats.selection import plane_bytes
from ..layout import HeadLayout, PageLayout
from ..spec import Side, Spec
from . import blocks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RECOVERIES = ("degenerate", "none")


class Operand(NamedTuple):
    """One side as the kernels take it."""

    arguments: tuple[Any, ...]
    """pages, head, new, slots, rows, and the strides of the first three."""
    constants: dict[str, Any]
    """Where the fields lie, by the names that a kernel of one side has for them."""
    rows: Any
    """Room in the tail."""

    def of(self, kernel: Any) -> dict[str, Any]:
        """Those of the constants that a kernel takes."""
        return {n: v for n, v in self.constants.items() if n in kernel.arg_names}

    def named(self, prefix: str, kernel: Any) -> dict[str, Any]:
        """The same of a kernel of both sides."""
        constants = {prefix + name: value for name, value in self.constants.items()}
        return {n: v for n, v in constants.items() if n in kernel.arg_names}


def operand(pages: Tensor, head: Tensor, new: Tensor, spec: Spec, side: Side) -> Operand:
    """A side and its new tokens [B, Hkv, L, D], whose channels have to lie side by side."""
    layout = spec.head(side)
    rows = layout.tail_rows(head)
    arguments = (
        pages, head, new, pages.shape[2], rows, *pages.stride()[:2], *head.stride()[:2],
        *new.stride()[:3],
    )  # fmt: skip
    return Operand(arguments, _constants(spec.pages(side), layout), rows)


@functools.cache
def _constants(pages: PageLayout, head: HeadLayout) -> dict[str, Any]:
    format, at = pages.format, {**pages.offsets, **head.offsets}
    planes = [at[name] for name in ("keep", "negative") if name in at]
    plane = plane_bytes(format.head_dim)
    multiples = (*planes, plane, pages.record_bytes, pages.page_bytes)
    unit = next(size for size in (4, 2, 1) if all(number % size == 0 for number in multiples))
    recovery = "none"
    if isinstance(format, Spark) and format.recovery != "none":
        recovery = "signs"
    elif isinstance(format, Pruned):
        recovery = "fill"
    return {
        "DIM": format.head_dim, "COUNT": getattr(format, "kept", format.head_dim),
        "PAGE": pages.page_bytes, "RECORD": pages.record_bytes,
        "SPARK": isinstance(format, Spark), "PRUNED": isinstance(format, Spark | Pruned),
        "INT8": "step" in at, "RECOVERY": recovery,
        "SQUARED": getattr(format, "saliency", "") == "squared",
        "AMOUNT": at.get("amplitude", at.get("fill", 0)), "STEP": at.get("step", 0),
        "CHANNELS": next(at[name] for name in ("channels", "levels", "rows") if name in at),
        "KEEP": at.get("keep", 0), "NEGATIVE": at.get("negative", 0),
        "PLANE": plane, "UNITS": plane // unit, "UNIT": 8 * unit,
        "CONSTANT": at.get("norms", at.get("bias", 0)), "STATS": at.get("stats", 0),
        "TAIL": at["tail"], "BLOCK": blocks.padded(format.head_dim),
    }  # fmt: skip


def can(spec: Spec) -> bool:
    """Whether the kernels know the formats and have blocks for the heads; they know no scorers."""
    key, value = spec.key, spec.value
    return (
        spec.evict is None
        and _knows(key)
        and _knows(value)
        and key.dtype == value.dtype
        and blocks.fits(key.head_dim, value.head_dim, key.dtype)
    )


def _knows(format: Format) -> bool:
    if format.dtype not in DTYPES or type(format) not in (Dense, Int8, Pruned, Spark):
        return False
    return not isinstance(format, Spark) or format.recovery in RECOVERIES


def check_room(pages: Tensor, new: Tensor, spec: Spec, side: Side) -> None:
    """Raise ValueError unless there are pages for those that new tokens alone fill.

    The kernels drop what finds no room, so what is known without the counters is said here. Sizes
    that grow are compared only where they are plain numbers: a comparison of symbols would become
    a guard of the graph.
    """
    if type(pages.shape[2]) is int and type(new.shape[2]) is int:
        due = 0 if spec.min_tokens else (new.shape[2] - spec.sinks - spec.recent) // spec.window
        if pages.shape[2] < due:
            raise ValueError(f"{side}_pages has {pages.shape[2]} pages: at least {due} are needed")
