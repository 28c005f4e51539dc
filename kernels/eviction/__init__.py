"""The scorers by which tokens of a prompt are evicted, one file each; ``base`` says what one is."""

from __future__ import annotations

from .base import Prompt, Scorer, parse_scorer
from .keydiff import KeyDiff
from .knorm import Knorm
from .pyramidkv import PyramidKV
from .snapkv import SnapKV
from .streaming import StreamingLLM

__all__ = [
    "KeyDiff", "Knorm", "Prompt", "PyramidKV", "Scorer", "SnapKV", "StreamingLLM", "parse_scorer",
]  # fmt: skip
