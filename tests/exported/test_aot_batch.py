"""Packages of more than one sequence, in half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import tiny

import spark_compile
from spark_compile.exported import aot
from spark_compile.exported.model import ExportedCache, ExportedModel
from spark_compile.exported.verify import MOST_KL

CAPACITY, PROMPT, STEPS, PADDING = 200, 70, 40, 9
QUANTIZED = "quantized(bits=4)"


def _logits(model: ExportedModel, ids: torch.Tensor) -> torch.Tensor:
    """What follows each token from the prompt's last one on, of ids [B, S] given one by one."""
    cache = ExportedCache(model.manifest)
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    found = []
    for start, end in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, ids.shape[1]))]:
        output = model(ids[:, start:end], mask[:, :end], last=True, cache=cache)
        found.append(output.logits)
    return torch.cat(found, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "batch", "options"),
    [
        (torch.bfloat16, 2, {"key_ratio": 0.5}),
        (torch.float16, 3, {"key_format": QUANTIZED, "value_format": QUANTIZED}),
    ],
)
def test_packages_predict_what_the_programs_do(
    dtype: torch.dtype, batch: int, options: dict[str, Any], tmp_path: Path
) -> None:
    """For sequences of which one is padded; as the check of an export measures it."""
    model = tiny("llama", "sdpa", layers=1).to(dtype)
    manifest = spark_compile.export(
        model, tmp_path / "out", max_tokens=CAPACITY, batch=batch, aot=True, check=False, **options
    )
    assert all(graph.rewritten for graph in manifest.reported().graphs)
    assert (manifest.dtype, manifest.batch) == (str(dtype).removeprefix("torch."), batch)
    ids = torch.randint(2, 90, (batch, PROMPT + STEPS), generator=torch.Generator().manual_seed(5))
    loaded = spark_compile.load(tmp_path / "out")
    found = _logits(loaded, ids)
    assert {type(package) for package in loaded._runners.values()} == {aot.Package}
    wanted = _logits(spark_compile.load(tmp_path / "out", inner="eager"), ids)
    assert found.shape == (batch, STEPS + 1, model.config.vocab_size)
    found, wanted = (logits.double().log_softmax(-1) for logits in (found, wanted))
    assert float((wanted.exp() * (wanted - found)).sum(-1).mean()) < MOST_KL
