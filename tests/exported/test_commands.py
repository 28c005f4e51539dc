"""The command line of exported graphs, and its endpoint with the real client."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from transformers import TextStreamer, pipeline
from typer.testing import CliRunner
from zoo import tiny

import spark_compile
from spark_compile.cli import app
from spark_compile.exported.serve import MOST_BODY_BYTES, app_for
from spark_compile.exported.streaming import tokenizer_of

RUNNER = CliRunner(env={"COLUMNS": "200"})
PROMPT = "w7 w8 w9 w10"


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return spark_compile.load(folder, inner="eager")


def _wanted(text: str, new: int) -> str:
    """What the model itself answers to words."""
    ids = torch.tensor([[int(word[1:]) for word in text.split()]])
    found = tiny("llama", "sdpa").generate(ids, max_new_tokens=new, do_sample=False)
    return " ".join(f"w{token}" for token in found[0, ids.shape[1] :].tolist())


def test_run_streams_what_the_model_says(folder: Path) -> None:
    words = ["run", str(folder), "--prompt", PROMPT, "--raw", "--greedy", "--inner", "eager"]
    result = RUNNER.invoke(app, [*words, "--max-new-tokens", "9"])
    assert result.exit_code == 0, result.output
    assert _wanted(PROMPT, 9) in result.output
    assert "4 tokens in, 9 out: graphs ready after" in result.output


def test_run_fills_the_chat_template(folder: Path) -> None:
    words = ["run", str(folder), "--prompt", "-", "--greedy", "--inner", "eager"]
    result = RUNNER.invoke(app, [*words, "--max-new-tokens", "9"], input=PROMPT)
    assert _wanted(f"w2 {PROMPT} w5", 9) in result.output


def test_run_refuses_a_prompt_that_is_too_long(folder: Path) -> None:
    result = RUNNER.invoke(app, ["run", str(folder), "--prompt", "w3 " * 200, "--raw"])
    assert result.exit_code == 2
    assert "the prompt has 200 tokens: allowed are 1 to 199" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere:make", "-o", "out"], "model 'nowhere:make' cannot be imported"),
        (["collections:OrderedDict", "-o", "out"], "makes a OrderedDict: allowed is an nn.Module"),
        (["no/such/folder", "-o", "out"], "does not exist: allowed is"),
        (["a", "-o", "out", "--dtype", "int3"], "option 'dtype' is 'int3': allowed is"),
        (["a", "-o", "out", "--key-ratio", "3"], "option 'key_ratio' is 3.0"),
    ],
)
def test_wrong_words(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = RUNNER.invoke(app, words)
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


def test_a_word_that_is_no_command_is_still_an_error() -> None:
    result = RUNNER.invoke(app, ["exprot", "x"])
    assert result.exit_code == 2
    assert "No such command 'exprot'" in result.output


@pytest.fixture(scope="module")
def client(loaded: Any) -> Iterator[openai.OpenAI]:
    """A client of a server at a free port of this machine."""
    web = app_for(loaded, tokenizer_of(loaded), "tiny")
    server = uvicorn.Server(uvicorn.Config(web, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def test_completions(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "prompt": PROMPT, "temperature": 0.0, "max_tokens": 9}
    answer = client.completions.create(**asked)
    assert answer.choices[0].text.split() == _wanted(PROMPT, 9).split()
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 9)
    streamed = list(client.completions.create(stream=True, **asked))
    assert "".join(part.choices[0].text for part in streamed) == answer.choices[0].text
    assert streamed[-1].choices[0].finish_reason == "length"


def test_chat_and_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    messages: Any = [{"role": "w3", "content": PROMPT}]
    asked = {"model": "tiny", "messages": messages, "temperature": 0.0, "max_tokens": 9}
    answer = client.chat.completions.create(**asked)
    wanted = _wanted(f"w3 {PROMPT} w5", 9)
    assert (answer.choices[0].message.content or "").split() == wanted.split()
    streamed = client.chat.completions.create(stream=True, **asked)
    parts = [part.choices[0].delta.content or "" for part in streamed]
    assert "".join(parts).split() == wanted.split()


def test_stop_texts_end_the_answer(client: openai.OpenAI) -> None:
    words = _wanted(PROMPT, 9).split()
    stop = next(word for word in words[3:] if word not in words[:3])
    asked = {"model": "tiny", "prompt": PROMPT, "temperature": 0.0, "max_tokens": 9}
    for stream in (False, True):
        answer: Any = client.completions.create(stream=stream, stop=[stop], **asked)
        parts = list(answer) if stream else [answer]
        text = "".join(part.choices[0].text for part in parts)
        assert text.split() == words[: words.index(stop)]
        assert parts[-1].choices[0].finish_reason == "stop"


def test_seeds_and_several_at_once(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "prompt": PROMPT, "temperature": 1.5, "max_tokens": 12, "seed": 4}
    found: list[str] = []

    def ask() -> None:
        found.append(client.completions.create(**asked).choices[0].text)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1


def test_a_client_that_leaves_frees_the_model(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=190, stream=True)
    next(iter(stream))
    stream.close()
    asked = {"model": "tiny", "prompt": PROMPT, "temperature": 0.0, "max_tokens": 3}
    assert client.completions.create(**asked, timeout=60).choices[0].text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": PROMPT, "n": 2}, "n: "),
        ({"prompt": PROMPT, "max_tokens": 0}, "max_tokens: Input should be greater"),
        ({"prompt": PROMPT, "temperature": -1}, "temperature: "),
        ({"prompt": PROMPT, "logprobs": 3}, "logprobs is set: allowed is to leave it out"),
        ({"prompt": "w3 " * 200}, "the prompt has 200 tokens: allowed are 1 to 199"),
        ({"prompt": ""}, "the prompt has 0 tokens"),
        ({}, "prompt: Field required"),
    ],
)
def test_wrong_requests(loaded: Any, body: dict[str, Any], message: str) -> None:
    web = TestClient(app_for(loaded, tokenizer_of(loaded), "tiny"))
    answer = web.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_bodies_are_limited(loaded: Any) -> None:
    web = TestClient(app_for(loaded, tokenizer_of(loaded), "tiny"))
    body = json.dumps({"prompt": "w3" * MOST_BODY_BYTES})
    assert web.post("/v1/completions", content=body).status_code == 413
    chunks = (part for part in [b"{}", b" "])  # of unknown length
    assert web.post("/v1/completions", content=chunks).status_code == 413


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What transformers logs, which it keeps from the loggers above its own."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_pipelines_and_streamers_take_it(
    loaded: Any, capsys: pytest.CaptureFixture[str], logged: pytest.LogCaptureFixture
) -> None:
    tokenizer = tokenizer_of(loaded)
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False}
    pipe = pipeline("text-generation", model=loaded, tokenizer=tokenizer)
    said = pipe(PROMPT, return_full_text=False, **options)[0]["generated_text"]
    assert said.split() == _wanted(PROMPT, 9).split()
    assert logged.messages == []
    ids = torch.tensor([[7, 8, 9, 10]])
    loaded.generate(ids, streamer=TextStreamer(tokenizer, skip_prompt=True), **options)
    assert capsys.readouterr().out.split() == _wanted(PROMPT, 9).split()
