"""lm-eval asks an exported folder as it asks the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from zoo import tiny

import spark_compile
from spark_compile.exported.streaming import tokenizer_of

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM


def _asked(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_it_answers_what_the_model_does(folder: Path) -> None:
    loaded = spark_compile.load(folder, inner="eager")
    tokenizer = tokenizer_of(loaded)
    longer = "w7 w8 w9 w10 w11 " * 60  # than the cache, which the model itself is told
    ours, wanted = (
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=length)
        for model, length in ((loaded, None), (tiny("llama", "sdpa"), loaded.manifest.max_tokens))
    )
    ends = [("w7 w8 w9", " w10 w11"), ("w7", " w10"), (longer, " w9")]
    likelihoods = [_asked("loglikelihood", *end) for end in ends]
    rolling = [_asked("loglikelihood_rolling", longer)]
    until = [
        _asked("generate_until", text, {"until": ["w94"], "max_gen_toks": 9, "do_sample": False})
        for text in ("w7 w8 w9 w10", longer)
    ]
    found = ours.loglikelihood(likelihoods, disable_tqdm=True)
    expected = wanted.loglikelihood(likelihoods, disable_tqdm=True)
    assert [float(value) for value, _ in found] == pytest.approx([v for v, _ in expected], rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert ours.loglikelihood_rolling(rolling, disable_tqdm=True) == pytest.approx(
        wanted.loglikelihood_rolling(rolling, disable_tqdm=True), rel=1e-4
    )
    answers = ours.generate_until(until, disable_tqdm=True)
    assert answers == wanted.generate_until(until, disable_tqdm=True)
    assert all(answers)
