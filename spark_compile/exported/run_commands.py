"""``spark-optimize run`` and ``serve``: an exported folder at work."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer
from rich.console import Console

from ..cli_options import fail, first_line
from ..report import SparkError
from .telling import Folder, as_size, shown_warnings

Inner = Annotated[
    str, typer.Option(help="inductor compiles first, eager runs operator by operator.")
]


def run(
    folder: Folder,
    prompt: Annotated[str, typer.Option(help="What the model gets; - reads the standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 256,
    raw: Annotated[
        bool, typer.Option(help="Give the prompt as it is, without the model's chat template.")
    ] = False,
    greedy: Annotated[
        bool,
        typer.Option(help="Take the most probable token, whatever the config says."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    inner: Inner = "inductor",
) -> None:
    """Generate text with an exported folder, as its generation config says."""
    text = sys.stdin.read() if prompt == "-" else prompt
    from .load import load
    from .streaming import TimedStreamer, prompt_tokens, room_after

    try:
        with shown_warnings(quiet=False):
            start_s = time.perf_counter()
            model = load(folder, inner=inner)
            tokenizer, ids = prompt_tokens(model, text, raw=raw)
            model.prepare()
            import torch

            torch.manual_seed(seed)
            ready_s = time.perf_counter() - start_s
            streamer = TimedStreamer(tokenizer)
            sampling: dict[str, Any] = {"do_sample": False} if greedy else {}
            new = min(max_new_tokens, room_after(model, ids))
            model.generate(ids, max_new_tokens=new, streamer=streamer, **sampling)
    except (SparkError, ValueError, OSError) as error:
        fail(first_line(error, 600))
    share = model.manifest.state_bytes / model.manifest.dense_bytes
    Console(stderr=True).print(
        f"{ids.shape[1]} tokens in, {streamer.tokens} out: graphs ready after {ready_s:.1f} s, "
        f"first token {streamer.first_s:.2f} s later, then {streamer.rate:.1f} tokens/s; the cache "
        f"takes {as_size(model.manifest.state_bytes)}, {share:.0%} of a dense one",
        markup=False, highlight=False,
    )  # fmt: skip


def serve(
    folder: Folder,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    inner: Inner = "inductor",
) -> None:
    """Answer OpenAI's /v1/completions and /v1/chat/completions with an exported folder."""
    try:
        import uvicorn

        from .serve import app_for
    except ImportError as error:
        fail(f"{error}: install it by pip install 'spark-compile[serve]'")
    from .load import load
    from .streaming import tokenizer_of

    try:
        with shown_warnings(quiet=False):
            model = load(folder, inner=inner)
            if model.manifest.batch != 1:
                fail(f"{folder} is of batch {model.manifest.batch}: allowed is 1")
            app = app_for(model.prepare(), tokenizer_of(model), folder.resolve().name)
    except SparkError as error:
        fail(first_line(error, 600))
    uvicorn.run(app, host=host, port=port, log_level="info", timeout_graceful_shutdown=5)
