"""Counting what a cache really stores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .state import SparkTensor
from .torch_private import storage_identity


def kv_bytes(cache: object) -> int:
    """Every byte that a key/value cache stores, in whatever form.

    Args:
        cache: a transformers cache, a tensor, or any nesting of sequences, mappings and objects
            with such attributes. Dense tensors count with their whole storage, compressed ones
            with pages, slack, heads and tails; shared storage counts once.

    Raises:
        TypeError: ``cache`` is something that holds no tensors, such as a number or a string.
    """
    if not isinstance(cache, Tensor | Sequence | Mapping) and not hasattr(cache, "__dict__"):
        raise TypeError(f"cannot count the bytes of {cache!r}: allowed is a cache or tensors")
    if isinstance(cache, str | bytes | torch.nn.Module) or callable(cache):
        raise TypeError(f"cannot count the bytes of {cache!r}: allowed is a cache or tensors")
    storages: dict[int, int] = {}
    for tensor in _tensors(cache, set()):
        storages[storage_identity(tensor)] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def _tensors(value: object, seen: set[int]) -> Iterator[Tensor]:
    """The plain tensors below a value, each object once."""
    if id(value) in seen or isinstance(value, str | bytes | type | torch.nn.Module):
        return
    seen.add(id(value))
    if isinstance(value, SparkTensor):
        yield from (value.pages, value.head)  # not stored(): what it copies does not stay
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _tensors(item, seen)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value), seen)
