"""How much a model's predictions suffer from storing the keys or values of a layer in a format.

The backend itself tells where a model's attentions are and which queries a format wants: a prompt
goes through a compiled prefill that packs nothing, so that the states of its cache hold dense
tokens and query statistics. From there on everything is eager: one side of one layer is replaced
by what it is worth after packing, and the text that follows is scored.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from .backend import compile_graph, inner_compiler
from .config import LONGEST, SparkConfig
from .kernels.formats import Dense, Format, Quantized
from .kernels.reference.store import ALL, Store, allocate
from .kernels.spec import SIDES, Side, Spec
from .presets import candidates
from .report import Report, Site, SparkError, SparkWarning, collect_report
from .state import SparkTensor
from .torch_private import call_of
from .transformers_names import cache_argument, returned_cache

TOGETHER = 4
"""Formats that are scored in one batch."""
_ATTRIBUTES: dict[Side, str] = {"key": "keys", "value": "values"}
"""Of a layer of a transformers cache."""
_ASKING = {True: "quantized(bits=4,scaled=True)", False: "spark(kept=1)"}
"""Formats that have query statistics kept, by ``Format.EACH_QUERY``."""
Statistics = dict[bool, Tensor]
"""Sums of squared queries [B, Hkv, D] float32, by ``Format.EACH_QUERY``."""


@dataclass
class Layer:
    """One attention site and what was measured of it."""

    site: Site
    index: int
    """Of its layer in the cache."""
    tokens: int
    """That the cache held after a prompt."""
    slides: bool
    """Whether those were not all of it."""
    formats: dict[Side, list[Format]]
    """The candidates of each side, the last of which is ``dense``."""
    kl: dict[Side, list[float]] = field(default_factory=dict)
    """The mean divergence of each of them, in nats."""


class Sensitivity:
    """Measures a model, window by window."""

    def __init__(self, model: nn.Module, context: int) -> None:
        """
        Args:
            model: in eval mode, not compiled.
            context: tokens of a prompt.
        """
        self._model, self._context = model, context
        self._prefills: dict[bool, Callable[..., Any]] = {}
        self._windows = 0
        self.layers: list[Layer] = []
        self.noise = 0.0
        """Mean divergence of two dense runs of different batch sizes, in nats."""

    def begin(self, ids: Tensor) -> int:
        """Find the layers by means of one prompt.

        Args:
            ids: [1, L], a window; its first tokens are the prompt.

        Returns:
            The number of candidates to score per window.

        Raises:
            SparkError: the model returns no cache, nothing of it is compressed, or attentions
                share parts of it.
        """
        self._prefills[True] = _prefill(self._model, each=True)
        with collect_report() as report:
            cache = self._cache(ids, each=True)
        self.layers = _layers(report, cache, self._context)
        formats = [f for layer in self.layers for side in SIDES for f in layer.formats[side][:-1]]
        if any(format.uses_queries and not format.EACH_QUERY for format in formats):
            self._prefills[False] = _prefill(self._model, each=False)
        return len(formats)

    def measure(self, ids: Tensor, advance: Callable[[int], None]) -> None:
        """Add one window to the means.

        Args:
            ids: [1, L], the prompt and the tokens that are scored.
            advance: is told how many candidates were scored since it was called last.
        """
        statistics: list[Statistics] = [{} for _ in self.layers]
        for each in self._prefills:
            cache = self._cache(ids, each=each)
            for layer, kept in zip(self.layers, statistics, strict=True):
                kept[each] = _statistics(cache.layers[layer.index].keys)
        for layer in self.layers:
            for name in _ATTRIBUTES.values():
                part = cache.layers[layer.index]
                setattr(part, name, getattr(part, name).dense())
        scored = ids[:, self._context :]
        expected = self._logits(cache, scored, 1)[0]
        # What a batch of several changes by itself is no effect of a format.
        floor = divergence(expected, self._logits(cache, scored, TOGETHER)[0])
        self._windows += 1
        self.noise += (floor - self.noise) / self._windows
        for layer, kept in zip(self.layers, statistics, strict=True):
            for side in SIDES:
                logits = self._changed(cache, layer, side, kept, scored, advance)
                found = [max(divergence(expected, each) - floor, 0.0) for each in logits] + [0.0]
                means = layer.kl.get(side, [0.0] * len(found))
                layer.kl[side] = [
                    mean + (kl - mean) / self._windows
                    for mean, kl in zip(means, found, strict=True)
                ]

    def _changed(
        self, cache: Any, layer: Layer, side: Side, statistics: Statistics, scored: Tensor,
        advance: Callable[[int], None],
    ) -> Iterator[Tensor]:  # fmt: skip
        """The logits with each candidate of a side of a layer but the last, which is dense."""
        formats = layer.formats[side][:-1]
        dense = getattr(cache.layers[layer.index], _ATTRIBUTES[side])
        for first in range(0, len(formats), TOGETHER):
            batch = formats[first : first + TOGETHER]
            specs = [site_spec(side, format, slides=layer.slides) for format in batch]
            worth = torch.cat([packed(dense, side, spec, statistics) for spec in specs])
            yield from self._logits(cache, scored, len(batch), (layer.index, side, worth))
            advance(len(batch))

    def _cache(self, ids: Tensor, *, each: bool) -> Any:
        """The cache of a prompt."""
        call: dict[str, Any] = {"input_ids": ids[:, : self._context], "use_cache": True}
        if "logits_to_keep" in inspect.signature(self._model.forward).parameters:
            call["logits_to_keep"] = 1
        with warnings.catch_warnings(action="ignore", category=SparkWarning):
            cache = returned_cache(self._prefills[each](**call))
        if not hasattr(cache, "layers"):
            raise SparkError(
                f"{type(self._model).__name__} returned {type(cache).__name__} for its cache: "
                "calibration needs one of transformers, which has layers"
            )
        return cache

    def _logits(
        self, cache: Any, scored: Tensor, batch: int, change: tuple[int, Side, Tensor] | None = None
    ) -> Tensor:
        """Logits [batch, L, vocabulary] of scored tokens [1, L] after copies of a cache.

        Args:
            change: index of a layer of the cache, a side, and tokens [batch, Hkv, S, D] for it.
        """
        cache = copy.deepcopy(cache)
        cache.reorder_cache(torch.zeros(batch, dtype=torch.long, device=scored.device))
        if change is not None:
            index, side, tokens = change
            setattr(cache.layers[index], _ATTRIBUTES[side], tokens)
        past = {cache_argument(self._model.forward): cache}
        output = self._model(input_ids=scored.expand(batch, -1), use_cache=True, **past)
        logits: Tensor = output.logits
        return logits


def _prefill(model: nn.Module, *, each: bool) -> Callable[..., Any]:
    """The model compiled so that its cache has dense tokens and query statistics."""
    config = SparkConfig(
        key_format=_ASKING[each], value_format="dense", min_tokens=LONGEST, inner="eager"
    )
    call: Any = call_of(model)
    inner = inner_compiler(config, None)

    def backend(module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        return compile_graph(module, example_inputs, config, inner)

    def prefill(**inputs: Any) -> Any:
        return call(**inputs)

    # Dynamo keeps graphs with the code object: with this one they go, and the model's is as before.
    prefill.__code__ = prefill.__code__.replace()
    return torch.compile(prefill, backend=backend)


def _layers(report: Report, cache: Any, context: int) -> list[Layer]:
    """The attentions that were rewritten, with their layers of the cache.

    Raises:
        SparkError: there are none, or not one for each of the others.
    """
    sites = [site for graph in report.graphs for site in graph.rewritten]
    held = [
        (index, part)
        for index, part in enumerate(cache.layers)
        if isinstance(getattr(part, "keys", None), SparkTensor)
    ]
    names = [site.layer for site in sites]
    if not sites:
        reasons = [graph.left_alone or graph.refusals() for graph in report.graphs]
        reason = "; ".join(filter(None, reasons)) or "no attention was found"
        raise SparkError(f"nothing of the model is compressed: {reason}")
    if len(sites) != len(held) or len(set(names)) != len(names):
        raise SparkError(
            f"{len(sites)} attentions use {len(held)} layers of the cache, calibration needs one "
            f"for each (layers that share a cache have not): {', '.join(names)}"
        )
    layers = []
    for site, (index, part) in zip(sites, held, strict=True):
        formats = {side: _formats(side, site, part) for side in SIDES}
        tokens = part.keys.tokens
        layers.append(Layer(site, index, tokens, tokens < context, formats))
    return layers


def _formats(side: Side, site: Site, part: Any) -> list[Format]:
    """The candidates of a side of a layer."""
    state = getattr(part, _ATTRIBUTES[side])
    size = site.key_dim if side == "key" else site.value_dim, state.dtype
    found = [
        format
        for format in candidates(side, size)
        if not format.uses_queries or format.head_dim == site.key_dim
    ]
    return [*found, Dense(*size)]


def _statistics(state: SparkTensor) -> Tensor:
    """The sums of squared queries that a state holds."""
    store = Store(**state.stored(), spec=state.spec, side="key")
    assert store.stats is not None
    return store.stats[:, :, store.step % 2]


def site_spec(side: Side, format: Format, *, slides: bool) -> Spec:
    """How a site is stored with a format on one side and a quantized one on the other."""
    other = Quantized(format.head_dim, format.dtype)
    formats = (format, other) if side == "key" else (other, format)
    return SparkConfig().spec(*formats, slides=slides)


def packed(dense: Tensor, side: Side, spec: Spec, statistics: Statistics) -> Tensor:
    """What tokens [B, Hkv, S, D] are worth once those that are due are packed."""
    pages, rows = map(int, spec.room(dense.shape[2]))
    store = allocate(dense, spec, side, pages, rows)
    if store.stats is not None:
        store.stats[:, :, 0] = statistics[store.format.EACH_QUERY]
    store.append(dense, ALL)
    return store.rows().to(dense.dtype)


def divergence(expected: Tensor, found: Tensor) -> float:
    """Mean KL divergence in nats of the distributions of logits [L, vocabulary] from expected."""
    expected, found = expected.float().log_softmax(-1), found.float().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())
