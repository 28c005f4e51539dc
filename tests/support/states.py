"""Compressed states made from random keys and values, as a prefill graph makes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spark_compile import PrunedKeys, SparkConfig, StoredValues
from spark_compile.cache import new_keys, new_values
from spark_compile.kernels.layout import kept_channels
from spark_compile.kernels.reference.prune import prune, query_stats, recover
from spark_compile.passes.insert_spark import store_keys, store_values
from spark_compile.state import SparkTensor

_NAMES = ("kept", "bits", "scale", "norms", "stats", "tail")
BATCH, HEADS, KEY_DIM, VALUE_DIM = 2, 3, 12, 10


@dataclass(frozen=True)
class Prefill:
    """Dense tensors and the two states that were made from them."""

    query: Tensor
    key: Tensor
    value: Tensor
    keys: PrunedKeys
    values: StoredValues


def prefill(
    config: SparkConfig, length: int = 21, batch: int = BATCH, dtype: torch.dtype = torch.float32
) -> Prefill:
    """States of ``length`` random tokens; two query heads share a key head."""
    query = torch.randn(batch, 2 * HEADS, length, KEY_DIM, dtype=dtype)
    key, value = tokens(length, batch, dtype)
    stored = dict(
        zip(_NAMES, store_keys(key, query_stats(query, HEADS, config.window), config), strict=True)
    )
    keys = new_keys(stored, length, config)
    values = new_values(store_values(value, config), length, config)
    return Prefill(query, key, value, keys, values)


def tokens(
    count: int, batch: int = BATCH, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Random keys and values of ``count`` tokens."""
    key = torch.randn(batch, HEADS, count, KEY_DIM, dtype=dtype)
    return key, torch.randn(batch, HEADS, count, VALUE_DIM, dtype=dtype)


def pruned_and_recovered(key: Tensor, select: Tensor, norms: Tensor, config: SparkConfig) -> Tensor:
    """Keys [B, Hkv, S, D] after the reference's pruning and recovery."""
    how = (config.recovery, config.saliency)
    stored = prune(key, select, norms, kept_channels(key.shape[3], config.key_ratio), *how)
    return recover(*stored, norms, *how).to(key.dtype)


def expected_keys(made: Prefill, config: SparkConfig) -> Tensor:
    """What the keys of a prefill are worth: dense sinks, recovered middle, dense recent tokens."""
    first = config.sink_tokens
    behind = first + config.packed_length(made.key.shape[2])
    norms = query_stats(made.query, HEADS, config.window).sqrt()
    middle = pruned_and_recovered(made.key[:, :, first:behind], norms, norms, config)
    return torch.cat((made.key[:, :, :first], middle, made.key[:, :, behind:]), dim=2)


def dense(value: Tensor) -> Tensor:
    """The dense tensor of a state; a plain tensor is itself."""
    return value.dense() if isinstance(value, SparkTensor) else value
