"""Random attention programs as data: what a decoder may do between its cache and its output.

A :class:`Program` is a handful of named choices; :mod:`program_model` builds the module that they
describe. ``programs()`` is the hypothesis strategy over them. Some choices are *hostile*: they look
like attention over a cache and are none that may be rewritten as one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields, replace

from hypothesis import strategies as st

SDPA = ("sdpa", "sdpa_gqa")
GROUPED = ("grouped", "grouped_einsum")
FOLDED = ("bmm", "baddbmm", "baddbmm_bias")
PRODUCTS = (
    "matmul", "mT", "permute", *FOLDED, "einsum", "einsum_letters",
    "einsum_tokens", "rows", *GROUPED, *SDPA,
)  # fmt: skip
"""How queries meet keys. ``rows`` has the queries of a group as rows of one product."""
MIXES = ("matmul", "bmm", "einsum", "einsum_tokens", *GROUPED, "sum")
"""How weights meet values; each with every product but SDPA."""
EXPANSIONS = ("repeat", "expand", "tile", "stack", "index")
"""How Hkv heads become Hq heads where product or mix wants that."""
QUERIES = ("plain", "scaled", "scaled_by_tensor")
TENSOR_SCALES = ("tensor", "head_tensor", "row_tensor")
SCALES = ("mul", "div", *TENSOR_SCALES)
BIASES = ("alibi", "distance", "query_bias")
INNOCENT = ("clone", "contiguous", "view", "dropout", "float")
"""What changes no value."""
SOFTCAPS = frozenset({"softcap", "softcap_mul"})
STEPS = ("mask", *SCALES, *sorted(SOFTCAPS), *BIASES, *INNOCENT, "constant")
MASKS = (
    "none", "add", "add_first", "sub", "where", "where_visible", "where_tensor",
    "masked_fill", "masked_fill_", "gpt2", "flag",
)  # fmt: skip
"""How a mask is applied; ``flag`` is SDPA's is_causal, for prompts alone."""
FILLS = ("where", "where_visible", "where_tensor", "masked_fill", "masked_fill_")
HIDES = ("causal", "window", "padding", "causal_padding", "per_head")
HIDDEN = {"-inf": float("-inf"), "finfo": None, "-1e9": -1e9, "-1e4": -1e4}
"""What hides a score by its name; None is the lowest number of the scores' dtype."""
SOFTMAXES = (
    "plain", "last", "method", "float32", "float32_kept", "upcast", "shifted", "shifted_max",
    "written", "log",
)  # fmt: skip
SINKS = ("none", "last", "last_shifted", "gate", "first", "zero")
LAYOUTS = (
    "heads_first", "negative_dim", "concat", "expanded", "tokens_first", "merged",
    "keys_transposed", "folded",
)  # fmt: skip
"""How the cache holds keys and values; what is in the last row may stay as it is."""
FIRSTS = ("tokens", "empty", "empty_rows", "given")
"""What a cache without a past is: the first tokens, a cat with nothing, or the caller's nothing."""
WEIGHTS = ("clone", "contiguous", "dropout", "view")
AGAIN = ("no", "no", "no", "longer", "wider")
"""Whether another prompt follows, of another length or batch."""

HOSTILE_STEPS = (
    "key_gain", "negate", "clamp", "flip_keys", "mix_heads", "data_scale", "key_scale",
    "threshold", "two_products", "zero",
)  # fmt: skip
"""What scores go through that no scale, mask or softcap says."""
HOSTILE_CACHE = (
    "late_key", "late_value", "key_reader", "value_reader", "past_reader", "crop_before",
    "crop_after", "prepend", "past_scaled", "past_flipped", "three_parts", "mutated",
    "shared_cache", "swapped", "returned_twice", "value_rolled", "heads_flipped", "first_batch",
    "cast_cache",
)  # fmt: skip
HOSTILE_WEIGHTS = ("weights_returned", "weights_gain", "difference", "softmax_twice")
HOSTILE_REST = ("small_mask", "over_queries", "over_heads", "wrong_column", "key_query")
HOSTILE = (*HOSTILE_STEPS, *HOSTILE_CACHE, *HOSTILE_WEIGHTS, *HOSTILE_REST)

MAY_BE_REFUSED: Mapping[str, tuple[str, ...]] = {
    "dtype": ("float64",),
    "product": ("rows",),
    "mix": ("sum",),
    "expansion": ("index", "stack"),
    "steps": ("constant",),
    "mask": ("gpt2",),
    "softmax": ("written", "log"),
    "sinks": ("first", "zero"),
    "layout": LAYOUTS[6:],
    "hostile": HOSTILE,
}
"""Choices with which a program may stay as it is; all others have to be rewritten."""


@dataclass(frozen=True)
class Program:
    """The choices; ``repr`` names those that differ from the plainest program."""

    layers: int = 1
    batch: int = 1
    prompt: int = 9
    feed: tuple[int, ...] = (1, 1, 1, 1)
    kv_heads: int = 1
    groups: int = 1
    key_dim: int = 4
    value_dim: int = 4
    dtype: str = "float32"
    product: str = "matmul"
    mix: str = "matmul"
    expansion: str = "repeat"
    query: str = "plain"
    steps: tuple[str, ...] = ()
    mask: str = "none"
    hides: str = "causal"
    hidden: str = "-inf"
    softmax: str = "plain"
    sinks: str = "none"
    weights: tuple[str, ...] = ()
    layout: str = "heads_first"
    first: str = "tokens"
    again: str = "no"
    hostile: tuple[str, ...] = ()

    def __repr__(self) -> str:
        changed = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return f"Program({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    @property
    def heads(self) -> int:
        return self.kv_heads * self.groups

    def excuses(self) -> list[str]:
        """The choices for which a refusal is allowed; where there are none, it is not."""
        found = []
        for name, values in MAY_BE_REFUSED.items():
            chosen = getattr(self, name)
            chosen = chosen if isinstance(chosen, tuple) else (chosen,)
            found += [f"{name}={value}" for value in chosen if value in values]
        return found + [name for name, applies in TOGETHER.items() if applies(self)]

    def has_behind(self, late: AbstractSet[str], early: AbstractSet[str]) -> bool:
        """Whether a step of ``late`` comes behind one of ``early``."""
        first = next((place for place, step in enumerate(self.steps) if step in early), None)
        return first is not None and not late.isdisjoint(self.steps[first:])

    def plain(self) -> Program:
        """The same program with choices that have no effect as they are by default."""
        return self._with_effect()._without_unused()._with_one_mask()

    def _with_effect(self) -> Program:
        """Hostile choices get what they change."""
        program = self
        if "small_mask" in self.hostile:
            mask = self.mask if self.mask not in ("none", "flag") else "masked_fill"
            steps = self.steps if "mask" in self.steps else (*self.steps, "mask")
            program = replace(program, steps=steps, mask=mask)
        if "wrong_column" in self.hostile and self.sinks in ("none", "gate"):
            program = replace(program, sinks="last")
        return program

    def _without_unused(self) -> Program:
        unused: dict[str, object] = {}
        if self.product in SDPA:
            unused |= {"mix": "matmul", "softmax": "plain", "sinks": "none", "weights": ()}
            kept = {"mask", *BIASES, *INNOCENT}
            unused["steps"] = tuple(step for step in self.steps if step in kept)
        elif self.mask == "flag":
            unused["mask"] = "none"
        if self.groups == 1:
            unused["expansion"] = "repeat"
        return replace(self, **unused)  # type: ignore[arg-type]

    def _with_one_mask(self) -> Program:
        """No step without a mask, no mask without a step."""
        if self.mask == "none" or "mask" not in self.steps:
            steps = tuple(step for step in self.steps if step != "mask")
            return replace(self, steps=steps, mask="none", hides="causal", hidden="-inf")
        # 0 * inf is no number: nobody writes these two together.
        if self.mask == "gpt2" and self.hidden == "-inf":
            return replace(self, hidden="finfo")
        return self


TOGETHER: Mapping[str, Callable[[Program], bool]] = {
    "a softcap behind a mask or bias": lambda p: p.has_behind(SOFTCAPS, {"mask", *BIASES}),
    "a tensor scales capped scores": lambda p: p.has_behind({*TENSOR_SCALES}, SOFTCAPS),
    "two softcaps": lambda p: len(SOFTCAPS.intersection(p.steps)) == 2,
    "a tensor scales filled scores": lambda p: (
        p.mask in FILLS and p.has_behind({*TENSOR_SCALES}, {"mask"})
    ),
    "a scale lifts the lowest fill": lambda p: (
        p.hidden == "-1e4" and p.mask in FILLS and p.has_behind({"mul", "div"}, {"mask"})
    ),
    "product and mix of different ranks": lambda p: (
        p.product not in SDPA
        and (p.product in GROUPED, p.product in FOLDED) != (p.mix in GROUPED, p.mix in FOLDED)
    ),
    "sinks in five dimensions": lambda p: p.sinks != "none" and p.mix in GROUPED,
    "a gate of other scores or another layout": lambda p: (
        p.sinks == "gate" and (p.softmax.startswith("shifted") or p.mix == "einsum_tokens")
    ),
    "tiled heads meet neighbours": lambda p: (
        p.expansion == "tile" and (p.product == "rows" or p.product in GROUPED or p.mix in GROUPED)
    ),
}
"""The same for choices that are harmless one by one."""


def _some(*values: object) -> st.SearchStrategy[object]:
    return st.sampled_from(values)


def _few(values: tuple[str, ...], most: int) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(values), max_size=most, unique=True).map(tuple)


@st.composite
def _steps(draw: st.DrawFn) -> tuple[str, ...]:
    """Scores are mostly masked, and all else may stand before or behind the mask."""
    rest = list(draw(_few(STEPS[1:], 3)))
    if draw(st.integers(0, 7)):
        rest.insert(draw(st.integers(0, len(rest))), "mask")
    return tuple(rest)


FAMILY: dict[str, st.SearchStrategy[object]] = {
    "layers": _some(1, 1, 1, 1, 1, 2),
    "batch": _some(1, 2),
    "prompt": _some(9, 2, 13),
    "feed": _some((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1), (1, 3, 1, 1), (3, 2, 1)),
    "kv_heads": _some(1, 2),
    "groups": _some(1, 2, 3),
    "key_dim": _some(4, 5, 8, 16),
    "value_dim": _some(4, 5, 8, 16),
    "dtype": _some("float32", "float32", "float32", "bfloat16"),
    "product": _some(*PRODUCTS),
    "mix": _some(*MIXES[:-1]),
    "expansion": _some("repeat", "expand", "tile"),
    "query": _some(*QUERIES),
    "steps": _steps().map(lambda steps: tuple(s for s in steps if s != "constant")),
    "mask": _some(*(mask for mask in MASKS if mask != "gpt2")),
    "hides": _some(*HIDES),
    "hidden": _some(*HIDDEN),
    "softmax": _some(*SOFTMAXES[:-2]),
    "sinks": _some("none", "none", "none", *SINKS),
    "weights": _few(WEIGHTS, 2),
    "layout": _some("heads_first", *LAYOUTS[:6]),
    "first": _some(*FIRSTS),
    "again": _some(*AGAIN),
}
"""The choices that have to be rewritten, each alone and all together."""

CHANGES = tuple((name, value) for name, values in MAY_BE_REFUSED.items() for value in values)


def family() -> st.SearchStrategy[Program]:
    """Programs that have to be rewritten."""
    return _any_family().filter(lambda program: not program.excuses())


def programs() -> st.SearchStrategy[Program]:
    """Any program: mostly one that would have to be rewritten but for a thing or two.

    With more of them nearly everything is refused, and little is learnt.
    """
    changes = st.lists(st.sampled_from(CHANGES), max_size=2, unique=True)
    return st.builds(_changed, _any_family(), changes).map(Program.plain)


def _any_family() -> st.SearchStrategy[Program]:
    return st.builds(Program, **FAMILY).map(Program.plain)


def _changed(program: Program, changes: list[tuple[str, str]]) -> Program:
    for name, value in changes:
        several = isinstance(getattr(program, name), tuple)
        chosen = (*getattr(program, name), value) if several else value
        program = replace(program, **{name: chosen})
    return program
