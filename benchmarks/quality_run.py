"""Measuring the quality of one way to store a cache, on one window of text.

A window is a prompt and the ``SCORED_TOKENS`` + 1 tokens after it. The eager model reads all but
the last ``LAST_TOKENS`` of the prompt, once for all methods. Those tokens are read by the model
that is measured, whose attention is still exact, and which then stores the whole prompt: queries
before the last ``LAST_TOKENS`` count for no method. The tokens to be scored are one chunk, which
sees the prompt as it is stored and itself as it is.

Weights and caches are float32, since in bfloat16 the dense model differs from itself by a KL of
.0017 (SmolLM2, when its prompt is read in one part or in two), 40 times that of int8. Bytes are
those of the same cache in bfloat16; the method "bfloat16" shows what rounding to it does.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import spark_compile
from spark_compile.kernels.layout import counters
from spark_compile.kernels.spec import SIDES, Side
from spark_compile.state import SparkTensor
from spark_compile.transformers_names import cache_argument

from .measure import lasting
from .quality_methods import Method, Ours, Peer

SCORED_TOKENS = 256
LAST_TOKENS = 64
PEER_GROUP, PEER_RECENT = 32, 32
"""Peers pack whole groups of tokens and leave at least the latest ones dense, as ours do."""
DTYPE = torch.bfloat16
"""In which bytes are counted."""


class QualityError(RuntimeError):
    """What was measured is not what was asked for."""


class Shares(NamedTuple):
    """Bytes of keys and values over those of the dense cache, both in bfloat16."""

    packed: float
    """Of the tokens that are not in the tail: what is stored of them, over what they take dense."""
    whole: float
    """Of the whole cache after the prompt: with heads, tails and the room that there is."""


@dataclass(frozen=True)
class Window:
    """A prompt, what follows it, and what the dense model says."""

    prompt: Tensor
    """[1, context]."""
    scored: Tensor
    """[1, SCORED_TOKENS + 1]."""
    past: transformers.DynamicCache
    """Dense, of the prompt without its last tokens."""
    logits: Tensor
    """[SCORED_TOKENS, vocabulary] of the dense model."""
    nll: float
    """Mean negative log-likelihood of the scored tokens, the first of which is only read."""


def read_window(model: Any, ids: Tensor) -> Window:
    """What the eager model says to tokens [1, context + SCORED_TOKENS + 1]."""
    prompt, scored = ids.split([ids.shape[1] - SCORED_TOKENS - 1, SCORED_TOKENS + 1], dim=1)
    cache = transformers.DynamicCache(config=model.config)
    read(model, prompt[:, :-LAST_TOKENS], cache, logits_to_keep=1)
    past = copy.deepcopy(cache)
    read(model, prompt[:, -LAST_TOKENS:], cache, logits_to_keep=1)
    logits = read(model, scored[:, :-1], cache)
    return Window(prompt, scored, past, logits, _nll(logits, scored))


class Windows:
    """Windows of a text and what the dense model says to them, read when first asked for."""

    def __init__(self, model: Any, texts: Sequence[Tensor]) -> None:
        self._model, self._texts = model, texts
        self._read: dict[int, Window] = {}

    def __getitem__(self, number: int) -> Window:
        if number not in self._read:
            self._read[number] = read_window(self._model, self._texts[number])
        return self._read[number]


@torch.no_grad()
def read(model: Any, ids: Tensor, cache: Any, **arguments: Any) -> Tensor:
    """Logits [L, vocabulary] of tokens [1, L] after those in the cache, which they join."""
    past = {cache_argument(model.forward): cache}
    logits: Tensor = model(input_ids=ids, use_cache=True, **past, **arguments).logits[0]
    return logits


def prepared(model: Any, method: Method, inner: str) -> Any:
    """The model that reads the chunks of a method: the eager one, or a compiled one.

    The latter has the weights of the former. Compiled code of an earlier method is dropped.
    """
    if isinstance(method, Peer):
        return model
    if method.config.window > LAST_TOKENS:
        raise QualityError(
            f"{method.name}: window is {method.config.window}: allowed is 2 to {LAST_TOKENS}"
        )
    torch._dynamo.reset()
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    options = dataclasses.asdict(method.config) | {"inner": inner, "strict": True}
    return spark_compile.optimize(copy.deepcopy(model, shared), **options)


def run_method(
    model: Any, method: Method, windows: Windows, numbers: Sequence[int], entry: dict[str, Any],
    inner: str, machine: Mapping[str, Any], note: Callable[[], object] = lambda: None,
) -> None:  # fmt: skip
    """Measure a method on windows of some numbers; an error becomes part of its entry.

    Args:
        entry: gets the rows, under "windows"; "compile_s", "error".
        inner: the compiler of our graphs.
        machine: this one, as ``machine_facts`` describes it.
        note: called after each window and after an error.
    """
    entry.pop("error", None)
    if not numbers:
        return
    try:
        reader = prepared(model, method, inner)
        if isinstance(method, Ours):  # compiles
            entry["compile_s"] = measure(reader, method, windows[numbers[0]])["seconds"]
        for number in numbers:
            row = measure(reader, method, windows[number])
            where = {"commit": machine["commit"], "machine": lasting(dict(machine))}
            entry["windows"][str(number)] = {**row, **where}
            note()
    except Exception as error:
        entry["error"] = f"{type(error).__name__}: {error}"
        note()


def measure(model: Any, method: Method, window: Window) -> dict[str, Any]:
    """One row: KL, likelihoods, shares and time of a method on a window.

    Args:
        model: that ``prepared`` gave.

    Raises:
        QualityError: the cache is not compressed, or the result is not a number.
    """
    start_s = time.perf_counter()
    cache = copy.deepcopy(window.past)
    read(model, window.prompt[:, -LAST_TOKENS:], cache, logits_to_keep=1)
    shares = stored(cache, method) if isinstance(method, Ours) else simulate(cache, method)
    logits = read(model, window.scored[:, :-1], cache)
    kl = divergence(window.logits, logits)
    if not math.isfinite(kl):
        raise QualityError(f"{method.name}: the KL divergence is {kl}")
    return {
        "kl": kl,
        "nll": _nll(logits, window.scored),
        "dense_nll": window.nll,
        "packed_share": shares.packed,
        "whole_share": shares.whole,
        "seconds": round(time.perf_counter() - start_s, 2),
    }


def divergence(reference: Tensor, logits: Tensor) -> float:
    """Mean over positions of KL(reference || other) in nats, of logits [L, vocabulary]."""
    total = 0.0
    for one, other in zip(reference.split(32), logits.split(32), strict=True):
        # Exact: of nearly equal distributions float32 leaves nothing.
        expected, found = one.double().log_softmax(-1), other.double().log_softmax(-1)
        total += float((expected.exp() * (expected - found)).sum())
    return total / len(reference)


def _nll(logits: Tensor, scored: Tensor) -> float:
    return float(F.cross_entropy(logits, scored[0, 1:]))


def simulate(cache: Any, method: Peer) -> Shares:
    """Put what a peer recovers in the place of the dense tokens of a cache."""
    bytes_ = _Bytes()
    for layer in cache.layers:
        tokens = layer.keys.shape[2]
        packed = max(tokens - PEER_RECENT, 0) // PEER_GROUP * PEER_GROUP
        for name, codec in (("keys", method.key), ("values", method.value)):
            rows = getattr(layer, name)
            recovered = codec.recover(rows[:, :, :packed])
            setattr(layer, name, torch.cat((recovered, rows[:, :, packed:]), dim=2))
            heads, dense = rows.shape[:2].numel(), rows.shape[3] * DTYPE.itemsize
            own = packed * codec.token_bytes(rows.shape[3])
            bytes_.add(heads, own, packed * dense, own + (tokens - packed) * dense, tokens * dense)
    return bytes_.shares()


def stored(cache: Any, method: Ours) -> Shares:
    """The shares of a compressed cache.

    Raises:
        QualityError: a layer is not compressed, or in bfloat16 the format would be another one.
    """
    bytes_ = _Bytes()
    for index, layer in enumerate(cache.layers):
        for side, state in zip(SIDES, (layer.keys, layer.values), strict=True):
            if not isinstance(state, SparkTensor) or not state.packed_tokens():
                raise QualityError(f"{method.name}: the {side}s of layer {index} are not packed")
            _add_state(bytes_, side, state, method)
    return bytes_.shares()


def _add_state(bytes_: _Bytes, side: Side, state: SparkTensor, method: Ours) -> None:
    form, config = state.spec.format(side), method.config
    if (config.key_format if side == "key" else config.value_format) is None:
        expected = config.format_for(side, form.head_dim, DTYPE)
        if expected.text != form.text:
            raise QualityError(
                f"{method.name}: the {side}s are {form.text} in {form.dtype}, but {expected.text} "
                f"in {DTYPE}"
            )
    formats = {name: dataclasses.replace(state.spec.format(name), dtype=DTYPE) for name in SIDES}
    spec = dataclasses.replace(state.spec, **formats)
    head = state.stored()["head"]
    length, packed, first = counters(head)[0, 0, :3].tolist()
    heads, rows = state.pages.shape[:2], state.spec.head(side).tail_rows(head)
    shapes = spec.stored_shapes(side, heads, state.pages.shape[2], rows)
    dense = form.head_dim * DTYPE.itemsize
    bytes_.add(
        heads.numel(),
        (packed - first) * spec.pages(side).page_bytes / spec.window,
        (state.tokens - (length - packed)) * dense,
        sum(math.prod(shape[2:]) for shape in shapes),
        state.tokens * dense,
    )


@dataclass
class _Bytes:
    """Sums over layers and sides of what is stored and of what the same tokens take dense."""

    packed: float = 0
    packed_dense: float = 0
    whole: float = 0
    whole_dense: float = 0

    def add(
        self, heads: int, packed: float, packed_dense: float, whole: float, whole_dense: float
    ) -> None:
        """Add bytes per key head."""
        self.packed += heads * packed
        self.packed_dense += heads * packed_dense
        self.whole += heads * whole
        self.whole_dense += heads * whole_dense

    def shares(self) -> Shares:
        return Shares(self.packed / self.packed_dense, self.whole / self.whole_dense)
