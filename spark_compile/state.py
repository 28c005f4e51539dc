"""A tensor of the logical shape that stores less: what torch asks of it, and what it answers.

A state has the shape that the model expects in its own cache object, as [B, Hkv, S, D], and is a
traceable wrapper subclass, so Dynamo passes it through a compiled graph. Operators that only move
tokens or batch entries keep it compressed (``state_ops.py``); any other one gets the recovered
dense tensor (never wrong, at worst slow: a warning says so once, or ``strict`` raises).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from . import ops
from .form import StateForm
from .kernels.reference.store import ALL, Store
from .kernels.spec import Side
from .loading import checked
from .report import SparkError
from .sharing import Share, blank_pages, lock, unshared
from .storage import STORED, Counts, Storage
from .torch_private import is_fake, no_torch_function


class SparkTensor(Storage):
    """One side of a layer's cache: [B, Hkv, S, D], [B, S, Hkv, D] or [B, S, Hkv * D]."""

    KINDS: ClassVar[dict[str, type[SparkTensor]]] = {}

    def __init_subclass__(cls) -> None:
        SparkTensor.KINDS[cls.__name__] = cls

    def __tensor_flatten__(self) -> tuple[list[str], StateForm]:
        with lock:
            if self._head_share is not None and not self._head_share.is_current():
                # Whoever asks takes the head as it is: it must have the counters of this handle.
                self.head, self._head_share = self._copied_head(), Share(self._head_share.count)
        return list(STORED), self.form

    @classmethod
    def __tensor_unflatten__(
        cls,
        stored: dict[str, Tensor],
        form: StateForm,
        outer_size: tuple[int, ...],
        outer_stride: object,
    ) -> SparkTensor:
        state = cls(outer_size, form, stored)
        state._borrowed = True
        return state

    __torch_function__ = no_torch_function  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        from .state_ops import dispatch

        return dispatch(func, args, kwargs or {})

    def __getitem__(self, index: Any) -> Tensor:
        result = super().__getitem__(index)
        # As a view it would keep this handle alive, and no append to it could be done in place.
        return result.detach() if isinstance(result, SparkTensor) else result

    def __setitem__(self, index: Any, value: Any) -> None:
        from .state_ops import write_slice

        if not self.static:
            raise TypeError(
                "a compressed cache tensor cannot be written to; call .dense() for a copy"
            )
        by_tensor = isinstance(index, tuple) and any(isinstance(part, Tensor) for part in index)
        if by_tensor or is_fake(self.head):
            super().__setitem__(index, value)
        else:
            write_slice(self, index, value)

    def repeat_interleave(self, repeats: Any, dim: int | None = None, **kwargs: Any) -> Tensor:
        # torch makes views, copies and reshapes of it before any of them could be known here.
        if dim is None or dim % self.dim() != 0 or not isinstance(repeats, int):
            return super().repeat_interleave(repeats, dim, **kwargs)
        return self.index_select(
            0, torch.arange(len(self), device=self.device).repeat_interleave(repeats)
        )

    def stored_bytes(self) -> int:
        """Every byte of the storage: pages in use, slack, constants, the dense tail."""
        # Not nbytes, which a traced tensor does not have.
        return sum(t.numel() * t.element_size() for t in (self.pages, self.head))

    def packed_tokens(self) -> int:
        """Number of packed tokens, evicted ones in pages that are still stored included."""
        return self._read_counts().packed

    def dense(self) -> Tensor:
        """The recovered dense tensor, in the shape of the state.

        Raises:
            SparkError: tokens of its prompt have been evicted, or are other ranks'.
        """
        if self.form.ranks > 1 and not is_fake(self.head):
            raise SparkError(
                f"this is what rank {self.form.rank} of {self.form.ranks} stores of a cache: there "
                "is no dense tensor of the whole"
            )
        rows: Tensor = ops.recover(
            self.pages, self._current_head(), self.spec.text, self.SIDE == "key", self.tokens
        )
        return self.form.arranged(rows)

    def appended(self, new: Tensor) -> Self:
        """A handle with the dense tokens ``new``, of the state's layout, after these."""
        rows = self.form.rows(new, self.head.shape[1])
        handle = self.grown(rows.shape[2], queried=False)
        own = self.form.taken(rows, self.tokens)
        Store(handle.pages, handle.head, self.spec, self.SIDE).append(own, ALL)
        return handle

    def moved(self, move: Callable[[Tensor], Tensor]) -> Self:
        """The same tokens on an accelerator, of a state on the CPU.

        Nothing that is stored is read here: it may be on its own way from there, for which the
        accelerator waits and the CPU does not.

        Args:
            move: makes a copy of a stored tensor on the other device.
        """
        pages, head = move(self.pages), move(self.head)
        if self.static:
            return type(self)(tuple(self.shape), self.form, {"pages": pages, "head": head})
        counts, current = self._read_counts(), self._shares()[1].is_current()
        if not counts.packed:
            pages = blank_pages(pages)
        state = self._handle(self.tokens, counts, pages, head)
        if not current:
            state.head = state._copied_head()
        return state

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device={self.device}, format={self.spec.format(self.SIDE).text!r}, "
            f"stored_bytes={self.stored_bytes()})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> SparkTensor:
        copied = self.mapped(Tensor.clone)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        own = self.mapped(Tensor.clone)  # a handle may be a short view of a long shared storage
        # Detached: without Dynamo's marks, which a tensor would take along as attributes.
        stored = {name: unshared(getattr(own, name)).detach() for name in STORED}
        fields = 7 if self.form.merged else 6 if self.form.ranks > 1 else 4
        form = (self.spec.text, *self.form[1:fields])
        return rebuild, (type(self).__name__, tuple(self.shape), form, stored)


class PrunedKeys(SparkTensor):
    """The keys of a layer."""

    SIDE = "key"


class StoredValues(SparkTensor):
    """The values of a layer."""

    SIDE = "value"


KINDS: dict[Side, type[SparkTensor]] = {"key": PrunedKeys, "value": StoredValues}


def new_state(side: Side, form: StateForm, pages: Tensor, head: Tensor, length: int) -> SparkTensor:
    """A state of ``length`` tokens (or of that capacity) from what an operator has built."""
    shape = form.shape(side, head, length)
    if not form.static:
        own = form.own(length)
        stored = form.spec.stored_tokens(own)
        if not form.spec.pages_due(stored, own):
            pages = blank_pages(pages)
    state = KINDS[side](shape, form, {"pages": pages, "head": head})
    if not form.static and form.spec.evict is None:  # else the head has them
        packed = int(form.spec.pages_due(own, own)) * form.spec.window
        state._counts = Counts(packed, 0, 1, 0)
    return state


def rebuild(*saved: Any) -> SparkTensor:
    """Undo ``SparkTensor.__reduce_ex__``; the one global that unpickling a state needs.

    Raises:
        ValueError: what was saved is of another version, or not a whole state.
    """
    sides = {name: cls.SIDE for name, cls in SparkTensor.KINDS.items()}
    kind, shape, form, stored = checked(saved, sides)
    return SparkTensor.KINDS[kind](shape, form, stored)


torch.serialization.add_safe_globals([rebuild])  # torch.load(weights_only=True) reads states
