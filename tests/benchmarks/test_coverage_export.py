"""The architectures of ``test_coverage.py``, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BOTH, EAGER, LEFT_ALONE

import spark_compile
from benchmarks.coverage_models import tiny_model
from spark_compile.exported.decoder import ExportError

CAPACITY, PROMPT, NEW = 120, 60, 40
ONE_LENGTH = "torch cannot export the prefill"
CANNOT = {
    # Positions or masks cut at the number of tokens, which is a tensor.
    **dict.fromkeys(("biogpt", "mpt", "roformer"), ONE_LENGTH),
    # States of linear attention, computed by code that goes by the length.
    **dict.fromkeys(("falcon_h1", "jamba", "qwen3_next", "recurrent_gemma", "zamba2"), ONE_LENGTH),
    # transformers' own static cache of it is wrong: the mask is cut by the capacity.
    "gpt_neo": "do not predict what the model does",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*BOTH, *EAGER}))
@pytest.mark.filterwarnings("ignore::spark_compile.SparkWarning")
def test_an_architecture_exported(name: str, tmp_path: Path) -> None:
    """The same tokens as the backend's, exactly and pruned, or a reason."""
    model = tiny_model(name, "eager" if name in EAGER else "sdpa", least_layers=1)
    ids = torch.randint(3, 90, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    if name in CANNOT:
        with pytest.raises(ExportError, match=CANNOT[name]):
            spark_compile.export(model, tmp_path / "out", max_tokens=CAPACITY, key_ratio=0)
        return
    generate = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}
    for ratio in (0.0, 0.5):
        options: dict[str, Any] = {"key_ratio": ratio, "sink_tokens": 0}
        folder = tmp_path / str(ratio)
        manifest = spark_compile.export(model, folder, max_tokens=CAPACITY, **options)
        assert all(g.rewritten for g in manifest.reported().graphs) == (name not in LEFT_ALONE)
        found = spark_compile.load(folder, inner="eager").generate(ids, **generate)
        torch._dynamo.reset()
        compiled = spark_compile.optimize(model, inner="eager", **options)
        assert torch.equal(found, compiled.generate(ids, **generate))
