"""What the kernels are told of one side of a cache, and which sides they can work on."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from ..formats import Dense, Format, Int8, Pruned, Quantized, Spark
from ..formats.codes import PLANES, code_bytes
from ..formats.quantized import WHOLE_BITS
from ..formats.selection import plane_bytes
from ..layout import HeadLayout, PageLayout
from ..spec import Side, Spec
from . import blocks
from .parts import packed_parts

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
    ptx = _runs_ptx(pages.device, spec.key.dtype)
    return Operand(arguments, _constants(spec.pages(side), layout, ptx), rows)


def _runs_ptx(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether numbers of a dtype may be made of codes by PTX: floats of 16 bits, on NVIDIA."""
    if torch.version.hip is not None or triton.knobs.runtime.interpret:
        return False
    return dtype == torch.float16 or (dtype == torch.bfloat16 and _has_bfloat16(device))


@functools.cache
def _has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16, as NVIDIA's do from Ampere on."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _constants(pages: PageLayout, head: HeadLayout, ptx: bool) -> dict[str, Any]:
    format, at = pages.format, {**pages.offsets, **head.offsets}
    planes = [at[name] for name in ("keep", "negative") if name in at]
    plane = plane_bytes(format.head_dim)
    multiples = (*planes, plane, pages.page_bytes)
    unit = next(size for size in (4, 2, 1) if all(number % size == 0 for number in multiples))
    recovery = "none"
    if isinstance(format, Spark) and format.recovery != "none":
        recovery = "signs"
    elif isinstance(format, Pruned):
        recovery = "fill"
    parts, code_row = _parts(format)
    is_quantized = isinstance(format, Quantized)
    names = ("channels", "levels", "codes", "rows")
    channels = next(at[name] for name in names if name in at)
    words = [code_row, channels, pages.page_bytes, *(part[3] for part in parts)]
    in_words = all(n % 4 == 0 for n in words) and all(_sliced(part) for part in parts)
    return {
        "DIM": format.head_dim,
        "COUNT": getattr(format, "kept", format.head_dim), "PART_COUNT": len(parts),
        "PAGE": pages.page_bytes, "CODED": bool(parts), "QUANTIZED": is_quantized,
        "PARTS": packed_parts(parts), "CODE_BYTES": code_row,
        "WORDS": in_words, "PTX": in_words and ptx,
        "SCALED": getattr(format, "scaled", False), "ROTATED": getattr(format, "rotated", False),
        "SPARK": isinstance(format, Spark), "PRUNED": isinstance(format, Spark | Pruned),
        "FINE": is_quantized and any(part[1] == WHOLE_BITS for part in parts),
        "NOTES": format.uses_queries, "EACH": format.EACH_QUERY, "INT8": "step" in at,
        "RECOVERY": recovery, "SQUARED": getattr(format, "saliency", "") == "squared",
        "AMOUNT": at.get("amplitude", at.get("fill", 0)), "STEP": at.get("step", 0),
        "CHANNELS": channels, "KEEP": at.get("keep", 0), "NEGATIVE": at.get("negative", 0),
        "PLANE": plane, "UNITS": plane // unit, "UNIT": 8 * unit,
        "CONSTANT": at.get("norms", at.get("bias", 0)), "STATS": at.get("stats", 0),
        "GAIN": at.get("gain", 0), "CENTER": at.get("center", 0), "FACTOR": at.get("factor", 0),
        "ORDER": at.get("order", 0), "TAIL": at["tail"], "BLOCK": blocks.padded(format.head_dim),
    }  # fmt: skip


Part = tuple[int, int, int, int, int]


def _parts(format: Format) -> tuple[list[Part], int]:
    """What ``packed_parts`` takes, and the bytes of a token's codes; nothing if it has none."""
    if isinstance(format, Int8):
        return [(format.head_dim, 8, 0, 0, blocks.padded(format.head_dim))], format.head_dim
    parts: list[Part] = []
    end, least = 0, 16  # channels that a matrix product takes
    of_format = format.parts if isinstance(format, Quantized) else ()
    for part in of_format:
        if len(of_format) == 1:
            least = blocks.padded(format.head_dim)  # as that of dense tokens
        block = max(least, 1 << (part.channels - 1).bit_length())
        parts.append((part.channels, part.bits, part.first, end, block))
        end += code_bytes(part.channels, part.bits)
    return parts, end


def _sliced(part: Part) -> bool:
    """Whether the planes of a part are made of slices of whole words and fill its tile."""
    channels, bits, _, _, block = part
    return channels == block and channels % (4 * (8 // min(PLANES[bits]))) == 0


def can(spec: Spec) -> bool:
    """Whether the kernels know the formats and have blocks for the heads; they know no scorers."""
    key, value = spec.key, spec.value
    return (
        spec.evict is None
        and _knows(key)
        and _knows(value)
        and _is_one_part(value)
        and key.dtype == value.dtype
        and blocks.fits(key.head_dim, value.head_dim, key.dtype)
    )


def _knows(format: Format) -> bool:
    if format.dtype not in DTYPES or type(format) not in (Dense, Int8, Pruned, Quantized, Spark):
        return False
    return not isinstance(format, Spark) or format.recovery in RECOVERIES


def _is_one_part(format: Format) -> bool:
    """Whether sums of its levels can be turned back where they are merged."""
    return not isinstance(format, Quantized) or not format.scaled


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
