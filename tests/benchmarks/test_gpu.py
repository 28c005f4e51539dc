"""The GPU benchmark has nothing to run on here; what it measures is what the kernels do."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import block_shapes, sweep
from spark_compile.kernels.triton import sides


def test_the_kernels_do_every_shape_of_the_sweep() -> None:
    shapes = list(sweep())
    assert len(set(shapes)) == len(shapes)
    for shape in shapes:
        # 256 channels of float32 queries are more than registers hold.
        assert sides.can(shape.spec()), shape


def test_block_shapes_are_what_triton_takes() -> None:
    for tokens, warps, stages in block_shapes():
        assert tokens >= 16
        assert warps & (warps - 1) == 0
        assert stages >= 1
