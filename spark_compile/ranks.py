"""Ranks that share a model or a cache have to be told the same options.

Each rank compiles its own graph. Other formats on another rank would be other results without a
word, and an error on one rank alone (``strict``) would leave the others waiting for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakSet

import torch.distributed
from torch.distributed.device_mesh import DeviceMesh

from . import dynamo
from .config import SparkConfig
from .report import OptionError
from .torch_private import group_named

_compared: WeakSet[Any] = WeakSet()
"""The calls of ``torch.compile`` whose options have been compared."""


def compare_options(inputs: Sequence[Any], config: SparkConfig) -> None:
    """Compare the options with those of all ranks that have a part of the same weights or cache.

    Once for each call of ``torch.compile``, with its first graph that has such weights, or where
    the cache is spread with its first: whatever the other options are, that is the same graph on
    every rank.

    Raises:
        OptionError: on every rank, where the options differ.
    """
    groups = [group for mesh in dict.fromkeys(_meshes(inputs)) for group in mesh.get_all_groups()]
    spread_over = config.context_parallel
    if spread_over is not None:
        groups.append(group_named(spread_over.name))
    if not groups:
        return
    compiler = dynamo.compiler()
    if compiler is None or compiler in _compared:
        return
    _compared.add(compiler)
    told = {field.name: repr(getattr(config, field.name)) for field in dataclasses.fields(config)}
    # What a group is called, and which one of it this is, differs from rank to rank.
    told["context_parallel"] = f"over {1 if spread_over is None else spread_over.ranks} ranks"
    for group in groups:
        ranks = torch.distributed.get_process_group_ranks(group)
        all_told: list[Any] = [None] * len(ranks)
        torch.distributed.all_gather_object(all_told, told, group)
        if differences := list(_differences(dict(zip(ranks, all_told, strict=True)))):
            raise OptionError(
                f"the ranks of a model have been given different options: "
                f"{'; '.join(differences)}: allowed is the same on every rank"
            )


def forget() -> None:
    """Drop everything; ``torch._dynamo.reset`` calls this."""
    _compared.clear()


def _meshes(inputs: Sequence[Any]) -> Iterator[DeviceMesh]:
    for value in inputs:
        mesh = getattr(value, "device_mesh", None)  # of a DTensor
        if isinstance(mesh, DeviceMesh):
            yield mesh


def _differences(told: dict[int, dict[str, str]]) -> Iterator[str]:
    """What differs, in words, of options by rank."""
    for name in next(iter(told.values())):
        values = {rank: options[name] for rank, options in told.items()}
        if len(set(values.values())) > 1:
            by_rank = ", ".join(f"{value} on rank {rank}" for rank, value in values.items())
            yield f"{name!r} is {by_rank}"
