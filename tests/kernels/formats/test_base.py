"""What every format has: a text that says all of it, fields that its methods fill."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from spark_compile.kernels.formats import Dense, Format, parse
from spark_compile.kernels.formats.base import per_head

TEXTS = {
    "dense": "dense",
    "int8": "int8",
    "pruned(kept=3)": "pruned(kept=3,stored=model)",
    " pruned( kept = 3 , stored = int8 ) ": "pruned(kept=3,stored=int8)",
    "spark(kept=4)": "spark(kept=4,stored=model,recovery=degenerate,saliency=squared)",
    "spark(saliency=absolute,kept=4,recovery=gaussian)": (
        "spark(kept=4,stored=model,recovery=gaussian,saliency=absolute)"
    ),
    "spark-g(kept=4)": "spark-g(kept=4,counts=groups)",
    "think(kept=4)": "think(kept=4)",
    "spark-tight(kept=4)": "spark-tight(kept=4,bits=4)",
    "spark-tight(kept=1,bits=8)": "spark-tight(kept=1,bits=8)",
    "quantized(bits=3)": "quantized(bits=3,scaled=False,rotated=True)",
    "quantized(scaled=True,bits=4-2-1)": "quantized(bits=4-2-1,scaled=True,rotated=True)",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("text", TEXTS)
def test_a_format_has_one_text(text: str) -> None:
    format = parse(text, 9, torch.bfloat16)
    assert (format.head_dim, format.dtype) == (9, torch.bfloat16)
    assert format.text == TEXTS[text]
    assert parse(format.text, 9, torch.bfloat16) == format
    assert hash(parse(format.text, 9, torch.bfloat16)) == hash(format)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "format '' is not known: allowed is one of dense, .*spark"),
        ("Dense", "format 'Dense' is not known"),
        ("int4", "format 'int4' is not known"),
        ("dense(", r"format 'dense\(' is not known"),
        ("spark(kept=4", r"format 'spark\(kept=4' is not known"),
        ("spark(kept=4)x", "is not known"),
        ("dense(kept=4)", "has no option 'kept': allowed is none"),
        ("spark(keep=4)", "has no option 'keep': allowed is kept, stored, recovery, saliency"),
        ("spark(head_dim=4)", "has no option 'head_dim'"),
        ("spark(kept=4,kept=5)", "has option 'kept' twice"),
        ("spark", "format 'spark': .*kept"),
        ("pruned()", r"format 'pruned\(\)': .*kept"),
        ("pruned(kept)", "option 'kept' of format 'pruned' is '': allowed is 1 to 9"),
        ("pruned(kept=0)", "option 'kept' of format 'pruned' is 0: allowed is 1 to 9"),
        ("spark(kept=10)", "option 'kept' of format 'spark' is 10: allowed is 1 to 9"),
        ("spark(kept=-1)", "is -1: allowed is 1 to 9"),
        ("spark(kept=4.5)", "is 4.5: allowed is 1 to 9"),
        ("spark(kept=²)", "is '²': allowed is 1 to 9"),
        ("spark(kept=4,stored=int4)", "option 'stored' .* is 'int4': allowed is model, int8"),
        ("spark(kept=4,recovery=mean)", "'mean': allowed is degenerate, none, exponential, gauss"),
        ("quantized(bits=7)", "option 'bits' of 'quantized' is 7: allowed is 1 to 6 and 8, or"),
        (
            "quantized(bits=4-x,scaled=True)",
            "option 'bits' of 'quantized' is 4-x: allowed is 1 to 6",
        ),
        ("quantized(bits=4-2-1)", "is 4-2-1: without scaled=True, .* allowed is one number"),
        ("quantized(bits=4-2,scaled=True)", "is 4-2: 9 channels have no 2 equal shares"),
        ("quantized(scaled=1)", "option 'scaled' of 'quantized' is 1: allowed is True or False"),
        ("think(kept=10)", "option 'kept' of format 'think' is 10: allowed is 1 to 9"),
        ("spark-tight(kept=4,bits=3)", "option 'bits' .* is 3: allowed is 4, 5, 6, 8"),
        ("spark(kept=4,saliency=2)", "option 'saliency' .* is 2: allowed is squared, absolute"),
    ],
)
def test_a_wrong_text_raises_and_says_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text, 9, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", TEXTS)
def test_a_format_fills_the_fields_that_it_declares(text: str, dtype: torch.dtype) -> None:
    format, rows = parse(text, 9, dtype), torch.randn(2, 3, 4, 5, 9, dtype=dtype)
    norms = torch.rand(2, 3, 9) if format.uses_queries else None
    constants = format.constants(rows.flatten(2, 3), norms)
    stored = format.encode(rows, norms, constants)
    shapes = {"token": (2, 3, 4, 5), "page": (2, 3, 4), "head": (2, 3)}
    declared = {field.name: field for field in format.fields()}
    assert declared.keys() == constants.keys() | stored.keys()
    for name, tensor in (*constants.items(), *stored.items()):
        field = declared[name]
        assert (field.per == "head") == (name in constants)
        assert tensor.shape == (*shapes[field.per], field.width)
        assert tensor.dtype == field.dtype
    decoded = format.decode(stored, constants)
    assert (decoded.shape, decoded.dtype) == (rows.shape, torch.float32)


@pytest.mark.parametrize("text", TEXTS)
def test_scores_and_weighted_sums_are_those_of_the_decoded_rows(text: str) -> None:
    format, rows = parse(text, 9, torch.float32), torch.randn(2, 3, 4, 5, 9)
    norms = torch.rand(2, 3, 9) if format.uses_queries else None
    constants = format.constants(rows.flatten(2, 3), norms)
    stored = format.encode(rows, norms, constants)
    dense = format.decode(stored, constants, 20).flatten(2, 3)
    query, weights = torch.randn(2, 3, 7, 9), torch.rand(2, 3, 7, 20)
    scores = torch.einsum("bhmd,bhsd->bhms", query, dense)
    torch.testing.assert_close(format.scores(query, stored, constants, 20), scores)
    mixed = torch.einsum("bhms,bhsd->bhmd", weights, dense)
    torch.testing.assert_close(format.weighted_sum(weights, stored, constants, 20), mixed)


@dataclass(frozen=True)
class WithOptions(Dense):
    """A format that has an option of each kind."""

    share: float = 0.5
    bits: int = 4
    signed: bool = False
    how: str = "fast"

    NAME = "with options"


del Format.KNOWN["with options"]


@pytest.mark.parametrize("options", [(0.5, 4, False, "fast"), (1e-7, -3, True, "by half")])
def test_options_of_every_kind_come_back(
    options: tuple[float, int, bool, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(Format.KNOWN, "with options", WithOptions)
    format = WithOptions(9, torch.float32, *options)
    back = parse(format.text, 9, torch.float32)
    assert back == format
    assert [type(value) for value in vars(back).values()] == [
        type(value) for value in vars(format).values()
    ]


def test_every_format_is_known_by_its_name() -> None:
    assert {"dense", "int8", "pruned", "spark"} <= Format.KNOWN.keys()
    assert all(name == kind.NAME for name, kind in Format.KNOWN.items())


def test_a_constant_gets_the_dimensions_of_the_rows() -> None:
    constant = torch.rand(2, 3, 5)
    assert per_head(constant, torch.empty(2, 3, 7, 4, 5)).shape == (2, 3, 1, 1, 5)
    assert per_head(constant, torch.empty(2, 3, 7, 5)).shape == (2, 3, 1, 5)
