"""Storing keys and values: pruning what is cached, appending one new token."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from spark_compile import ops
from spark_compile.kernels.layout import kept_channels

from .attend_case import DENSE_ROWS, SPARE_ROWS, STORED, Case, Stored
from .measure import Contender, available_bytes

COPY, CAT, IN_PLACE = "copy keys", "DynamicCache: cat", "StaticCache: index_copy_"
PACK_VALUES = "pack values to int8"


def prune_contenders(case: Case, rotate_bytes: int) -> list[Contender]:
    """Ways to prune all keys of a case, and a plain copy of them for comparison."""
    keys = [case.filled(case.key) for _ in range(_layers(case, rotate_bytes))]
    per_token = {stored.name: case.pruned(stored) for stored in STORED}
    contenders = [Contender(COPY, [key.clone for key in keys], 2 * keys[0].nbytes)]
    for stored in STORED:
        if stored.key_ratio and stored.int8_values == stored.int8_keys:
            written = sum(_nbytes(rows, case.tokens) for rows in per_token[stored.name])
            calls = [functools.partial(_prune, key, case.norms, stored) for key in keys]
            contenders.append(Contender(stored.name, calls, keys[0].nbytes + written))
    head_dim = case.shape.head_dim
    values = ops.pack_values(case.value, None, head_dim, True)
    written = sum(_nbytes(rows, case.tokens) for rows in values)
    pack = [functools.partial(ops.pack_values, key, None, head_dim, True) for key in keys]
    contenders.append(Contender(PACK_VALUES, pack, keys[0].nbytes + written))
    return contenders


def append_contenders(case: Case, rotate_bytes: int) -> list[Contender]:
    """Ways to append the key and the value of one token to a cache."""
    buffers = [
        (case.filled(case.key, spare=SPARE_ROWS), case.filled(case.value, spare=SPARE_ROWS))
        for _ in range(_layers(case, rotate_bytes))
    ]
    new = case.key[:, :, :1].contiguous(), case.value[:, :, :1].contiguous()
    past_bytes, new_bytes = _nbytes(buffers[0][0], 2 * case.tokens), 2 * new[0].nbytes
    pasts = [tuple(rows[:, :, : case.tokens] for rows in pair) for pair in buffers]
    contenders = [
        Contender(CAT, [functools.partial(_cat, p, new) for p in pasts], 2 * past_bytes),
        Contender(
            IN_PLACE,
            [functools.partial(_index_copy, b, new, torch.tensor([case.tokens])) for b in buffers],
            2 * new_bytes,
        ),
    ]
    for stored in (Stored(0.8), Stored(0.8, int8_keys=True, int8_values=True)):
        calls = [_append_call(case, stored, values, new) for _, values in buffers]
        written = new[0].nbytes + _nbytes(_value_rows(case, stored)[0], 1)
        contenders.append(Contender(stored.name, calls, new_bytes + written))
    return contenders


def _layers(case: Case, rotate_bytes: int) -> int:
    dense_bytes = 2 * _nbytes(case.key, case.tokens)
    # A pass over a few hundred layers is enough: with short contexts the rest is call overhead.
    return max(1, min(-(-rotate_bytes // dense_bytes), available_bytes() // 4 // dense_bytes, 512))


def _nbytes(rows: Tensor, tokens: int) -> int:
    """Bytes of ``tokens`` rows of this kind."""
    return rows.nbytes // rows.shape[2] * tokens


def _prune(key: Tensor, norms: Tensor, stored: Stored) -> object:
    kept = kept_channels(key.shape[3], stored.key_ratio)
    return ops.prune(key, norms, norms, kept, "degenerate", "squared", stored.int8_keys)


def _cat(past: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> object:
    return [torch.cat(pair, dim=2) for pair in zip(past, new, strict=True)]


def _index_copy(buffers: tuple[Tensor, ...], new: tuple[Tensor, ...], position: Tensor) -> None:
    for rows, row in zip(buffers, new, strict=True):
        rows.index_copy_(2, position, row)


def _value_rows(case: Case, stored: Stored) -> tuple[Tensor, Tensor | None]:
    """Drawn values and their steps as they are stored."""
    if not stored.int8_values:
        return case.value, None
    rows, _, scale = ops.pack_values(case.value, None, case.shape.head_dim, True)
    return rows, scale


def _append_call(case: Case, stored: Stored, dense_values: Tensor, new: tuple[Tensor, ...]):  # type: ignore[no-untyped-def]
    """Append to the tail and to the values, as the fused append-and-attend operator does."""
    tail = case.filled(case.key, DENSE_ROWS, SPARE_ROWS)
    rows, scale = _value_rows(case, stored)
    values = dense_values
    if scale is not None:
        values, scale = (case.filled(t, spare=SPARE_ROWS) for t in (rows, scale))
    packed = torch.tensor(case.tokens - DENSE_ROWS)

    def append() -> None:
        ops.append(tail, new[0], case.tokens, packed)
        ops.append_values(values, None, scale, None, new[1], case.tokens)

    return append
