"""The text of a spec, and the rhythm in which tokens are packed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_compile.kernels.formats import parse
from spark_compile.kernels.spec import TAIL_STEP, Spec, parse_spec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TEXTS = [
    "dense", "int8", "pruned(kept=3,stored=int8)", "pruned(kept=4,stored=model)",
    "spark(kept=5,stored=model,recovery=gaussian,saliency=absolute)",
]  # fmt: skip


def spec(**numbers: int) -> Spec:
    dense = parse("dense", 8, torch.float32)
    return Spec(dense, dense, **{"window": 4, "recent": 4, **numbers})


@given(
    st.sampled_from(TEXTS), st.sampled_from(TEXTS), st.sampled_from(DTYPES),
    st.tuples(*(st.integers(2, 300),) * 2),
    st.tuples(st.integers(1, 9999), *(st.integers(0, 9999),) * 3),
    st.floats(1e-4, 9), st.sampled_from([0.0, 30.0, 0.1]),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_the_text_says_everything(
    key: str, value: str, dtype: torch.dtype, dims: tuple[int, int], numbers: Any, scale: float,
    softcap: float,
) -> None:  # fmt: skip
    formats = (parse(text, dim + 5, dtype) for text, dim in zip((key, value), dims, strict=True))
    original = Spec(*formats, *numbers, scale=scale, softcap=softcap)
    assert parse_spec(original.text) == original
    assert parse_spec(original.text) is parse_spec(original.text)
    rolling = original.attending(scale, softcap, rolls=7)
    assert parse_spec(rolling.text) == rolling != original
    plain = original.attending(1.0, 0.0)
    assert "scale" not in plain.text
    assert plain.attending(scale, softcap) == original
    assert (plain == original) == ((scale, softcap) == (1.0, 0.0))


def test_a_copy_is_the_spec_itself() -> None:
    """Dynamo compares each state's form with a copy, in each step."""
    original = spec()
    assert copy.deepcopy(original) is original


def test_the_text_is_that_of_the_documentation() -> None:
    text = (
        "layout=4;key=spark(kept=26,stored=int8,recovery=degenerate,saliency=squared):128:bfloat16;"
        "value=int8:128:bfloat16;window=32;recent=32;sinks=0;min_tokens=0"
    )
    assert parse_spec(text).text == text
    assert parse_spec(f"{text};scale=0.125;softcap=5.0").text == f"{text};scale=0.125;softcap=5.0"
    assert parse_spec(text).format("key").text.startswith("spark(kept=26")
    assert parse_spec(text).format("value").text == "int8"


GOOD = "layout=4;key=dense:8:float32;value=int8:8:float32;window=4;recent=4;sinks=0;min_tokens=0"


@pytest.mark.parametrize(
    "wrong",
    [
        "layout=4", "layout=4;key", GOOD.replace("key=", "keys="), GOOD.replace("dense", "sparse"),
        GOOD.replace(":float32;value", ":float64;value"), GOOD.replace(":8:", ":eight:"),
        GOOD.replace("dense:8:float32", "dense"), GOOD.replace(";window=4", ""),
        GOOD.replace("window=4", "window=four"), GOOD + ";speed=3", GOOD + ";scale=fast",
        GOOD.replace("int8", "pruned(kept=9)"), GOOD.replace("int8", "pruned(kept=3,form=4)"),
    ],
)  # fmt: skip
def test_a_wrong_text_is_named_in_the_error(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"^spec .* cannot be read") as caught:
        parse_spec(wrong)
    assert repr(wrong) in str(caught.value)


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("window=4", "window=0", "window is 0: allowed is 1 to"),
        ("window=4", f"window={2**60}", f"window is {2**60}: allowed is 1 to"),
        ("recent=4", "recent=-1", "recent is -1: allowed is 0 to"),
        ("sinks=0", "sinks=-4", "sinks is -4: allowed is 0 to"),
        ("min_tokens=0", "min_tokens=-1", "min_tokens is -1: allowed is 0 to"),
        ("min_tokens=0", "min_tokens=0;rolls=-1", "rolls is -1: allowed is 0 to"),
        ("min_tokens=0", "min_tokens=0;scale=nan", "scale is nan: allowed is a finite number"),
        ("min_tokens=0", "min_tokens=0;softcap=inf", "softcap is inf: allowed is a finite number"),
        ("dense:8:", "dense:0:", "head size of the keys is 0: allowed is 1 or more"),
        ("int8:8:", "int8:-8:", "head size of the values is -8: allowed is 1 or more"),
    ],
)
def test_numbers_that_no_cache_has_are_refused(right: str, wrong: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be read: {said}"):
        parse_spec(GOOD.replace(right, wrong))


@pytest.mark.parametrize("text", ["", "key", GOOD.removeprefix("layout=4;"), f"layout=1{GOOD[8:]}"])
def test_a_text_of_another_version_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is of layout (None|1): allowed is 4"):
        parse_spec(text)


@pytest.mark.parametrize(
    ("numbers", "length", "packed"),
    [
        ({}, 0, 0),
        ({}, 7, 0),  # recent 4 and less than a page of 4 behind them
        ({}, 8, 4),
        ({}, 11, 4),
        ({}, 12, 8),
        ({"recent": 0}, 3, 0),
        ({"recent": 0}, 4, 4),
        ({"sinks": 2}, 9, 0),
        ({"sinks": 2}, 10, 4),
        ({"min_tokens": 9}, 8, 0),
        ({"min_tokens": 9}, 9, 4),
        ({"min_tokens": 5}, 7, 0),
        ({"sinks": 3, "recent": 9, "min_tokens": 17}, 16, 0),
        ({"sinks": 3, "recent": 9, "min_tokens": 17}, 17, 4),
        ({"sinks": 3, "recent": 9, "min_tokens": 17}, 20, 8),
    ],
)
def test_a_whole_number_of_pages_is_packed(
    numbers: dict[str, int], length: int, packed: int
) -> None:
    assert spec(**numbers).pages_due(length, length) * 4 == packed


@given(st.integers(0, 9), st.integers(0, 9), st.integers(2, 5), st.lists(st.integers(0, 30)))
@settings(max_examples=100, deadline=None)
def test_what_is_packed_depends_on_the_length_alone(
    sinks: int, recent: int, window: int, chunks: list[int]
) -> None:
    """However the tokens come, as many are packed; the rest fits into the tail, with few more."""
    growing, length, packed = spec(sinks=sinks, recent=recent, window=window), 0, 0
    for chunk in chunks:
        length += chunk
        packed += growing.pages_due(length, length, packed) * window
        assert packed == growing.pages_due(length, length) * window
        assert 0 <= growing.tail_rows(length) - (length - packed) < TAIL_STEP
        assert packed // window <= growing.page_room(length, length)
        assert growing.page_room(length) == max(packed // window, 2)


def test_a_sliding_cache_is_as_long_as_what_is_left() -> None:
    sliding = spec(min_tokens=20)
    assert sliding.pages_due(40, 19, 0) == 0
    assert sliding.pages_due(40, 20, 0) == 9
    assert sliding.pages_due(40, 20, 32) == 1


@pytest.mark.parametrize("capacity", [0, 5, 8, 9, 40, 41])
@pytest.mark.parametrize("numbers", [{}, {"sinks": 3}, {"recent": 0}, {"min_tokens": 30}], ids=str)
def test_a_capacity_leaves_room_for_every_length_up_to_it(
    numbers: dict[str, int], capacity: int
) -> None:
    """However short the prompt and whatever is cropped in between."""
    fixed = spec(**numbers)
    pages = fixed.page_room(0, capacity)
    rows = fixed.tail_rows(0, capacity)
    for length in range(capacity + 1):
        packed = fixed.pages_due(length, length) * 4
        assert packed <= pages * 4
        assert length - packed <= rows
    assert rows <= max(fixed.sinks + fixed.recent + fixed.window, min(fixed.min_tokens, capacity))
    assert pages <= capacity // 4 + 1  # one of which the first tokens are evicted
