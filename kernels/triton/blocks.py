"""Block shapes of the kernels, by head sizes, dtype and rows of queries.

Chosen so that no kernel spills on sm_80, sm_90, gfx90a or gfx942 (``tests/kernels`` compiles all
of them), with blocks as large as that allows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Programs that attention is shared out to: what the largest GPUs run at once.
_PROGRAMS = 528
_MOST_SPLITS = 128
_DENSE_TOKENS = 128
"""That a program shares out of the dense rows, at least."""


class Blocks(NamedTuple):
    """Block sizes of ``attend_split`` and how it is run."""

    rows: int
    tokens: int
    dim: int
    value_dim: int
    warps: int
    stages: int


def padded(size: int) -> int:
    """The power of two, of at least one 32-bit word of a plane, that holds ``size`` channels."""
    return max(32, 1 << (size - 1).bit_length())


def fits(dim: int, value_dim: int, dtype: torch.dtype) -> bool:
    """Whether ``attend_split`` has blocks for these head sizes: the queries stay in registers."""
    return max(padded(dim), padded(value_dim)) <= (128 if dtype == torch.float32 else 256)


def attend_blocks(
    dim: int, value_dim: int, dtype: torch.dtype, group: int, one_query: bool, amd: bool,
    pruned: bool, fine: bool,
) -> Blocks:  # fmt: skip
    """Blocks of ``attend_split``.

    Of ``pruned`` tokens 16 at a time: with more, what is known of every channel of every token no
    longer fits into registers. AMD keeps predicates in scalar registers, of which more rows or more
    warps (which share out a row's channels less) need too many. Of ``fine`` tokens, whose levels
    have 8 bits and amplitudes, 16 at a time where the registers are few for 32.
    """
    block_d, block_v = padded(dim), padded(value_dim)
    row_bytes = max(block_d, block_v) * dtype.itemsize
    half = dtype != torch.float32
    if not pruned and half:
        few = (one_query and group <= 16) or (fine and (amd or row_bytes <= 128))
        tokens = 16 if fine and (amd or row_bytes <= 256) else 32
        return Blocks(16 if few else 32, tokens, block_d, block_v, 4 if row_bytes <= 256 else 8, 3)
    many = not amd and half and row_bytes <= 256 and not (one_query and group <= 16)
    short_words = dim % 32 or value_dim % 32  # of which a plane has more
    warps = 8 if not amd and (many or row_bytes > 256 or short_words) else 4
    rows = (64 if row_bytes <= 128 else 32) if many else 16
    return Blocks(rows, 16, block_d, block_v, warps, 1)


def pack_blocks(dim: int) -> tuple[int, int]:
    """Rows and channels of a block of ``pack_rows`` and ``append_rows``."""
    return max(1, 1024 // padded(dim)), padded(dim)


def splits(programs: int, packed: int, dense: int, block: int) -> tuple[int, int]:
    """Shares of the packed tokens, and of the dense ones, for ``programs`` blocks of rows.

    Works on symbols without a guard, which a dimension of size 1 would make.
    """
    wanted = torch.sym_min(-(-_PROGRAMS // programs), _MOST_SPLITS)
    of_packed: int = torch.sym_max(torch.sym_min(wanted, -(-packed // block)), 1)
    of_dense: int = torch.sym_max(torch.sym_min(wanted, dense // _DENSE_TOKENS), 1)
    return of_packed, of_dense
