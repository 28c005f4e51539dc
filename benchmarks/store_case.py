"""Storing keys and values: a whole prompt, and one new token with the attention to it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from spark_compile.kernels.layout import LENGTH, PACKED, counters
from spark_compile.kernels.reference.store import ALL

from .attend_case import STORED, WINDOW, Case, Layer, Stored
from .measure import Contender, available_bytes

COPY, CAT, IN_PLACE = "copy", "DynamicCache: cat", "StaticCache: index_copy_"


def build_contenders(case: Case, rotate_bytes: int) -> list[Contender]:
    """Ways to store the keys and values of a prompt, and a plain copy of them for comparison."""
    dense_bytes = 2 * case.key.nbytes // case.key.shape[2] * case.tokens
    most = available_bytes() // 4 // dense_bytes
    prompts = [
        case.rows(0, case.tokens) for _ in range(max(1, min(-(-rotate_bytes // dense_bytes), most)))
    ]
    calls = [functools.partial(_copy, *rows) for rows in prompts]
    contenders = [Contender(COPY, calls, 2 * dense_bytes)]
    for stored in STORED:
        spec = stored.spec(case.shape.head_dim, case.dtype)
        written = Layer(spec, tuple(case.build(stored, *prompts[0]))).read_bytes()
        calls = [functools.partial(case.build, stored, *rows) for rows in prompts]
        contenders.append(Contender(stored.name, calls, dense_bytes + written))
    return contenders


def step_contenders(case: Case, rotate_bytes: int) -> list[Contender]:
    """Ways to append a token and attend, with packing in its share."""
    # Layers take turns, and so does packing: of any WINDOW calls one packs. That needs a number of
    # layers that has no divisor in common with WINDOW, a power of two.
    count = case.layer_count(rotate_bytes) | 1
    buffers = [case.rows(0, case.cached, spare=1) for _ in range(count)]
    pasts = [tuple(rows[:, :, : case.cached] for rows in pair) for pair in buffers]
    position, new_bytes = torch.tensor([case.cached]), sum(rows.nbytes for rows in case.new)
    contenders = [
        Contender(
            CAT, [functools.partial(_cat, case, past) for past in pasts], 3 * case.dense_bytes()
        ),
        Contender(
            IN_PLACE,
            [functools.partial(_index_copy, case, b, position) for b in buffers],
            case.dense_bytes() + new_bytes,
        ),
    ]
    for stored in STORED:
        calls = [Appending(case, stored, first_packing(index, count)) for index in range(count)]
        page_bytes = sum(pages[:, :, 0].nbytes for pages in calls[0].layer.pages)
        moved = case.layer(stored).read_bytes() + new_bytes + page_bytes // WINDOW
        contenders.append(Contender(stored.name, calls, moved, period=WINDOW))
    return contenders


def first_packing(index: int, count: int) -> int:
    """The round in which layer ``index`` of ``count`` packs, so that every WINDOW-th call does."""
    return -index * pow(count, -1, WINDOW) % WINDOW


class Appending:
    """A step that appends; after each that packs, the layer is made as long as it was before."""

    def __init__(self, case: Case, stored: Stored, first_packing: int) -> None:
        self.layer = case.layer(stored, waiting=WINDOW - 1 - first_packing)
        self._step = functools.partial(case.step, self.layer, keep=ALL)
        self._grown = [counters(head)[..., LENGTH : PACKED + 1] for head in self.layer.heads]
        self._until_packing = first_packing + 1

    def __call__(self) -> Tensor:
        output = self._step()
        self._until_packing -= 1
        if not self._until_packing:
            for grown in self._grown:
                grown -= WINDOW
            self._until_packing = WINDOW
        return output


def _copy(key: Tensor, value: Tensor) -> object:
    return key.clone(), value.clone()


def _cat(case: Case, past: tuple[Tensor, ...]) -> Tensor:
    return case.packed_queries(*(torch.cat(p, dim=2) for p in zip(past, case.new, strict=True)))


def _index_copy(case: Case, buffers: tuple[Tensor, ...], position: Tensor) -> Tensor:
    for rows, row in zip(buffers, case.new, strict=True):
        rows.index_copy_(2, position, row)
    return case.packed_queries(*buffers)
