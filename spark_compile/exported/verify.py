"""What exported graphs predict beside the model that they were made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels.formats import Dense
from ..kernels.spec import SIDES, Spec, parse_spec
from ..storage import STORED
from .decoder import Decoder, ExportError
from .graph import Graph

PROMPT, SCORED = 192, 48
"""Tokens of the text that are stored at once, and those after them whose predictions count."""
MOST_KL = 0.01
"""In nats: what graphs that store every bit may differ from the model. Rounding to bfloat16 gives
less, anything that is wrong gives far more."""
TEXT = """\
The lighthouse keeper wrote down the weather every evening, in the same order: wind, cloud, sea,
and then whatever had happened that day. Most days nothing had, and the last column of the book
said so in small letters. When the harbour master asked to see it, he turned the pages slowly and
stopped at a week in March. "Here you write that a ship passed without lights," he said. "Why did
you tell nobody?" "I wrote it down," said the keeper. "That is how I tell." The harbour master
closed the book, put it back on the table and looked out of the window, where the rain had begun
again. The wind came from the west, the clouds were low, and the sea was grey. "Then write," he
said, "that somebody has read it." The keeper sharpened his pencil. He wrote the wind, the cloud
and the sea, in that order, and in the last column: a visitor. It was the longest entry of the
month, and he was not sure that he liked it.
"""


def verify(
    decoder: Decoder, graphs: Mapping[str, Graph], tokens: Tensor, max_tokens: int
) -> dict[str, Any]:
    """Run the graphs over a text, once as they are and once with caches that store every bit.

    Args:
        tokens: ids of the text, [1, S].

    Returns:
        "prompt" and "scored": numbers of tokens. "equal": how many of the scored tokens have the
        same most probable successor as in the model, with every bit stored ("budget 1"). "kl_exact"
        and "kl": mean KL divergence in nats of the predictions from the model's, with every bit
        stored and as exported.

    Raises:
        ExportError: with every bit stored, the graphs do not predict what the model does.
    """
    prompt = min(PROMPT, max(2, tokens.shape[1] // 2), max_tokens // 2)
    scored = min(SCORED, tokens.shape[1] - prompt, max_tokens - prompt)
    ids = tokens[:, : prompt + scored].expand(_batch(graphs), -1)
    with torch.no_grad():
        wanted = decoder.reference(ids)[0, prompt - 1 :].double().log_softmax(-1)
        exact = _predicted({name: exactly(graph) for name, graph in graphs.items()}, ids, prompt)
        chosen = _predicted(graphs, ids, prompt)
    kl_exact, kl = (_divergence(wanted, found) for found in (exact, chosen))
    equal = int((wanted.argmax(-1) == exact.argmax(-1)).sum())
    if not kl_exact <= MOST_KL:
        raise ExportError(
            f"the exported graphs do not predict what the model does: with every bit stored, "
            f"{equal} of {len(wanted)} tokens are equal and the KL divergence is {kl_exact:.2g} nat"
        )
    return {
        "prompt": prompt, "scored": len(wanted), "equal": equal, "kl_exact": kl_exact, "kl": kl,
    }  # fmt: skip


def _batch(graphs: Mapping[str, Graph]) -> int:
    return int(graphs["decode"].inputs[0].shape[0])


def _divergence(wanted: Tensor, found: Tensor) -> float:
    """Mean KL divergence of log probabilities [S, V], in nats."""
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def _predicted(graphs: Mapping[str, Graph], ids: Tensor, prompt: int) -> Tensor:
    """Log probabilities after the prompt and after each further token, of the first batch entry."""
    states = graphs["decode"].empty_states()
    rows = [graphs["prefill"].run(states, ids[:, :prompt], 0, prompt - 1)]
    rows += [
        graphs["decode"].run(states, ids[:, at : at + 1], at, 0)
        for at in range(prompt, ids.shape[1])
    ]
    return torch.cat([row[0] for row in rows]).double().log_softmax(-1)


def exactly(graph: Graph) -> Graph:
    """The same graph with caches that store every bit: other specs, and states of other sizes."""
    module = fx.GraphModule(graph.module, fx.Graph())
    module.graph.output(module.graph.graph_copy(graph.module.graph, {}))
    for node in module.graph.nodes:
        if getattr(node.target, "namespace", "") == "spark":
            node.args = tuple(
                _exact(parse_spec(arg)).text if _is_spec(arg) else arg for arg in node.args
            )
    module.recompile()
    states = dict(graph.states)
    for name, (spec, side) in graph.specs.items():
        state, exact = states[name], _exact(spec)
        room = exact.room(graph.max_tokens, graph.max_tokens)
        shapes = exact.stored_shapes(side, state.shape[:2], *room)
        part = STORED.index(name.rpartition(".")[2])
        states[name] = state.new_empty(shapes[part])
    return dataclasses.replace(graph, module=module, states=states)


def _is_spec(value: object) -> bool:
    return isinstance(value, str) and value.startswith("layout=")


def _exact(spec: Spec) -> Spec:
    """A spec whose formats are dense and that evicts nothing."""
    formats = {side: spec.format(side) for side in SIDES}
    dense = {side: Dense(format.head_dim, format.dtype) for side, format in formats.items()}
    return dataclasses.replace(spec, **dense, evict=None)  # type: ignore[arg-type]
