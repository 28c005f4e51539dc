"""In a compiled prefill a layer's dense keys and values die before the next one's are stored."""

from __future__ import annotations

import re

import torch
from compiled import compiled
from decoders import decoder, prompt
from torch._inductor.utils import run_and_get_code

KEYS_AND_VALUES = re.compile(r"spark\.build\.default\(([^\[]*), \[")


def test_the_code_of_a_prefill_drops_what_it_has_stored() -> None:
    model = decoder("sdpa_causal", layers=2, dim=32)
    spark = compiled(model, key_ratio=0.5, inner="inductor")
    with torch.no_grad():
        _, codes = run_and_get_code(spark, prompt(50), None)
    (code,) = (code for code in codes if "spark.build" in code)
    stored = list(KEYS_AND_VALUES.finditer(code))
    assert len(stored) == 2
    ends = [match.start() for match in stored[1:]] + [len(code)]
    for match, end in zip(stored, ends, strict=True):
        for buffer in re.findall(r"\bbuf\d+\b", match[1]):
            assert f"del {buffer}\n" in code[match.end() : end].replace("  # reuse", ""), buffer
