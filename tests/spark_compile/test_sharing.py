"""Two continuations of one prefix never see each other's tokens, and nothing is copied in vain."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from states import HEADS, KEY_DIM, VALUE_DIM, prefill, tokens
from torch import Tensor

from spark_compile import SparkConfig
from spark_compile.sharing import Rows, grown
from spark_compile.state import SparkTensor

CONFIG = SparkConfig(key_ratio=0, window=3, recent_tokens=1, sink_tokens=1)


class Handle(NamedTuple):
    """A key and a value state, and the dense tensors that they must be worth."""

    keys: Any
    values: Any
    key: Tensor
    value: Tensor

    def mapped(self, change: Any) -> Handle:
        return Handle(*(change(tensor) for tensor in self))

    def appended(self, count: int, packs: bool) -> Handle:
        key, value = tokens(count, self.key.shape[0])
        keys = self.keys.appended(key)
        if packs:
            keys = keys.with_stats(torch.ones(self.key.shape[0], HEADS, KEY_DIM))
        dense = torch.cat((self.key, key), 2), torch.cat((self.value, value), 2)
        return Handle(keys, self.values.appended(value), *dense)

    def check(self) -> None:
        assert torch.equal(self.keys.dense(), self.key)
        assert torch.equal(self.values.dense(), self.value)


COPIES = (
    lambda t: t.detach(), lambda t: t[:, :, :], torch.clone, copy.deepcopy,
    lambda t: t.to("cpu", copy=True), lambda t: t[:1],
)  # fmt: skip
STEP = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 9), st.integers(1, 5)),
    st.tuples(st.just("append and pack"), st.integers(0, 9), st.integers(1, 5)),
    st.tuples(st.just("crop"), st.integers(0, 9), st.integers(1, 20)),
    st.tuples(st.just("crop in place"), st.integers(0, 9), st.integers(1, 6)),
    st.tuples(st.just("copy"), st.integers(0, 9), st.integers(0, len(COPIES) - 1)),
    st.tuples(st.just("select"), st.integers(0, 9), st.integers(0, 3)),
    st.tuples(st.just("drop"), st.integers(0, 9), st.just(0)),
)


def run(handles: list[Handle], step: tuple[str, int, int]) -> None:
    kind, which, amount = step
    which %= len(handles)
    handle, length = handles[which], handles[which].key.shape[2]
    if kind == "append":
        handles.append(handle.appended(amount, packs=False))
    elif kind == "append and pack":
        handles[which] = handle.appended(amount, packs=True)
    elif kind == "crop":
        handles.append(handle.mapped(lambda t: t[:, :, : min(amount, length)]))
    elif kind == "crop in place":
        handles[which] = handle.mapped(lambda t: t[..., : -min(amount, length - 1) or None, :])
    elif kind == "copy":
        handles.append(handle.mapped(COPIES[amount]))
    elif kind == "select":
        index = torch.tensor([0, -1, 0])[: amount + 1] % handle.key.shape[0]
        handles.append(handle.mapped(lambda t: t.index_select(0, index)))
    elif len(handles) > 1:
        del handles[which]


@given(st.integers(1, 9), st.lists(STEP, min_size=2, max_size=14))
@settings(max_examples=150, deadline=None)
def test_any_program_of_appends_and_copies_is_that_of_dense_tensors(
    length: int, program: list[tuple[str, int, int]]
) -> None:
    made = prefill(CONFIG, length)
    handles = [Handle(made.keys, made.values, made.key, made.value)]
    del made
    for step in program:
        run(handles, step)
        for handle in handles:
            handle.check()


def two(length: int = 21) -> list[SparkTensor]:
    made = prefill(CONFIG, length)
    return [made.keys, made.values]


def buffer(state: SparkTensor) -> Tensor:
    return list(state.stored().values())[-1]


def new(state: SparkTensor, count: int) -> Tensor:
    return torch.randn(2, HEADS, count, {KEY_DIM: KEY_DIM, VALUE_DIM: VALUE_DIM}[state.shape[3]])


def test_the_newest_handle_appends_in_place_and_a_second_one_copies() -> None:
    for state in two():
        tail = buffer(state).data_ptr()
        first = state.appended(new(state, 1))
        assert buffer(first).data_ptr() == tail
        second = state.appended(new(state, 1))
        assert buffer(second).data_ptr() != tail
        assert buffer(first.appended(new(state, 1))).data_ptr() == tail


def test_crop_and_append_copy_nothing_once_the_longer_handle_is_dropped() -> None:
    for prefix in two():
        state = prefix.appended(new(prefix, 3))
        tail = buffer(state).data_ptr()
        cropped = state[..., :-2, :]
        assert buffer(cropped).data_ptr() == tail
        kept = state.dense()
        assert buffer(cropped.appended(new(prefix, 1))).data_ptr() != tail
        assert torch.equal(state.dense(), kept)
        del state
        assert buffer(cropped.appended(new(prefix, 1))).data_ptr() == tail


def test_equally_long_handles_may_both_write_while_the_other_does_not() -> None:
    for state in two():
        tail, alias = buffer(state).data_ptr(), state.detach()
        longer = state.appended(new(state, 1))
        assert buffer(longer).data_ptr() == tail
        assert buffer(alias.appended(new(state, 1))).data_ptr() != tail
        del longer
        assert buffer(alias.appended(new(state, 1))).data_ptr() == tail


def test_copies_append_in_place_whatever_happens_to_the_original() -> None:
    for state in two():
        copies = [state.clone(), copy.deepcopy(state), state.index_select(0, torch.arange(2))]
        longer = state.appended(new(state, 2))
        for copied in copies:
            assert buffer(copied.appended(new(state, 1))).data_ptr() == buffer(copied).data_ptr()
        assert longer.shape[2] == 23


@pytest.mark.parametrize(
    "derived", [lambda t: t, lambda t: t.detach(), lambda t: t[:, :, :15]],
    ids=["itself", "alias", "crop"],
)  # fmt: skip
def test_a_state_on_borrowed_tensors_never_writes_into_them(derived: Any) -> None:
    for owner in two():
        names, config = owner.__tensor_flatten__()
        inner = {name: getattr(owner, name) for name in names}
        before = owner.dense()
        borrower = type(owner).__tensor_unflatten__(inner, config, owner.shape, None)
        state = derived(borrower)
        expected = state.dense()
        del borrower
        fresh = new(owner, 1)
        longer = state.appended(fresh)
        assert buffer(longer).data_ptr() != buffer(owner).data_ptr()
        assert torch.equal(longer.dense(), torch.cat((expected, fresh), 2))
        assert torch.equal(owner.dense(), before)
        assert buffer(longer.appended(fresh)).data_ptr() == buffer(longer).data_ptr()


def test_rows_forget_handles_that_are_gone() -> None:
    short = Rows(3)
    long = Rows(5, shared_with=short)
    assert not short.is_newest()
    assert long.is_newest()
    del long
    assert short.is_newest()
    assert not Rows(3, borrowed=True).is_newest()


@pytest.mark.parametrize(("count", "extra", "slack"), [(3, 2, 4), (3, 8, 4), (100, 1, 2)])
def test_a_copy_has_room_for_what_was_asked(count: int, extra: int, slack: int) -> None:
    rows, buffers = Rows(count), (torch.rand(1, 2, count, 5), torch.rand(1, 2, count, 3, 2))
    copies, share = rows.reserve(buffers, extra, slack)
    needed = count + extra
    assert share.count == needed
    assert share.is_newest()
    assert rows.is_newest()  # the copy is nobody's but its own
    for source, made in zip(buffers, copies, strict=True):
        assert needed + slack <= made.shape[2] <= needed + max(slack, needed // 32)
        assert torch.equal(made[:, :, :count], source)


def test_grown_copies_the_first_rows_alone() -> None:
    source = torch.rand(2, 3, 6, 5)
    copied = grown(source, 4, 9)
    assert copied.shape == (2, 3, 9, 5)
    assert torch.equal(copied[:, :, :4], source[:, :, :4])
    assert not copied[:, :, 4:].any()
