"""The group of ranks that a cache is spread over: what is left of it in options and in graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .report import OptionError, wrong_option

if TYPE_CHECKING:
    from .config import SparkConfig


@dataclass(frozen=True)
class Group:
    """A process group, as one of its ranks sees it; can be copied and pickled."""

    name: str
    """By which collectives find it in this process."""
    ranks: int
    rank: int

    @property
    def place(self) -> tuple[int, int]:
        """Number of ranks, and which one this is."""
        return self.ranks, self.rank


def group_of(config: SparkConfig) -> Group | None:
    """The group that the option ``context_parallel`` names; None for no group, and for one rank.

    Raises:
        OptionError: it is something else, a mesh of several dimensions, or without this rank; or
            another option is about tokens that no rank has all of.
    """
    given: object = config.context_parallel
    if given is None:
        return None
    for name in ("evict", "min_tokens"):
        if getattr(config, name):
            raise OptionError(
                f"options 'context_parallel' and {name!r} are both given: allowed is one of them"
            )
    if isinstance(given, Group):
        return given
    allowed = "a process group that this rank is in, or a DeviceMesh of one dimension"
    group = given.get_group() if isinstance(given, DeviceMesh) and given.ndim == 1 else given
    if not isinstance(group, dist.ProcessGroup):
        raise wrong_option("context_parallel", given, allowed)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if rank < 0:
        raise wrong_option("context_parallel", given, allowed)
    return Group(group.group_name, ranks, rank) if ranks > 1 else None
