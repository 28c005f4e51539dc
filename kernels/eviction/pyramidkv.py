"""PyramidKV (arXiv 2406.02069): SnapKV, with fewer tokens the deeper the layer."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .base import Scorer, check_number
from .snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """``tokens`` is the mean over the layers; :meth:`in_layer` gives the SnapKV of one."""

    layers: int = field(kw_only=True)
    """Layers of the model."""
    beta: int = 20
    """The last layer keeps 1 / beta of the mean besides the observed tokens."""

    NAME = "pyramidkv"
    BY_LAYER = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "layers", 1)
        check_number(self, "beta", 1)
        check_number(self, "tokens", self.window)

    def in_layer(self, layer: str) -> Scorer:
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", layer)
        if number is None or not int(number[1]) < self.layers:
            raise ValueError(
                f"scorer {self.NAME!r} has to know which of {self.layers} layers {layer!r} is: "
                f"allowed is a path with a number below {self.layers}"
            )
        return SnapKV(self.share(int(number[1])), self.window, self.kernel, self.pooling)

    def share(self, layer: int) -> int:
        """Tokens that stay in a layer: they fall linearly from the first layer to the last."""
        mean = self.tokens - self.window
        least = mean // self.beta
        most = 2 * mean - least
        return self.window + most - (most - least) * layer // max(self.layers - 1, 1)
