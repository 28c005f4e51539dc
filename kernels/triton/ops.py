"""Operators of the Triton kernels, and their place behind ``torch.ops.spark``.

``torch.ops.spark_triton.<name>`` takes what ``torch.ops.spark.<name>`` does. As a
``torch.library.triton_op`` it is decomposed by functionalization, so that Inductor sees the kernels
(export keeps it whole); the packed length goes to the device, since reading it would break the
graph. Called eagerly, ``torch.ops.spark.<name>`` reads it, a number on the CPU, and starts the same
kernels without the layers of Python that a custom operator has.

What the kernels cannot do, a random recovery or heads too large for the registers, the reference
does (``torch.ops.spark_reference``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from ..layout import value_head_dim
from . import blocks, checks, launch


@triton_op("spark_triton::prune", mutates_args=())
def prune(
    key: Tensor,
    select_norms: Tensor,
    recovery_norms: Tensor,
    kept_channels: int,
    recovery: str,
    saliency: str,
    quantized: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``spark::prune``; "gaussian" recovery is the reference's."""
    return _prune(
        key, select_norms, recovery_norms, kept_channels, recovery, saliency, quantized
    )  # fmt: skip


@triton_op("spark_triton::pack_values", mutates_args=())
def pack_values(
    value: Tensor, bias: Tensor | None, kept_channels: int, quantized: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``spark::pack_values``."""
    return launch.pack_values(value, bias, kept_channels, quantized)


@triton_op("spark_triton::append", mutates_args=("rows",))
def append(rows: Tensor, new: Tensor, start: int, packed_length: Tensor | None = None) -> None:
    """``spark::append``."""
    launch.append(rows, new, start, _on_device(packed_length, rows))


@triton_op("spark_triton::append_values", mutates_args=("values", "value_bits", "value_scale"))
def append_values(
    values: Tensor,
    value_bits: Tensor | None,
    value_scale: Tensor | None,
    value_bias: Tensor | None,
    new: Tensor,
    start: int,
) -> None:
    """``spark::append_values``."""
    launch.append_values(values, value_bits, value_scale, value_bias, new, start)


@triton_op("spark_triton::attend", mutates_args=())
def attend(
    query: Tensor, kept: Tensor, bits: Tensor, scale: Tensor, norms: Tensor, packed_length: Tensor,
    tail: Tensor, values: Tensor, length: int, attn_mask: Tensor | None, causal_offset: int | None,
    attn_scale: float, softcap: float, sinks: Tensor | None, sink_tokens: int, recovery: str,
    saliency: str, return_lse: bool = False, value_bits: Tensor | None = None,
    value_scale: Tensor | None = None, value_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``spark::attend``."""
    return _attend(
        query, kept, bits, scale, norms, packed_length, _on_device(packed_length, query),
        tail, values, length, attn_mask, causal_offset, attn_scale, softcap, sinks, sink_tokens,
        recovery, saliency, return_lse, value_bits, value_scale, value_bias,
    )  # fmt: skip


@triton_op(
    "spark_triton::append_attend", mutates_args=("tail", "values", "value_bits", "value_scale")
)
def append_attend(
    query: Tensor, new_key: Tensor, new_value: Tensor,
    kept: Tensor, bits: Tensor, scale: Tensor, norms: Tensor, packed_length: Tensor,
    tail: Tensor, values: Tensor, length: int, attn_mask: Tensor | None, causal_offset: int | None,
    attn_scale: float, softcap: float, sinks: Tensor | None, sink_tokens: int, recovery: str,
    saliency: str, return_lse: bool = False, value_bits: Tensor | None = None,
    value_scale: Tensor | None = None, value_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``spark::append_attend``."""
    return _append_attend(
        query, new_key, new_value, kept, bits, scale, norms, packed_length,
        _on_device(packed_length, query), tail, values, length, attn_mask, causal_offset,
        attn_scale, softcap, sinks, sink_tokens, recovery, saliency, return_lse, value_bits,
        value_scale, value_bias,
    )  # fmt: skip


def _prune(
    key: Tensor, select_norms: Tensor, recovery_norms: Tensor, kept_channels: int, recovery: str,
    saliency: str, quantized: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if recovery == "gaussian":
        packed: tuple[Tensor, Tensor, Tensor] = _reference(
            "prune", key, select_norms, recovery_norms, kept_channels, recovery, saliency, quantized
        )
        return packed
    return launch.prune(key, select_norms, recovery_norms, kept_channels, saliency, quantized)


def _attend(
    query: Tensor, kept: Tensor, bits: Tensor, scale: Tensor, norms: Tensor, packed_length: Tensor,
    packed: int | Tensor, tail: Tensor, values: Tensor, length: int, *how: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend with the kernels if they can, else by the reference; ``how`` as in the schema."""
    recovery, value_bias = how[6], how[11]
    value_dim = value_head_dim(values, value_bias)
    native = recovery in checks.RECOVERIES
    if native and blocks.fits(query.shape[3], value_dim, query.dtype):
        return launch.attend(
            query, kept, bits, scale, norms, packed, tail, values, length, *how
        )  # fmt: skip
    attended: tuple[Tensor, Tensor] = _reference(
        "attend", query, kept, bits, scale, norms, packed_length, tail, values, length, *how
    )
    return attended


def _append_attend(
    query: Tensor, new_key: Tensor, new_value: Tensor,
    kept: Tensor, bits: Tensor, scale: Tensor, norms: Tensor, packed_length: Tensor,
    packed: int | Tensor, tail: Tensor, values: Tensor, length: int, *how: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Append, then attend over ``length + L`` tokens; nothing is written if there is no room."""
    value_bits, value_scale, value_bias = how[9:]
    checks.check_room(values, length, 0, new_value.shape[2])
    launch.append(tail, new_key, length, packed)
    launch.append_values(values, value_bits, value_scale, value_bias, new_value, length)
    return _attend(
        query, kept, bits, scale, norms, packed_length, packed, tail, values,
        length + new_key.shape[2], *how,
    )  # fmt: skip


def _on_device(packed_length: Tensor | None, like: Tensor) -> int | Tensor:
    return 0 if packed_length is None else packed_length.to(like.device)


def _reference(name: str, *args: Any) -> Any:
    return getattr(torch.ops.spark_reference, name)(*args)


# How the eager operators read their arguments: the packed length's place in the schema, and what
# takes the place and the number.
def _eager_append(rows: Tensor, new: Tensor, start: int, packed: Tensor | None = None) -> None:
    launch.append(rows, new, start, 0 if packed is None else int(packed))


def _eager_attend(*args: Any) -> tuple[Tensor, Tensor]:
    return _attend(*args[:6], int(args[5]), *_defaulted(args[6:], 15))


def _eager_append_attend(*args: Any) -> tuple[Tensor, Tensor]:
    return _append_attend(*args[:8], int(args[7]), *_defaulted(args[8:], 15))


def _defaulted(args: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """The arguments behind the packed length with those that the dispatcher left out.

    It leaves out the last ones of return_lse, value_bits, value_scale and value_bias.
    """
    missing = count - len(args)
    return args + (False, None, None, None)[4 - missing :]


EAGER: dict[str, Callable[..., Any]] = {
    "prune": _prune,
    "pack_values": launch.pack_values,
    "append": _eager_append,
    "append_values": launch.append_values,
    "attend": _eager_attend,
    "append_attend": _eager_append_attend,
}
"""What ``torch.ops.spark.<name>`` calls on a GPU."""


@functools.cache
def register() -> torch.library.Library:
    """Put the kernels behind ``torch.ops.spark`` for CUDA tensors."""
    library = torch.library.Library("spark", "IMPL")
    for name, function in EAGER.items():
        library.impl(name, _on_its_device(function), "CUDA")
    return library


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton starts kernels on the current device; a tensor may be on another."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with torch.cuda.device(args[0].device):
            return function(*args)

    return call
