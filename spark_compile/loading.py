"""What a saved state must be: a file may be damaged, of another version, or anybody's.

Nothing that a file says is believed before it is checked, and what is checked is what the kernels
rely on: the sizes of pages and heads, counters that do not lead out of them, and masks of as many
channels as are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from .form import StateForm
from .kernels.layout import MOST_TOKENS, POSITION, counters
from .kernels.operands import check_side, check_strides
from .kernels.reference.store import Store
from .kernels.spec import Side, Spec, parse_spec
from .storage import STORED
from .torch_private import is_fake

PARTS = ("kind", "shape", "form", "stored")
"""What a saved state consists of, in its order."""


def _refuse(name: str, value: object, allowed: str) -> NoReturn:
    """Raise ValueError for a part of a saved state."""
    text = repr(value) if not isinstance(value, str) else value
    raise ValueError(
        f"this is no state that can be loaded: {name} is {text[:500]}, allowed is {allowed}"
    )


def checked(
    saved: tuple[Any, ...], sides: Mapping[str, Side]
) -> tuple[str, tuple[int, ...], StateForm, dict[str, Tensor]]:
    """Kind, logical shape, form and stored tensors of a state as it was saved.

    Args:
        saved: what ``SparkTensor.__reduce_ex__`` gives: kind, shape, form (the spec's text and
            the other fields of StateForm) and the stored tensors by name.
        sides: of the kinds that there are.

    Raises:
        ValueError: it is of another version, or not a whole state.
    """
    if len(saved) != len(PARTS):
        _refuse("the saved state", [type(part).__name__ for part in saved], ", ".join(PARTS))
    kind, shape, form, stored = saved
    if not isinstance(kind, str) or kind not in sides:
        _refuse("kind", kind, " or ".join(sides))
    form, stored = _form(form), _stored(stored)
    _check_state(shape, form, sides[kind], stored)
    return kind, shape, form, stored


def _form(form: Any) -> StateForm:
    types = tuple(map(type, form)) if isinstance(form, tuple) else ()
    least = str, bool, int, bool
    if types not in (least, (*least, int, int), (*least, int, int, bool)):
        allowed = "a spec's text, static, tokens_dim and strict, and ranks, rank, and merged"
        _refuse("form", form, allowed)
    text, tokens_dim = form[0], form[2]
    if tokens_dim not in (1, 2):
        _refuse("tokens_dim", tokens_dim, "1 or 2")
    spec = parse_spec(text)
    if text != (allowed := spec.attending(1.0, 0.0).text):
        _refuse("spec", text, allowed)
    made = StateForm(spec, *form[1:])
    if not 0 <= made.rank < made.ranks <= MOST_TOKENS or (made.static and made.ranks > 1):
        allowed = "a rank below the ranks of a growing state"
        _refuse("ranks and rank", (made.ranks, made.rank), allowed)
    if made.merged and (made.static or tokens_dim != 1):
        _refuse("merged", made.merged, "False of a static state, or one with tokens_dim 2")
    return made


def _stored(stored: Any) -> dict[str, Tensor]:
    """Plain contiguous tensors, as objects that the file cannot reach."""
    if not isinstance(stored, dict) or set(stored) != set(STORED):
        names = sorted(map(str, stored)) if isinstance(stored, dict) else type(stored).__name__
        _refuse("stored", names, f"a dict of {' and '.join(STORED)}")
    plain: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if type(tensor) is not Tensor and not is_fake(tensor):
            _refuse(name, type(tensor).__name__, "a plain tensor")
        # A file may give a tensor attributes that hide its methods, and may go on to change it.
        tensor = plain[name] = Tensor.detach(tensor)
        if tensor.layout != torch.strided or tensor.dtype != torch.uint8:
            _refuse(name, f"{tensor.layout} of {tensor.dtype}", "torch.strided of torch.uint8")
        if not tensor.is_contiguous() or tensor.storage_offset() % 8:
            lies = f"of strides {tensor.stride()} from byte {tensor.storage_offset()} on"
            _refuse(name, lies, "contiguous from a multiple of 8 on")
    return {name: plain[name] for name in STORED}


def _check_state(shape: Any, form: StateForm, side: Side, stored: dict[str, Tensor]) -> None:
    """Raise ValueError unless stored tensors are a state of this shape and form."""
    spec, (pages, head) = form.spec, stored.values()
    sizes = 3 if form.merged else 4
    if not isinstance(shape, tuple) or [type(size) for size in shape] != [int] * sizes:
        _refuse("shape", shape, f"{sizes} sizes")
    tokens = shape[form.tokens_dim]
    if not 0 <= tokens <= MOST_TOKENS:
        _refuse(f"shape[{form.tokens_dim}]", tokens, f"0 to {MOST_TOKENS} tokens")
    check_side(pages, head, spec, side)
    check_strides(pages, head, side)
    expected = form.shape(side, head, tokens)
    if tuple(shape) != expected:
        _refuse("shape", tuple(shape), f"{expected}, as head and spec have it")
    if form.static:
        _check_room(spec, tokens, pages, spec.head(side).tail_rows(head))
    if head.is_meta or is_fake(head) or not counters(head).numel():
        return
    store = Store(pages, head, spec, side)
    if not (counters(head) == counters(head)[:1, :1]).all():
        _refuse("counters of the head", "several", "the same for all batch entries and heads")
    store.check()
    counted = store.visible + store.dropped
    if form.static:
        if counted > tokens:
            _refuse("LENGTH - FIRST + DROPPED", counted, f"up to the capacity of {tokens}")
    elif counted != (own := form.own(tokens)):
        _refuse("LENGTH - FIRST + DROPPED", counted, f"{own}, the tokens of the shape")
    elif store.packed > pages.shape[2] * spec.window:
        most = pages.shape[2] * spec.window
        _refuse("PACKED", store.packed, f"up to {most}, the tokens of all pages")
    store.check_pages()
    if POSITION.name in store.fields:
        positions = store.positions()
        first, last = spec.sinks if store.packed else 0, store.dropped + store.packed + spec.sinks
        packed = positions[:, :, first : first + store.packed]
        if not ((positions.diff(dim=2) > 0).all() and (packed < last).all()):
            _refuse("position of the packed tokens", "another", f"ascending, below {last}")


def _check_room(spec: Spec, capacity: int, pages: Tensor, rows: int) -> None:
    """Raise ValueError unless a static state has the room that its capacity takes."""
    least = map(int, spec.room(capacity, capacity))
    sizes = ("pages", pages.shape[2]), ("tail rows", rows)
    for (name, size), allowed in zip(sizes, least, strict=True):
        if size < allowed:
            _refuse(f"number of {name}", size, f"{allowed} or more for {capacity} tokens")
