"""The tasks: lm-eval's RULER, which needs no hub here, and its LongBench, which does.

lm-eval's LongBench has the prompts and metrics of the authors' code (github.com/THUDM/LongBench),
also its odd spellings; the data is a copy of theirs on the Hugging Face hub.
"""

from __future__ import annotations

import contextlib
import io
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import numpy as np

OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe")
OFFLINE += ("ruler_fwe",)
WITH_ESSAYS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue")
WITH_ESSAYS += ("niah_multiquery",)
RULER = (*OFFLINE, *WITH_ESSAYS)
LONGBENCH_DATA = "Xnhyacinth/LongBench"
NO_HUB = f"LongBench is left out: its data, {LONGBENCH_DATA}, is on a hub that cannot be reached."
LONGBENCH = tuple(
    f"longbench_{name}"
    for name in (
        "narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique",
        "gov_report", "qmsum", "multi_news", "trec", "triviaqa", "samsum", "passage_count",
        "passage_retrieval_en", "lcc", "repobench-p",
    )
)  # fmt: skip
"""The 16 English tasks, which the paper's averages are over."""
_SEED = 0


def ruler(names: Sequence[str], context: int, tokenizer_path: str, text: str) -> dict[str, Any]:
    """RULER's tasks at a length in tokens, by name; their samples are the same in every run.

    Args:
        tokenizer_path: folder of the tokenizer that prompts are measured with.
        text: the essays that needles are hidden in.
    """
    tasks = {}
    with _quiet(), _with_essays(text):
        manager = _manager("ruler", tokenizer=tokenizer_path, max_seq_lengths=[context])
        for name in names:
            random.seed(_SEED)
            np.random.seed(_SEED)
            # It keeps a generator of its own, which a second length would go on with.
            sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)
            tasks.update(manager.load([name])["tasks"])
    return tasks


def longbench(names: Sequence[str]) -> dict[str, Any]:
    """LongBench's tasks by name; their data is downloaded."""
    return _manager("longbench").load(list(names))["tasks"]


def _manager(folder: str, **metadata: Any) -> Any:
    """Of one folder of lm-eval's tasks: reading what all of them are takes 15 s."""
    from lm_eval import tasks  # the names of the tasks are there without it

    path = Path(tasks.__file__).parent / folder
    return tasks.TaskManager(include_path=path, include_defaults=False, metadata=metadata)


def hub_is_there() -> bool:
    """Whether LongBench's data can be asked for."""
    try:
        huggingface_hub.HfApi().dataset_info(LONGBENCH_DATA, timeout=10)
    except Exception:  # of several libraries: no network, no name, refused
        return False
    return True


@contextlib.contextmanager
def _with_essays(text: str) -> Iterator[None]:
    """lm-eval asks the hub for essays and nltk's server for where a sentence ends: give it both."""
    from lm_eval.tasks.ruler import prepare_niah
    from nltk.tokenize import PunktSentenceTokenizer

    sentences = PunktSentenceTokenizer(text)  # learns abbreviations from the text itself
    prepare_niah.get_haystack.cache_clear()
    prepare_niah.cached_sent_tokenize.cache_clear()
    with (
        mock.patch.object(prepare_niah.datasets, "load_dataset", return_value={"text": [text]}),
        mock.patch.object(prepare_niah, "sent_tokenize", sentences.tokenize),
    ):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Making samples prints progress and notes."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
