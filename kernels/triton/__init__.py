"""Triton kernels for NVIDIA and AMD GPUs, from one source.

``fields``, ``bits``, ``codes`` and ``parts`` read what is stored, for the kernels of ``attend``,
``pack`` and ``head``; ``merge`` puts shares of an attention together, ``quantize`` encodes.
``sides`` checks a side of a cache and says where its fields lie, ``blocks`` chooses block shapes,
``launch`` starts the kernels, and ``ops`` makes operators of them:
``torch.ops.spark_triton.<name>``, which Inductor and functionalization see through, and the CUDA
implementations of ``torch.ops.spark.<name>``.

Triton is imported only when the kernels are asked for: there is no wheel of it on some platforms.
"""

from __future__ import annotations

import importlib.util

import torch


def available() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def load() -> bool:
    """Register the kernels for CUDA (and ROCm, which torch calls CUDA); False without a GPU."""
    if not (available() and torch.cuda.is_available()):
        return False
    from . import ops

    ops.register()
    return True
