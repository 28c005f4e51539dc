"""A buffer that the model preallocated for its cache becomes a static state.

The tensor object stays: the model, its cache object or whoever holds it has the state from then on,
and the dense storage is freed. Nothing dense is kept beside the compressed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .kernels.reference.store import ALL, allocate
from .passes.program import Adopted
from .report import SparkError, warn_once
from .state import SparkTensor, new_state
from .torch_private import swap_tensors


def adopt(buffer: Tensor, how: Adopted, args: Sequence[Any]) -> SparkTensor:
    """The state of a buffer's tokens, in the buffer's place.

    No queries of these tokens are known: with a format that chooses channels by queries their
    magnitude alone decides.

    Args:
        buffer: of the logical shape of the state; a growing state where a prompt filled the buffer.
        args: those of the graph that gets it, which tell how many tokens there are.

    Raises:
        ValueError: the position is not one of the buffer.
    """
    form, spec = how.form, how.form.spec
    if isinstance(buffer, SparkTensor):
        return _in_place_of(buffer, buffer.fixed())
    rows = form.rows(buffer.detach(), buffer.shape[3 - form.tokens_dim])
    capacity = rows.shape[2]
    filled = capacity if how.position is None else int(how.position(*args).flatten()[0])
    if not 0 <= filled <= capacity:
        raise ValueError(f"position {filled} is outside a cache of {capacity} tokens")
    if spec.evict is not None and filled > spec.evict.tokens:
        warn_once(
            f"a cache buffer had {filled} tokens before a compiled graph got it: they all stay, "
            f"since {spec.evict.text} evicts when a compiled graph stores the prompt"
        )
    pages, tail_rows = map(int, spec.room(capacity, capacity))
    store = allocate(rows, spec, how.side, pages, tail_rows)
    if filled:
        if store.stats is not None:
            store.stats.fill_(1)
        store.append(rows[:, :, :filled], ALL)
        if store.stats is not None:
            store.stats.zero_()
    state = new_state(how.side, form, store.pages, store.head, capacity)
    return _in_place_of(buffer, state)


def is_static(value: object) -> bool:
    """Whether a graph's argument is a static state already."""
    return isinstance(value, SparkTensor) and value.static


def give_back(state: SparkTensor, dense: Tensor) -> None:
    """Let a state be the dense buffer that a graph which knew of no state has written to.

    Raises:
        SparkError: torch does not let the object be replaced.
    """
    try:
        _swap(state, dense)
    except RuntimeError as error:
        raise SparkError(
            "a compressed cache was written to by a graph that was left alone (see the warning "
            f"before); what it wrote is lost: {error}"
        ) from error
    warn_once(
        "a graph that was left alone writes to a compressed cache: it is a dense buffer again"
    )


def _in_place_of(buffer: Tensor, state: SparkTensor) -> SparkTensor:
    """Let the object ``buffer`` be the state; where torch does not, keep both and say so."""
    try:
        _swap(buffer, state)
    except RuntimeError as error:
        warn_once(f"a cache buffer cannot be replaced, it stays beside the compressed one: {error}")
        return state
    assert isinstance(buffer, SparkTensor)
    return buffer


def _swap(one: Tensor, other: Tensor) -> None:
    """Exchange what two tensor objects are; whoever holds one has the other from then on."""
    # Weak references go on to refer to the same object.
    swap_tensors(one, other)
    kind, own = type(one), one.__dict__
    one.__class__ = type(other)
    one.__dict__ = other.__dict__
    other.__class__ = kind
    other.__dict__ = own
