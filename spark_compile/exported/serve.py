"""An exported folder as an endpoint that clients of OpenAI's API talk to."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .decoder import ExportError
from .jobs import END, Job
from .model import ExportedModel
from .streaming import encoded, room_after

MOST_BODY_BYTES = 1 << 20
MOST_WAITING = 16
"""Requests that wait for their turn; the graphs do one at a time."""


class _Asked(BaseModel):
    """What both kinds of request may say; other fields are ignored, unless they change the result
    in a way that is not done here.
    """

    model_config = ConfigDict(extra="allow")
    model: str = ""
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    stop: str | list[str] | None = None
    stream: bool = False
    n: Literal[1, None] = None


class CompletionRequest(_Asked):
    """Of ``/v1/completions``."""

    prompt: str


class Message(BaseModel):
    """One of a chat."""

    role: str
    content: str


class ChatRequest(_Asked):
    """Of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)


class RequestError(ValueError):
    """A request that cannot be answered."""


UNKNOWN = (
    "best_of", "echo", "functions", "logit_bias", "logprobs", "suffix", "tools", "top_logprobs",
)  # fmt: skip


def app_for(model: ExportedModel, tokenizer: Any, name: str) -> FastAPI:
    """The endpoint's application.

    Args:
        model: of a batch of 1.
        name: of the model, as clients see it.
    """
    app = FastAPI(title=name, docs_url=None, redoc_url=None, openapi_url=None)
    engine = _Engine(model, tokenizer, name)

    @app.middleware("http")
    async def limit_body(request: Request, call_next: Any) -> Any:
        length = request.headers.get("content-length", "")
        if request.method == "POST" and not (length.isdigit() and int(length) <= MOST_BODY_BYTES):
            size = f"{length} bytes" if length else "of unknown size"
            return _error(413, f"the body is {size}: allowed are {MOST_BODY_BYTES} bytes")
        return await call_next(request)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return _error(400, f"{where}: {first['msg']}")

    @app.exception_handler(ExportError)  # of the prompt
    @app.exception_handler(RequestError)
    async def refused(_request: Request, error: Exception) -> JSONResponse:
        return _error(400, str(error))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {
            "id": name,
            "object": "model",
            "created": engine.since,
            "owned_by": "spark-compile",
        }
        return {"object": "list", "data": [entry]}

    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest) -> Any:
        ids = encoded(tokenizer, asked.prompt)
        return await engine.answer(asked, ids, "text_completion")

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest) -> Any:
        if not tokenizer.chat_template:
            raise RequestError("the model has no chat template: allowed is /v1/completions")
        messages = [message.model_dump() for message in asked.messages]
        try:
            ids = encoded(tokenizer, messages)
        except Exception as error:  # whatever the template raises about roles and their order
            raise RequestError(f"messages: {error}") from error
        return await engine.answer(asked, ids, "chat.completion")

    return app


def _error(status: int, message: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": None}}, status)


class _Engine:
    """Generates for one request after another."""

    def __init__(self, model: ExportedModel, tokenizer: Any, name: str) -> None:
        self._model, self._tokenizer, self._name = model, tokenizer, name
        self._turn = asyncio.Lock()
        self._waiting = 0
        self.since = int(time.time())

    async def answer(self, asked: _Asked, ids: Tensor, kind: str) -> Any:
        """The response to a request with a prompt of ids [1, S]."""
        keywords = self._keywords(asked, ids)
        if self._waiting >= MOST_WAITING:
            return _error(503, f"{self._waiting} requests wait already: try again later")
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self._name,
        }
        stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        stops = [stop for stop in stops if stop]
        job = Job(self._model, self._tokenizer, ids, stops, asked.seed, keywords)
        if asked.stream:
            return StreamingResponse(self._events(job, head), media_type="text/event-stream")
        pieces = [piece async for piece in self._pieces(job)]
        choice: dict[str, Any] = {"index": 0, "finish_reason": job.reason, "logprobs": None}
        if kind == "chat.completion":
            choice["message"] = {"role": "assistant", "content": "".join(pieces)}
        else:
            choice["text"] = "".join(pieces)
        usage = {"prompt_tokens": ids.shape[1], "completion_tokens": job.count}
        usage["total_tokens"] = sum(usage.values())
        return {**head, "choices": [choice], "usage": usage}

    def _keywords(self, asked: _Asked, ids: Tensor) -> dict[str, Any]:
        """Arguments of ``generate``."""
        for field in UNKNOWN:
            if (asked.model_extra or {}).get(field):
                raise RequestError(f"{field} is set: allowed is to leave it out")
        room = room_after(self._model, ids)
        wanted = asked.max_completion_tokens or asked.max_tokens or room
        keywords: dict[str, Any] = {"max_new_tokens": min(wanted, room)}
        if asked.temperature == 0:
            keywords["do_sample"] = False
        elif asked.temperature is not None or asked.top_p is not None:
            keywords["do_sample"] = True
            keywords["temperature"] = 1.0 if asked.temperature is None else asked.temperature
            keywords["top_p"] = 1.0 if asked.top_p is None else asked.top_p
        return keywords

    async def _pieces(self, job: Job) -> AsyncIterator[str]:
        """The text as it comes; whoever stops asking ends the generation."""
        self._waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1
        loop = asyncio.get_running_loop()
        # By the thread itself: a client that leaves cancels whatever is awaited here.
        job.start(lambda: loop.call_soon_threadsafe(self._turn.release))
        try:
            while (piece := await asyncio.to_thread(job.next_piece)) is not END:
                yield piece
        finally:
            job.cancelled.set()

    async def _events(self, job: Job, head: dict[str, Any]) -> AsyncIterator[str]:
        """Server-sent events of a streamed response."""
        is_chat = head["object"] == "chat.completion"
        head = {**head, "object": "chat.completion.chunk" if is_chat else "text_completion"}

        def event(text: str | None, reason: str | None) -> str:
            choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
            if is_chat:
                choice["delta"] = {} if text is None else {"role": "assistant", "content": text}
            else:
                choice["text"] = text or ""
            return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"

        async for piece in self._pieces(job):
            yield event(piece, None)
        yield event(None, job.reason)
        yield "data: [DONE]\n\n"
