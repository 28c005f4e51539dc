"""Two continuations of one prefix never see each other's tokens, and nothing is copied in vain."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from side_model import SideModel
from states import check_state, new_rows, prefill, queries, step, tokens

from spark_compile import SparkConfig
from spark_compile.sharing import Share, slack
from spark_compile.state import SparkTensor

EXACT = SparkConfig(key_ratio=0, window=3, recent_tokens=1, sink_tokens=1)
PRUNED = SparkConfig(key_ratio=0.5, value_ratio=0.4, window=3, recent_tokens=2)
SMALL = SparkConfig(key_ratio=0.5, key_dtype="int8", value_dtype="int8", window=3, min_tokens=9)
CONFIGS = {"exact": EXACT, "pruned": PRUNED, "small": SMALL}


class Handle(NamedTuple):
    """A key and a value state, and what they must be worth."""

    keys: Any
    values: Any
    models: tuple[SideModel, SideModel]

    @property
    def states(self) -> tuple[SparkTensor, SparkTensor]:
        return self.keys, self.values

    def mapped(self, change: Any, rows: Any = None, entries: Any = slice(None)) -> Handle:
        """What becomes of the states, with what becomes of the models."""
        models = tuple(model.copy() for model in self.models)
        for model in models:
            if rows is not None:
                model.crop(rows)
            for name in ("all_rows", "stats"):
                setattr(model, name, getattr(model, name)[entries])
            model.constants = {name: t[entries] for name, t in model.constants.items()}
        return Handle(change(self.keys), change(self.values), models)  # type: ignore[arg-type]

    def stepped(self, count: int) -> Handle:
        batch = self.keys.shape[0]
        query, new = queries(count, batch), tokens(count, batch)
        keys, values = step(*self.states, query, new)
        models = tuple(model.copy() for model in self.models)
        for model, rows in zip(models, new, strict=True):
            model.append(rows, query=query)
        return Handle(keys, values, models)  # type: ignore[arg-type]

    def appended(self, count: int) -> Handle:
        new = tokens(count, self.keys.shape[0])
        models = tuple(model.copy() for model in self.models)
        for model, rows in zip(models, new, strict=True):
            model.append(rows)
        keys, values = (s.appended(rows) for s, rows in zip(self.states, new, strict=True))
        return Handle(keys, values, models)  # type: ignore[arg-type]

    def check(self) -> None:
        for state, model in zip(self.states, self.models, strict=True):
            check_state(state, model)


def handle(config: SparkConfig, length: int) -> Handle:
    made = prefill(config, length)
    return Handle(*made.states, made.models())


COPIES = (
    lambda t: t.detach(), lambda t: t[:, :, :], torch.clone, copy.deepcopy, copy.copy,
    lambda t: t.to("cpu", copy=True),
)  # fmt: skip
STEP = st.one_of(
    st.tuples(st.just("step"), st.integers(0, 9), st.integers(1, 5)),
    st.tuples(st.just("step in place"), st.integers(0, 9), st.integers(1, 5)),
    st.tuples(st.just("append"), st.integers(0, 9), st.integers(0, 11)),
    st.tuples(st.just("crop"), st.integers(0, 9), st.integers(1, 20)),
    st.tuples(st.just("crop in place"), st.integers(0, 9), st.integers(0, 6)),
    st.tuples(st.just("copy"), st.integers(0, 9), st.integers(0, len(COPIES) - 1)),
    st.tuples(st.just("select"), st.integers(0, 9), st.integers(0, 3)),
    st.tuples(st.just("drop"), st.integers(0, 9), st.just(0)),
)


def run(handles: list[Handle], what: tuple[str, int, int]) -> None:
    kind, which, amount = what
    which %= len(handles)
    made, length = handles[which], handles[which].keys.shape[2]
    if kind == "step":
        handles.append(made.stepped(amount))
    elif kind == "step in place":
        handles[which] = made.stepped(amount)
    elif kind == "append":
        handles.append(made.appended(amount))
    elif kind == "crop":
        rows = min(amount, length)
        handles.append(made.mapped(lambda t: t[:, :, :rows], rows))
    elif kind == "crop in place":
        rows = max(length - amount, 1)
        handles[which] = made.mapped(lambda t: t[..., :rows, :], rows)
    elif kind == "copy":
        handles.append(made.mapped(COPIES[amount]))
    elif kind == "select":
        index = torch.tensor([0, -1, 0])[: amount + 1] % made.keys.shape[0]
        handles.append(made.mapped(lambda t: t.index_select(0, index), entries=index))
    elif len(handles) > 1:
        del handles[which]


@given(st.sampled_from(list(CONFIGS)), st.integers(1, 14), st.lists(STEP, min_size=2, max_size=12))
@settings(max_examples=100, deadline=None)
def test_any_program_of_steps_and_copies_is_that_of_dense_rows(
    config: str, length: int, program: list[tuple[str, int, int]]
) -> None:
    handles = [handle(CONFIGS[config], length)]
    for what in program:
        run(handles, what)
        for made in handles:
            made.check()


def same(a: Handle, b: Handle) -> None:
    """Two handles are worth the same to the last bit, and so is what their counters say."""
    for one, other in zip(a.states, b.states, strict=True):
        assert one._read_counts() == other._read_counts()
        assert torch.equal(one.dense(), other.dense())


@pytest.mark.parametrize("before", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_second_continuation_is_that_of_a_fresh_copy_of_the_prefix(
    config: str, before: int
) -> None:
    """Mid-page, on the verge of packing and after it; statistics are those of the prefix."""
    prefix = handle(CONFIGS[config], 14)
    for _ in range(before):
        prefix = prefix.stepped(1)
    fresh = prefix.mapped(copy.deepcopy)
    others = [prefix.stepped(count) for count in (1, 2, 9)]
    for _ in range(3):
        others = [other.stepped(2) for other in others]
    prefix.check()
    seed = torch.random.get_rng_state()
    continued = [prefix]
    for _ in range(8):
        continued.append(continued[-1].stepped(1))
    torch.random.set_rng_state(seed)
    for made in continued:
        same(made, fresh)
        made.check()
        fresh = fresh.stepped(1)
    for other in others:
        other.check()


def test_the_newest_handle_continues_in_place_and_a_second_one_copies_the_head() -> None:
    prefix = handle(PRUNED, 12)
    assert prefix.keys.packed_tokens() == 9
    first = prefix.stepped(1)
    second = prefix.stepped(1)
    for old, a, b in zip(prefix.states, first.states, second.states, strict=True):
        assert old.head.data_ptr() == a.head.data_ptr() != b.head.data_ptr()
        assert old.pages.data_ptr() == a.pages.data_ptr() == b.pages.data_ptr()


def test_packing_copies_the_head_and_writes_into_the_shared_pages() -> None:
    prefix = handle(PRUNED, 13)
    packed = prefix.stepped(1)
    second = prefix.stepped(1)
    for old, a, b in zip(prefix.states, packed.states, second.states, strict=True):
        assert a.packed_tokens() == b.packed_tokens() == old.packed_tokens() + 3
        assert old.pages.data_ptr() == a.pages.data_ptr() != b.pages.data_ptr()
        assert len({t.head.data_ptr() for t in (old, a, b)}) == 3
    for made in (prefix, packed, second):
        made.check()


def test_crop_and_append_copy_no_pages_once_the_longer_handle_is_dropped() -> None:
    prefix = handle(PRUNED, 8).stepped(4)  # which left room for a page
    pages = [state.pages.data_ptr() for state in prefix.states]
    longer = prefix.stepped(4)  # packs a page
    cropped = longer.mapped(lambda t: t[..., :-5, :], 11)
    assert [state.pages.data_ptr() for state in cropped.states] == pages
    beside = cropped.stepped(3)
    assert all(s.pages.data_ptr() not in pages for s in beside.states)
    longer.check()
    del longer
    again = cropped.stepped(3)
    assert [state.pages.data_ptr() for state in again.states] == pages
    for made in (prefix, cropped, beside, again):
        made.check()


def test_equally_long_handles_may_both_pack_while_the_other_does_not() -> None:
    prefix = handle(PRUNED, 9).stepped(4)
    pages, alias = prefix.keys.pages.data_ptr(), prefix.mapped(lambda t: t.detach())
    longer = prefix.stepped(1)
    assert longer.keys.pages.data_ptr() == pages
    assert alias.stepped(1).keys.pages.data_ptr() != pages
    del longer
    assert alias.stepped(1).keys.pages.data_ptr() == pages


def test_copies_continue_in_place_whatever_happens_to_the_original() -> None:
    prefix = handle(EXACT, 21)
    copies = [prefix.mapped(change) for change in (torch.clone, copy.deepcopy)]
    longer = prefix.stepped(2)
    for copied in copies:
        continued = copied.stepped(1)
        for old, new in zip(copied.states, continued.states, strict=True):
            assert old.head.data_ptr() == new.head.data_ptr()
        continued.check()
    longer.check()


@pytest.mark.parametrize("length", [20, 21, 22])
@pytest.mark.parametrize(
    "derived", [lambda t: t, lambda t: t.detach(), lambda t: t[:, :, :15]],
    ids=["itself", "alias", "crop"],
)  # fmt: skip
def test_a_state_on_borrowed_tensors_never_writes_into_them(derived: Any, length: int) -> None:
    for owner in handle(EXACT, length).states:
        names, context = owner.__tensor_flatten__()
        inner = {name: getattr(owner, name) for name in names}
        before = owner.dense()
        borrower = type(owner).__tensor_unflatten__(inner, context, owner.shape, None)
        state = derived(borrower)
        expected = state.dense()
        del borrower
        for _ in range(4):
            fresh = new_rows(owner, 1)
            state, expected = state.appended(fresh), torch.cat((expected, fresh), 2)
            assert state.head.data_ptr() != owner.head.data_ptr()
            assert torch.equal(state.dense(), expected)
            assert torch.equal(owner.dense(), before)
        assert state.pages.data_ptr() != owner.pages.data_ptr()


def test_a_superseded_handle_shows_its_own_counters_to_other_compilers() -> None:
    """AOTAutograd takes the tensors that ``__tensor_flatten__`` names, and nothing else."""
    prefix = handle(EXACT, 21)
    before = [state.dense() for state in prefix.states]
    longer = prefix.stepped(1)
    doubled = torch.compile(lambda x: x * 2, backend="aot_eager", fullgraph=True)
    for state, dense in zip(prefix.states, before, strict=True):
        assert torch.equal(doubled(state), dense * 2)
    prefix.check()
    longer.check()
    longer.stepped(1).check()


def test_shares_forget_handles_that_are_gone() -> None:
    short = Share(3)
    assert short.is_alone()
    long = Share(5, shared_with=short)
    assert not short.is_newest()
    assert not short.is_alone()
    assert long.is_newest()
    del long
    assert short.is_newest()
    assert short.is_alone()
    borrowed = Share(3, borrowed=True)
    assert not borrowed.is_newest()
    assert not borrowed.is_alone()
    assert not Share(3, shared_with=borrowed).is_newest()


def test_the_counters_of_a_buffer_are_those_of_who_wrote_last() -> None:
    first = Share(1)
    assert first.is_current()
    second = Share(2, shared_with=first)
    second.wrote()
    assert second.is_current()
    assert not first.is_current()
    del second
    assert not first.is_current()


@pytest.mark.parametrize(("count", "expected"), [(0, 1), (31, 1), (64, 2), (1000, 31)])
def test_slack_is_a_share_of_what_is_there(count: int, expected: int) -> None:
    assert slack(count, 1) == expected
    assert slack(count, 50) == 50
