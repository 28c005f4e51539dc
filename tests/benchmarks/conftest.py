"""``benchmarks`` is no part of the installed package: it is imported from the repository root."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
