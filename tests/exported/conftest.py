"""One model and one export of it for all tests here, whatever process they run in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner
from zoo import tiny

from spark_compile.cli import app

CAPACITY = 200
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}w5"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A Llama with a tokenizer of one word per token, exported with every bit stored."""
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent
    with FileLock(root / "exported.lock"):
        return _once(root / "exported", _write)


def _once(folder: Path, write: Callable[[Path], None]) -> Path:
    if not folder.exists():
        write(folder)
    return folder


def _write(folder: Path) -> None:
    model = folder.with_name("model")
    tiny("llama", "sdpa").save_pretrained(model)
    words = {f"w{index}": index for index in range(96)}
    whole = Tokenizer(WordLevel(words, unk_token="w2"))
    whole.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="w2", eos_token="w95")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    said = [str(model), "-o", str(folder), "--max-tokens", str(CAPACITY), "--key-ratio", "0"]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, said)
    assert result.exit_code == 0, result.output
    for text in ("LlamaForCausalLM, float32", "200 tokens, batch 1", "tokens as the model, KL"):
        assert text in result.output
