"""The cache by its new name, and by the one that it had before."""

from __future__ import annotations

import logging
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from zoo import CACHE, tiny

from spark_compile import explain
from spark_compile.transformers_names import cache_argument, returned_cache


def test_the_argument_is_named_as_the_model_names_it() -> None:
    def old(input_ids: object, past_key_values: object = None, **kwargs: object) -> None: ...

    def new(input_ids: object, cache: object = None, **kwargs: object) -> None: ...

    assert cache_argument(old) == "past_key_values"
    assert cache_argument(new) == "cache"


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_is_found_in_an_output(name: str) -> None:
    assert returned_cache(SimpleNamespace(**{name: 1})) == 1
    assert returned_cache(SimpleNamespace(logits=0)) is None


def test_no_old_name_is_used(caplog: Any) -> None:
    """transformers warns of it, once in a process and by a logger of its own."""
    model, ids = tiny("llama", "sdpa"), torch.randint(1, 90, (1, 13))
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    transformers.utils.logging.warning_once.cache_clear()
    try:
        with warnings.catch_warnings(action="error", category=FutureWarning):
            report = explain(model, {"input_ids": ids}, window=4)
            with torch.no_grad():
                output = model(ids)
                model(ids[:, :1], **{CACHE: returned_cache(output)})
    finally:
        logger.removeHandler(caplog.handler)
    assert [graph.phase for graph in report.graphs] == ["prefill", "decode"]
    said = [record.getMessage() for record in caplog.records if record.name.startswith("transf")]
    assert not [message for message in said if "deprecated" in message]
