"""How others store tokens, simulated: what is recovered of dense tokens, and the bytes it takes.

They are simulated favourably. Only what a packed token needs is counted, 16-bit scales and zeros
included, with no alignment and no room to grow; scales and zeros are rounded to float16, which is
more exact than the model's bfloat16.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

PAIR_BYTES = 4
"""Of a scale and a zero."""


class Codec(ABC):
    """A way to store the tokens of one side, keys or values."""

    REQUIRES: ClassVar[str] = ""
    """A package that it needs beyond those of the benchmarks."""

    @abstractmethod
    def recover(self, rows: Tensor) -> Tensor:
        """What is recovered of dense tokens [B, Hkv, n, D] float32; n is a multiple of 32."""

    @abstractmethod
    def token_bytes(self, head_dim: int) -> float:
        """Bytes of a token of one key head."""


@dataclass(frozen=True)
class PerChannel(Codec):
    """Groups of tokens, each channel for itself: the keys of KIVI (arXiv 2402.02750)."""

    bits: int
    group: int = 32

    def recover(self, rows: Tensor) -> Tensor:
        groups = rows.unflatten(2, (-1, self.group))  # [B, Hkv, n / group, group, D]
        return quantized(groups, self.bits, dim=3).flatten(2, 3)

    def token_bytes(self, head_dim: int) -> float:
        return head_dim * (self.bits / 8 + PAIR_BYTES / self.group)


@dataclass(frozen=True)
class PerToken(Codec):
    """Groups of channels, each token for itself: the values of KIVI."""

    bits: int
    group: int = 32

    def recover(self, rows: Tensor) -> Tensor:
        return quantized(rows.unflatten(3, (-1, self.group)), self.bits, dim=4).flatten(3)

    def token_bytes(self, head_dim: int) -> float:
        return head_dim * (self.bits / 8 + PAIR_BYTES / self.group)


@dataclass(frozen=True)
class Rotated(Codec):
    """Each token as a whole, after a Hadamard rotation of its channels (QuaRot, arXiv 2404.00456).

    The rotation spreads what large channels hold. D has to be a power of two.
    """

    bits: int

    def recover(self, rows: Tensor) -> Tensor:
        rotation = hadamard(rows.shape[3])
        return quantized(rows @ rotation, self.bits, dim=3) @ rotation.mT

    def token_bytes(self, head_dim: int) -> float:
        return head_dim * self.bits / 8 + PAIR_BYTES


@dataclass(frozen=True)
class Float8(Codec):
    """float8_e4m3fn with one scale for all tokens of a layer, as serving engines offer."""

    def recover(self, rows: Tensor) -> Tensor:
        scale = rows.abs().amax().clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
        return (rows / scale).to(torch.float8_e4m3fn).to(rows.dtype) * scale

    def token_bytes(self, head_dim: int) -> float:
        return float(head_dim)


@dataclass(frozen=True)
class Rounded(Codec):
    """bfloat16: what a model in bfloat16 stores of dense tokens."""

    def recover(self, rows: Tensor) -> Tensor:
        return rows.bfloat16().to(rows.dtype)

    def token_bytes(self, head_dim: int) -> float:
        return 2.0 * head_dim


@dataclass(frozen=True)
class Quanto(Codec):
    """transformers' QuantizedCache with optimum-quanto and its default groups, by its own code.

    Its other backend of this kind, hqq, has no wheel on PyPI, and pip would have to run its setup.
    """

    REQUIRES = "optimum.quanto"
    bits: int
    group: int = 64

    def recover(self, rows: Tensor) -> Tensor:
        layer = _quanto_layer(self.bits, self.group)
        recovered: Tensor = layer._dequantize(layer._quantize(rows.contiguous(), axis=0))
        return recovered

    def token_bytes(self, head_dim: int) -> float:
        return head_dim * (self.bits / 8 + PAIR_BYTES / self.group)


@functools.cache
def _quanto_layer(bits: int, group: int) -> Any:
    from transformers.cache_utils import QuantoQuantizedLayer

    return QuantoQuantizedLayer(nbits=bits, q_group_size=group)


def quantized(rows: Tensor, bits: int, dim: int) -> Tensor:
    """Rows after asymmetric quantization with one scale and zero along ``dim``."""
    low, high = rows.amin(dim, keepdim=True), rows.amax(dim, keepdim=True)
    zero = low.half().float()
    scale = ((high - zero) / (2**bits - 1)).half().float()
    levels = ((rows - zero) / scale.where(scale > 0, 1.0)).round().clamp(0, 2**bits - 1)
    return levels * scale + zero


@functools.cache
def hadamard(dim: int) -> Tensor:
    """The orthogonal, symmetric matrix [dim, dim] of Sylvester's construction.

    Raises:
        ValueError: ``dim`` is not a power of two.
    """
    if dim < 1 or dim & (dim - 1):
        raise ValueError(f"head size is {dim}: allowed with a Hadamard rotation is a power of two")
    matrix = torch.ones(1, 1)
    for _ in range(dim.bit_length() - 1):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(dim)
