"""The reference store, for every format, against a model that keeps dense rows and no pages."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from side_model import SideModel
from torch import Tensor

from spark_compile.kernels.formats import parse
from spark_compile.kernels.reference.store import ALL, Store
from spark_compile.kernels.spec import SIDES, Side, Spec

BATCH, HEADS, DIM = 2, 2, 11
FORMATS = [
    "dense", "int8", "pruned(kept=4)", "pruned(kept=4,stored=int8)", "spark(kept=4)",
    "spark(kept=4,stored=int8)", "spark(kept=4,recovery=none,saliency=absolute)",
    "spark(kept=4,recovery=gaussian)", "spark(kept=4,recovery=exponential,stored=int8)",
    "think(kept=4)", "spark-g(kept=4)", "spark-g(kept=3,counts=all)",
    "spark-tight(kept=4)", "spark-tight(kept=1,bits=5)",
    "quantized(bits=3)", "quantized(bits=5)", "quantized(bits=4,scaled=True)",
    "quantized(bits=5-4-4-3-3-2-2-2-1-1-1,scaled=True)",
]  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GUARD = 0xA5


def spec_of(text: str, dtype: torch.dtype = torch.float32, **numbers: int) -> Spec:
    """A spec with one format on both sides."""
    format = parse(text, DIM, dtype)
    return Spec(format, format, **{"window": 3, "recent": 2, **numbers})


class Guarded(NamedTuple):
    """A store whose two buffers lie inside larger ones, with bytes around that nobody may touch."""

    store: Store
    buffers: tuple[Tensor, Tensor]
    inside: tuple[Tensor, Tensor]

    def check_guard(self) -> None:
        for buffer, inside in zip(self.buffers, self.inside, strict=True):
            outside = buffer.clone()
            outside[inside] = GUARD
            assert (outside == GUARD).all()

    def written(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self.buffers]

    def reread(self) -> Store:
        """The store as the next operator finds it: from its bytes alone."""
        return Store(self.store.pages, self.store.head, self.store.spec, self.store.side)


def guarded(spec: Spec, side: Side, pages: int, rows: int) -> Guarded:
    """An empty store with room for a number of pages and of tail rows; unused bytes are noise."""
    stored, buffers, inside = [], [], []
    head_bytes = int(spec.head(side).head_bytes(rows))
    for shape in ((pages, spec.pages(side).page_bytes), (1, head_bytes)):
        buffer = torch.full((BATCH + 1, HEADS + 1, shape[0] + 2, shape[1] + 16), GUARD)
        buffer = buffer.to(torch.uint8)
        area = (slice(BATCH), slice(1, None), slice(1, -1), slice(8, -8))
        mask = torch.zeros(buffer.shape, dtype=torch.bool)
        mask[area] = True
        buffer[area] = torch.randint(256, buffer[area].shape, dtype=torch.uint8)
        stored.append(buffer[area])
        buffers.append(buffer)
        inside.append(mask)
    head = stored[1][:, :, 0]
    head[..., : spec.head(side).offsets["tail"]] = 0
    return Guarded(Store(stored[0], head, spec, side), tuple(buffers), tuple(inside))  # type: ignore[arg-type]


def fits(guard: Guarded, model: SideModel, count: int, keep: int) -> bool:
    """Whether there is room to append ``count`` tokens and keep the last ones."""
    store, window = guard.store, model.spec.window
    due = model.due(count)
    dense = model.length + count - model.packed - due * window
    first = max(model.first, model.length + count - keep)
    live = model.packed // window + due - first // window
    return dense <= store.tail.shape[2] and (not due or live <= store.pages.shape[2])


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 4), st.none()),
        st.tuples(st.just("append"), st.integers(0, 30), st.none() | st.integers(0, 12)),
        st.tuples(st.just("crop"), st.integers(0, 40), st.none()),
        st.tuples(st.just("observe"), st.integers(1, 5), st.none()),
    ),
    min_size=1,
    max_size=14,
)
SPECS = st.fixed_dictionaries({
    "window": st.integers(2, 4), "recent": st.integers(0, 5), "sinks": st.integers(0, 3),
    "min_tokens": st.sampled_from([0, 0, 9]),
})  # fmt: skip


@given(
    text=st.sampled_from(FORMATS), dtype=st.sampled_from(DTYPES), numbers=SPECS, steps=STEPS,
    pages=st.integers(1, 9), more_rows=st.integers(0, 9), seed=st.integers(0, 99),
    side=st.sampled_from(SIDES),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_any_sequence_of_changes_is_that_of_dense_rows(
    text: str, dtype: torch.dtype, numbers: dict[str, int], pages: int, more_rows: int, seed: int,
    side: Side, steps: list[tuple[str, int, int | None]],
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    spec = spec_of(text, dtype, **numbers)
    guard = guarded(spec, side, pages, spec.most_tail_rows + more_rows)
    model = SideModel(spec, side, BATCH, HEADS)
    for kind, amount, keep in steps:
        store = guard.reread()
        query = torch.randn(BATCH, 2 * HEADS, max(amount, 1), DIM, dtype=dtype)
        if kind == "append":
            new = torch.randn(BATCH, HEADS, amount, DIM, dtype=dtype)
            keep = ALL if keep is None or spec.sinks else keep
            before = guard.written()
            if not fits(guard, model, amount, keep):
                with pytest.raises(ValueError, match="do not fit into"):
                    store.append(new, keep, query)
                assert all(map(torch.equal, guard.written(), before))
                continue
            store.append(new, keep, query)
            model.append(new, keep, query)
        elif kind == "crop":
            length = min(max(amount, model.first), model.length)
            store.crop(length)
            model.crop(length)
        else:
            store.observe(query)
            model.observe(query)
        check(store, model)
        check(guard.reread(), model)
        guard.check_guard()


def check(store: Store, model: SideModel) -> None:
    """A store is worth what the model is, and counts the same."""
    assert (store.length, store.packed, store.first) == (model.length, model.packed, model.first)
    assert store.visible == model.rows.shape[2]
    torch.testing.assert_close(store.rows(), model.rows, rtol=1e-6, atol=1e-6)
    if store.stats is not None:
        torch.testing.assert_close(store.stats[:, :, store.step % 2], model.stats)
