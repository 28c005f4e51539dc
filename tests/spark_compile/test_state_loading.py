"""Files that hold no state: damaged ones, those of other versions, those of an attacker."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from states import KEY_DIM, VALUE_DIM, prefill, queries, static, step, tokens
from torch import Tensor
from torch._tensor import _rebuild_from_type_v2

from spark_compile import SparkConfig, StoredValues
from spark_compile.kernels.layout import FIRST, LENGTH, PACKED, STEP, counters
from spark_compile.kernels.spec import parse_spec
from spark_compile.state import PrunedKeys, SparkTensor, rebuild

CONFIG = SparkConfig(key_ratio=0.6, window=4, sink_tokens=2)
SLIDING = SparkConfig(key_ratio=0.6, window=4)
PARTS = ("kind", "shape", "form", "stored")
Parts = dict[str, Any]


class Pickled:
    """What pickles as a call of a function."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def parts_of(state: SparkTensor) -> Parts:
    """What is saved of a state, to be changed."""
    parts = dict(zip(PARTS, state.__reduce_ex__(2)[1], strict=True))
    return {**parts, "form": list(parts["form"]), "stored": dict(parts["stored"])}


def load(parts: Parts, path: Path) -> Any:
    """A state from a file of these parts."""
    form = tuple(parts["form"]) if isinstance(parts["form"], list) else parts["form"]
    torch.save(Pickled(rebuild, tuple({**parts, "form": form}.values())), path)
    return torch.load(path)


def put(part: str, value: Any, at: Any = None) -> Callable[[Parts], None]:
    """Puts another value in the place of a part, or of one in it."""

    def change(parts: Parts) -> None:
        if at is None:
            parts[part] = value
        else:
            parts[part][at] = value(parts[part][at]) if callable(value) else value

    return change


def count(counter: int, value: int, head: Any = ...) -> Callable[[Parts], None]:
    """Puts a number into a counter, of all heads or of one."""
    return lambda parts: counters(parts["stored"]["head"])[head].select(-1, counter).fill_(value)


def mark(head: int, byte: int) -> Callable[[Parts], None]:
    """Puts a byte into the mask of kept channels of one token of the third page."""

    def change(parts: Parts) -> None:
        layout = parse_spec(parts["form"][0]).pages("key")
        layout.views(parts["stored"]["pages"])["keep"][1, head, 2, 3, 0] = byte

    return change


def spec(old: str, new: str) -> Callable[[Parts], None]:
    return put("form", lambda text: text.replace(old, new), 0)


def stored(name: str, change: Callable[[Tensor], Any]) -> Callable[[Parts], None]:
    return put("stored", change, name)


def merged(*, tokens_dim: int, static: bool = False) -> Callable[[Parts], None]:
    """Says that heads and channels are one dimension."""

    def change(parts: Parts) -> None:
        parts["form"][1:] = [static, tokens_dim, False, 1, 0, True]

    return change


def misaligned(tensor: Tensor) -> Tensor:
    return torch.cat((tensor.new_zeros(4), tensor.flatten()))[4:].view(tensor.shape)


# 21 tokens of which 2 are sinks and 4 recent: 3 pages of 4 tokens, a tail of 9 rows.
SHAPE = f"2, 3, 21, {KEY_DIM}"
WRONG: list[tuple[Callable[[Parts], None], str]] = [
    (put("kind", "SparkTensor"), "kind is SparkTensor, allowed is PrunedKeys or StoredValues"),
    (put("kind", ["PrunedKeys"]), "kind is ['PrunedKeys'], allowed is PrunedKeys or StoredValues"),
    (put("shape", (2, 3, 21)), "shape is (2, 3, 21), allowed is 4 sizes"),
    (put("shape", (2, 3, 21.0, KEY_DIM)), "allowed is 4 sizes"),
    (put("shape", (2, 3, True, KEY_DIM)), "allowed is 4 sizes"),
    (put("shape", None), "shape is None, allowed is 4 sizes"),
    (put("shape", (1, 3, 21, KEY_DIM)), f"allowed is ({SHAPE})"),
    (put("shape", (2, 2, 21, KEY_DIM)), f"allowed is ({SHAPE})"),
    (put("shape", (2, 3, 21, KEY_DIM + 1)), f"allowed is ({SHAPE})"),
    (put("shape", (2, 3, 2**62, KEY_DIM)), f"shape[2] is {2**62}, allowed is 0 to"),
    (put("shape", (2, 3, -1, KEY_DIM)), "shape[2] is -1, allowed is 0 to"),
    (put("shape", (2, 3, 20, KEY_DIM)), "LENGTH - FIRST + DROPPED is 21, allowed is 20"),
    (put("shape", (2, 3, 2**40, KEY_DIM)), f"LENGTH - FIRST + DROPPED is 21, allowed is {2**40}"),
    (put("form", 7), "form is 7, allowed is a spec's text, static, tokens_dim and strict"),
    (put("form", {"key_ratio": 0.5}), "form is {'key_ratio': 0.5}, allowed is a spec's text"),
    (put("form", 0, 1), "allowed is a spec's text, static, tokens_dim and strict"),
    (put("form", 3, 2), "tokens_dim is 3, allowed is 1 or 2"),
    (put("form", 1, 2), "shape is"),
    (merged(tokens_dim=1), f"shape is ({SHAPE}), allowed is 3 sizes"),
    (merged(tokens_dim=2), "merged is True, allowed is False"),
    (merged(tokens_dim=1, static=True), "merged is True, allowed is False"),
    (spec("layout=4", "layout=7"), "is of layout 7: allowed is 4"),
    (spec("layout=4;", ""), "is of layout None: allowed is 4"),
    (spec("window=4", "window=0"), "window is 0: allowed is 1 to"),
    (spec("window=4", "window=8"), "key_pages is"),
    (spec("window=4", f"window={2**39}"), "key_pages is"),
    (spec("spark(", "spork("), "is not known: allowed is one of"),
    (spec("kept=5", "kept=500"), "'kept' of format 'spark' is 500: allowed is 1 to 12"),
    (spec(":12:", f":{10**12}:"), "key_pages is"),
    (spec(":float32", ":float64"), "cannot be read"),
    (spec("min_tokens=0", "min_tokens=0;scale=2.0"), "spec is layout=4;"),
    (put("stored", 5), "stored is int, allowed is a dict of pages and head"),
    (put("stored", {}), "stored is [], allowed is a dict of pages and head"),
    (put("stored", None, "dense"), "stored is ['dense', 'head', 'pages'], allowed is"),
    (put("stored", None, "pages"), "pages is NoneType, allowed is a plain tensor"),
    (stored("head", lambda t: torch.nn.Parameter(t, False)), "head is Parameter, allowed is"),
    (stored("pages", lambda t: t.view(torch.int8)), "pages is torch.strided of torch.int8"),
    (stored("head", lambda t: t.float()), "head is torch.strided of torch.float32"),
    (stored("head", Tensor.to_sparse), "head is torch.sparse_coo of torch.uint8"),
    (stored("pages", lambda t: t[:1, :1, :1].expand(t.shape)), "pages is of strides"),
    (stored("head", lambda t: t.mT.contiguous().mT), "head is of strides"),
    (stored("head", misaligned), "from byte 4 on, allowed is contiguous from a multiple of 8 on"),
    (stored("pages", lambda t: t[:1].clone()), "key_head is torch.uint8[2, 3, "),
    (stored("pages", lambda t: t[:, :2].clone()), "key_head is"),
    (stored("pages", lambda t: t[..., 8:].clone()), "key_pages is"),
    (stored("pages", lambda t: t[0].clone()), "key_pages is"),
    (stored("pages", lambda t: t[:, :, :0].clone()), "key_pages is"),
    (stored("pages", lambda t: t[:, :, :2].clone()), "live pages is 3, allowed is 0 to 2"),
    (stored("head", lambda t: t[..., :32].clone()), "key_head is"),
    (stored("head", lambda t: t[..., :-4].clone()), "key_head is"),
    (stored("head", lambda t: t.new_zeros(*t.shape[:2], 8)), "key_head is"),
    (count(LENGTH, -3), "LENGTH is -3, allowed is 0 to"),
    (count(LENGTH, 2**62), f"LENGTH is {2**62}, allowed is 0 to"),
    (count(LENGTH, 11), "PACKED is 12, allowed is 0 to 11"),
    (count(LENGTH, 13), "LENGTH - PACKED is 1, allowed is 2 to"),
    (count(LENGTH, 22), "LENGTH - FIRST + DROPPED is 22, allowed is 21"),
    (count(LENGTH, 500), "LENGTH - PACKED is 488, allowed is 2 to"),
    (count(PACKED, 11), "PACKED modulo window is 3, allowed is 0"),
    (count(PACKED, -4), "PACKED is -4, allowed is 0 to 21"),
    (count(PACKED, 4), "LENGTH - PACKED is 17, allowed is 2 to"),
    (count(FIRST, -1), "FIRST is -1, allowed is 0"),
    (count(FIRST, 1), "FIRST is 1, allowed is 0"),
    (count(STEP, -1), "STEP is -1, allowed is 0 to"),
    (count(STEP, 2**63 - 1), "STEP is"),
    (mark(2, 0xFF), "keys of the cache are damaged: mask 'keep' of format 'spark' marks"),
    (mark(0, 0), "channels: allowed is 5"),
    (count(LENGTH, 20, (1, 2)), "counters of the head is several, allowed is the same for all"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), WRONG, ids=range(len(WRONG)))
def test_what_is_no_state_is_refused(
    change: Callable[[Parts], None], said: str, tmp_path: Path
) -> None:
    parts = parts_of(prefill(CONFIG).keys)
    assert load(parts, tmp_path / "state.pt").shape[2] == 21
    change(parts)
    with pytest.raises(ValueError, match=re.escape(said)):
        load(parts, tmp_path / "state.pt")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("shape", (2, 3, 20, VALUE_DIM)), "FIRST + DROPPED is 21, allowed is up to the"),
        (put("shape", (2, 3, 90, VALUE_DIM)), "number of pages is 9, allowed is 22 or more for 90"),
        (put("shape", (2, 3, 2**40, VALUE_DIM)), "number of pages is 9, allowed is"),
        (spec("min_tokens=0", "min_tokens=39"), "number of tail rows is 10, allowed is 39 or more"),
        (put("form", False, 1), "DROPPED is 21, allowed is 40, the tokens of the shape"),
        (count(LENGTH, 41), "LENGTH - PACKED is"),
    ],
)  # fmt: skip
def test_what_is_no_static_state_is_refused(
    change: Callable[[Parts], None], said: str, tmp_path: Path
) -> None:
    parts = parts_of(static(CONFIG, 21, 40).values)
    assert load(parts, tmp_path / "state.pt").shape[2] == 40
    change(parts)
    with pytest.raises(ValueError, match=re.escape(said)):
        load(parts, tmp_path / "state.pt")


def test_pages_of_a_growing_state_are_no_ring(tmp_path: Path) -> None:
    """Those of evicted tokens may be gone from a static state alone, where slots are used again."""
    longer = step(*prefill(SLIDING).states, queries(4), tokens(4), 8)
    parts = parts_of(longer[0])
    pages = parts["stored"]["pages"]
    parts["stored"]["pages"] = pages[:, :, :2].clone()
    assert counters(parts["stored"]["head"])[0, 0, PACKED] > 8
    with pytest.raises(ValueError, match=r"PACKED is .*, allowed is up to 8, the tokens of all"):
        load(parts, tmp_path / "state.pt")


@pytest.mark.parametrize(
    "saved",
    [
        (),
        ("PrunedKeys", (2, 3, 21, KEY_DIM), {"window": 4}),
        ("PrunedKeys", (2, 3, 21, KEY_DIM), {"window": 4}, {"channels": torch.zeros(1)}),
        ("PrunedKeys", (2, 3, 21, KEY_DIM), {"window": 4}, {}, 7, 8),
    ],
    ids=len,
)
def test_a_file_of_another_version_is_refused(saved: tuple[Any, ...], tmp_path: Path) -> None:
    torch.save(Pickled(rebuild, saved), tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"this is no state that can be loaded: .* allowed is"):
        torch.load(tmp_path / "state.pt")


def test_random_counters_are_refused_or_harmless(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for number in range(100):
        state = (static(CONFIG, 21, 40) if number % 2 else prefill(CONFIG)).keys
        parts = parts_of(state)
        pages = parts["stored"]["pages"]
        masks = parse_spec(parts["form"][0]).pages("key").views(pages)["keep"]
        marked = masks.clone()
        pages.random_(0, 256)
        masks.copy_(marked)  # those are checked
        head = parts["stored"]["head"]
        kept = counters(head).clone()
        head.random_(0, 256)
        counters(head).copy_(kept)
        if number % 3:
            counters(head)[..., torch.randint(4, ())] = torch.randint(-9, 50, ())
        try:
            loaded = load(parts, tmp_path / "state.pt")
        except ValueError:
            continue
        assert loaded.dense().shape == state.shape


def test_a_file_gives_a_state_no_attributes(tmp_path: Path) -> None:
    """Neither to the state, nor to its tensors, nor afterwards."""
    path = tmp_path / "state.pt"
    parts = parts_of(prefill(CONFIG).keys)
    arguments = ("PrunedKeys", parts["shape"], tuple(parts["form"]))
    hiding = {"clone": 7, "is_contiguous": 7, "detach": 7, "__dict__": {}}
    for name, tensor in parts["stored"].items():
        tensor.__dict__.update(hiding)
        other = Pickled(rebuild, (*arguments, {**parts["stored"], name: tensor}))
        torch.save(other, path)
        assert not getattr(torch.load(path), name).__dict__.keys() & hiding.keys()
        tensor.__dict__.clear()
    plain = (rebuild, (*arguments, parts["stored"]))
    for attack in (
        Pickled(*plain, {"dense": 7}),
        Pickled(_rebuild_from_type_v2, (rebuild, PrunedKeys, plain[1], {"dense": 7})),
        Pickled(_rebuild_from_type_v2, (rebuild, StoredValues, plain[1], {"dense": 7})),
    ):
        torch.save(attack, path)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(path)


def test_a_file_cannot_go_on_to_change_a_tensor(tmp_path: Path) -> None:
    """``BUILD`` on a tensor calls ``set_``: it must not reach the one that was checked."""
    parts = parts_of(prefill(CONFIG).keys)
    head = parts["stored"]["head"]
    arguments = ("PrunedKeys", parts["shape"], tuple(parts["form"]), parts["stored"])
    state = rebuild(*arguments)
    head.set_(torch.zeros(0, dtype=torch.uint8))
    assert state.dense().shape == parts["shape"]
