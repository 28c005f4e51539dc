"""The two compressed states, of keys and of values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from . import ops
from .config import SparkConfig
from .kernels.layout import value_fields, value_head_dim
from .sharing import Rows, grown
from .state import SparkTensor, rebuild


class PrunedKeys(SparkTensor):
    """Keys stored as sinks | packed tokens | recent tokens; see ``kernels/layout``.

    ``norms`` [B, Hkv, D] float32 are the query norms the recovery divides by, fixed when the first
    token is packed; ``stats`` [B, Hkv, D] float32 sums the squared queries since the last packing.
    """

    STORED: ClassVar[tuple[str, ...]] = (
        "kept", "bits", "scale", "norms", "packed_length", "stats", "tail",
    )  # fmt: skip
    kept: Tensor
    bits: Tensor
    scale: Tensor
    norms: Tensor
    packed_length: Tensor
    stats: Tensor
    tail: Tensor
    first: Tensor | None = None
    _packed_rows: Rows | None = None
    _tail_rows: Rows | None = None

    def packed_tokens(self) -> int:
        """Number of packed tokens."""
        return int(self.packed_length)

    def stored_tokens(self) -> int:
        """Number of tokens in the storage, those that are no longer part of the cache included."""
        return int(self.shape[2])

    def _shares(self) -> tuple[Rows, Rows]:
        """The shares of packed rows and of tail rows, made when first asked for."""
        if self._packed_rows is None or self._tail_rows is None:
            packed = self.packed_tokens()
            self._packed_rows = Rows(packed, borrowed=self._borrowed)
            self._tail_rows = Rows(self.stored_tokens() - packed, borrowed=self._borrowed)
        return self._packed_rows, self._tail_rows

    def _handle(
        self, length: int, packed_rows: Rows, tail_rows: Rows, **changed: Tensor
    ) -> PrunedKeys:
        stored = self.stored() | changed
        shape = (stored["tail"].shape[0], self.shape[1], length, self.shape[3])
        handle = type(self)(shape, self.config, stored)
        handle._packed_rows, handle._tail_rows = packed_rows, tail_rows
        return handle

    def dense(self) -> Tensor:
        config = self.config
        keys: Tensor = ops.recover(
            self.kept, self.bits, self.scale, self.norms, self.packed_length, self.tail,
            self.shape[2], config.sink_tokens, config.recovery, config.saliency, self.first,
        )  # fmt: skip
        return keys

    def resized(self, length: int) -> PrunedKeys:
        packed_rows, tail_rows = self._shares()
        stored = self.stored_tokens() - self.shape[2] + length
        packed = min(packed_rows.count, max(stored - self.config.sink_tokens, 0))
        return self._handle(
            length,
            Rows(packed, shared_with=packed_rows),
            Rows(stored - packed, shared_with=tail_rows),
            packed_length=count_tensor(packed),
        )

    def reserve(self, extra: int) -> PrunedKeys:
        packed_rows, tail_rows = self._shares()
        (tail,), rows = tail_rows.reserve((self.tail,), extra, self.config.window)
        packed = Rows(packed_rows.count, shared_with=packed_rows)
        return self._handle(self.shape[2] + extra, packed, rows, tail=tail)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> PrunedKeys:
        packed_rows, tail_rows = self._shares()
        stored = self.stored()
        for name in ("kept", "bits", "scale"):
            stored[name] = stored[name][:, :, : max(packed_rows.count, self.config.window)]
        stored["tail"] = stored["tail"][:, :, : tail_rows.count + self.config.window]
        changed = {name: change(t) for name, t in stored.items() if t.dim()}
        changed["packed_length"] = self.packed_length.clone()
        packed, tail = Rows(packed_rows.count), Rows(tail_rows.count)
        return self._handle(self.shape[2], packed, tail, **changed)

    def appended(self, new: Tensor) -> PrunedKeys:
        handle = self.reserve(new.shape[2])
        ops.append(handle.tail, new, self.stored_tokens(), self.packed_length)
        return handle

    def with_stats(self, stats: Tensor) -> PrunedKeys:
        """This handle with other query statistics, packed as far as the tail has outgrown it."""
        self.stats = stats
        config, (packed_rows, tail_rows) = self.config, self._shares()
        surplus = tail_rows.count - config.sink_tokens - config.recent
        if surplus < config.window or self.shape[2] < config.min_tokens:
            return self
        return self._pack(surplus, packed_rows)

    def _pack(self, surplus: int, packed_rows: Rows) -> PrunedKeys:
        """Move the first ``surplus`` tokens behind the sinks from the tail to the packed rows."""
        config, first, packed = self.config, self.config.sink_tokens, packed_rows.count
        select = self.stats.sqrt()
        norms = self.norms if packed else select
        fresh = ops.prune(
            self.tail[:, :, first : first + surplus], select, norms,
            self.kept.shape[3], config.recovery, config.saliency, config.key_dtype == "int8",
        )  # fmt: skip
        store: tuple[Tensor, ...] = (self.kept, self.bits, self.scale)
        store, rows = packed_rows.reserve(store, surplus, config.window)
        for buffer, new in zip(store, fresh, strict=True):
            buffer[:, :, packed : packed + surplus] = new
        dense = self.stored_tokens() - packed - surplus
        tail = grown(self.tail, first, max(config.dense_room, dense))
        tail[:, :, first:dense] = self.tail[:, :, first + surplus : dense + surplus]
        return self._handle(
            self.shape[2], rows, Rows(dense),
            kept=store[0], bits=store[1], scale=store[2], norms=norms, tail=tail,
            stats=torch.zeros_like(self.stats), packed_length=count_tensor(packed + surplus),
        )  # fmt: skip


class StoredValues(SparkTensor):
    """Values stored whole, quantized or pruned, with room to grow; see ``kernels/layout``."""

    STORED: ClassVar[tuple[str, ...]] = value_fields(pruned=True, quantized=True)
    rows: Tensor
    value_bits: Tensor | None = None
    value_bias: Tensor | None = None
    value_scale: Tensor | None = None
    first: Tensor | None = None
    _rows: Rows | None = None

    def stored_tokens(self) -> int:
        """Number of tokens in the storage, those that are no longer part of the cache included."""
        return int(self.shape[2])

    def _share(self) -> Rows:
        if self._rows is None:
            self._rows = Rows(self.stored_tokens(), borrowed=self._borrowed)
        return self._rows

    def _handle(self, length: int, share: Rows, stored: Mapping[str, Tensor]) -> StoredValues:
        shape = (*stored["rows"].shape[:2], length, self.shape[3])
        handle = type(self)(shape, self.config, stored)
        handle._rows = share
        return handle

    def _growing(self) -> dict[str, Tensor]:
        """The stored tensors that have a row per token."""
        return {name: t for name, t in self.stored().items() if t.dim() == 4}

    def dense(self) -> Tensor:
        # A copy: the rows behind the view may be written by a later append of another handle.
        values: Tensor = ops.first_rows(
            self.rows, self.shape[2], self.value_bits, self.value_scale, self.value_bias, self.first
        )
        return values

    def resized(self, length: int) -> StoredValues:
        stored = self.stored_tokens() - self.shape[2] + length
        return self._handle(length, Rows(stored, shared_with=self._share()), self.stored())

    def reserve(self, extra: int) -> StoredValues:
        growing = self._growing()
        buffers = tuple(growing.values())
        buffers, share = self._share().reserve(buffers, extra, self.config.window)
        stored = self.stored() | dict(zip(growing, buffers, strict=True))
        return self._handle(self.shape[2] + extra, share, stored)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> StoredValues:
        room = self.shape[2] + self.config.window
        stored = self.stored() | {name: t[:, :, :room] for name, t in self._growing().items()}
        changed = {
            name: change(tensor) if tensor.dim() else tensor for name, tensor in stored.items()
        }
        return self._handle(self.shape[2], Rows(self.shape[2]), changed)

    def appended(self, new: Tensor) -> StoredValues:
        handle = self.reserve(new.shape[2])
        ops.append_values(
            handle.rows, handle.value_bits, handle.value_scale, handle.value_bias,
            new, self.stored_tokens(),
        )  # fmt: skip
        return handle


def count_tensor(tokens: int) -> Tensor:
    """A number of tokens as the operators take it: on the CPU whatever the default device is."""
    return torch.tensor(tokens, dtype=torch.int64, device="cpu")


def new_keys(
    stored: Mapping[str, Tensor],
    length: int,
    config: SparkConfig,
    kind: type[PrunedKeys] = PrunedKeys,
) -> PrunedKeys:
    """Keys of ``length`` tokens from the tensors that a prefill graph made."""
    batch, heads, _, head_dim = stored["tail"].shape
    packed = count_tensor(config.packed_length(length))
    counts = {"packed_length": packed, **_first(kind)}
    return kind((batch, heads, length, head_dim), config, {**stored, **counts})


def new_values(
    stored: Sequence[Tensor],
    length: int,
    config: SparkConfig,
    kind: type[StoredValues] = StoredValues,
) -> StoredValues:
    """Values of ``length`` tokens from the buffers that a prefill graph made."""
    named = dict(zip(config.value_fields, stored, strict=True))
    rows = named["rows"]
    shape = (*rows.shape[:2], length, value_head_dim(rows, named.get("value_bias")))
    return kind(shape, config, {**named, **_first(kind)})


def _first(kind: type[SparkTensor]) -> dict[str, Tensor]:
    """No token has left a new state, of the kind that tokens leave."""
    return {"first": count_tensor(0)} if "first" in kind.STORED else {}


def _register_safe_globals() -> None:
    """Let ``torch.load(weights_only=True)`` read states, alone or inside transformers' caches."""
    torch.serialization.add_safe_globals([rebuild])
    try:
        from transformers import cache_utils
    except ImportError:
        return
    names = ("DynamicCache", "DynamicLayer", "DynamicSlidingWindowLayer")
    known = [getattr(cache_utils, name) for name in names if hasattr(cache_utils, name)]
    torch.serialization.add_safe_globals(known)


_register_safe_globals()
