"""``lower``: Dynamo's graph of torch calls becomes functional pre-dispatch ATen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import ATTENTIONS, Decoder, SdpaCausal, decode, decoder, prompt
from torch import SymInt, Tensor, nn

from spark_compile.state import PrunedKeys, StoredValues


class Counting(Decoder):
    """Counts its calls in a buffer, and writes one value into two more."""

    def __init__(self) -> None:
        super().__init__(SdpaCausal)
        for name in ("steps", "first", "second"):
            self.register_buffer(name, torch.zeros(()))

    def forward(self, tokens: Tensor, past: Any = None) -> Any:
        self.steps.add_(1)
        logits, present = super().forward(tokens, past)
        self.first.copy_(logits.sum())
        self.second.copy_(logits.sum())
        return logits * self.steps, present


class Buffered(nn.Module):
    """Keeps its keys and values in buffers of its own and writes them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.register_buffer("keys", torch.zeros(1, 2, 16, 8))
        self.register_buffer("values", torch.zeros(1, 2, 16, 8))

    def forward(self, x_BHLD: Tensor, positions: Tensor) -> Tensor:
        self.keys.index_copy_(2, positions, self.project(x_BHLD))
        self.values.index_copy_(2, positions, x_BHLD)
        visible = torch.arange(16) <= positions.unsqueeze(1)
        return nn.functional.scaled_dot_product_attention(x_BHLD, self.keys, self.values, visible)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_operators_stay_whole(capture: Any, count: Any, name: str) -> None:
    program = capture(decoder(name), prompt())
    whole = ("aten.softmax.int",) if name == "manual" else ("aten.scaled_dot_product_attention",)
    assert count(program, *whole) == 2
    assert count(program, "aten.linear") == 2 * 5 + 1
    assert count(program, "aten.layer_norm") == 2
    assert not program.states
    assert not program.states
    program.graph.lint()


def test_the_result_is_functional(capture: Any) -> None:
    program = capture(Counting(), prompt())
    writes = [
        node
        for node in program.graph.nodes
        if node.op == "call_function" and getattr(node.target, "_schema", None) is not None
        and node.target._schema.is_mutable
    ]  # fmt: skip
    assert {node.target for node in writes} == {torch.ops.aten.copy_.default}
    assert all(node.args[0].op == "placeholder" for node in writes)
    assert len(writes) == 3


def test_mutated_buffers_are_written_back() -> None:
    model = Counting().requires_grad_(False)
    tokens = prompt()
    exact, _ = decode(model, tokens, None, 3)
    expected = [buffer.clone() for buffer in model.buffers()]
    for buffer in model.buffers():
        buffer.zero_()
    compiled = torch.compile(
        model, backend="spark", options={"inner": "eager", "key_ratio": 0.0, "window": 4}
    )
    with torch.no_grad():
        logits, _ = decode(compiled, tokens, None, 3)
    torch.testing.assert_close(logits, exact, atol=1e-4, rtol=1e-4)
    for buffer, value in zip(model.buffers(), expected, strict=True):
        torch.testing.assert_close(buffer, value, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::spark_compile.SparkWarning")
def test_a_cache_in_buffers_is_written_in_place() -> None:
    model, x = Buffered().requires_grad_(False), torch.randn(1, 2, 9, 8)
    eager = [model(x[:, :, :6], torch.arange(6))]
    eager += [model(x[:, :, i : i + 1], torch.tensor([i])) for i in (6, 7, 8)]
    keys = model.keys.clone()
    for buffer in model.buffers():
        buffer.zero_()
    model.compile(backend="spark", options={"inner": "eager"})
    with torch.no_grad():
        compiled = [model(x[:, :, :6], torch.arange(6))]
        compiled += [model(x[:, :, i : i + 1], torch.tensor([i])) for i in (6, 7, 8)]
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(model.keys, keys)


def test_states_are_traced_as_dense_tensors_of_symbolic_length(
    capture: Any, compressed: Any
) -> None:
    model = decoder(layers=1)
    past = compressed(model, prompt(21))
    program = capture(model, prompt(1), past)
    kinds = {type(state): node.meta["val"] for node, state in program.states.items()}
    assert set(kinds) == {PrunedKeys, StoredValues}
    for value in kinds.values():
        assert type(value) is not PrunedKeys
        assert value.shape[:2] == (1, 2)
        assert isinstance(value.shape[2], SymInt)
    assert program.phase == "decode"
    assert len(program.arguments) == len(program.graph.find_nodes(op="placeholder"))


def test_the_length_of_a_plain_past_may_be_symbolic(capture: Any) -> None:
    def attend(query: Tensor, past: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        key = torch.cat((past, new), dim=2)
        return nn.functional.scaled_dot_product_attention(query, key, key), key

    past = torch.randn(1, 2, 7, 8)
    torch._dynamo.mark_dynamic(past, 2)
    program = capture(attend, torch.randn(1, 2, 1, 8), past, torch.randn(1, 2, 1, 8))
    assert isinstance(program.returned()[1].meta["val"].shape[2], SymInt)


def test_a_graph_that_cannot_be_lowered_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: Any, **_kwargs: Any) -> Any:
        raise NotImplementedError("no such thing")

    monkeypatch.setattr("spark_compile.passes.lower.aot_export_module", broken)
    model, tokens = decoder(), prompt()
    compiled = torch.compile(model, backend="spark", options={"inner": "eager"})
    with torch.no_grad(), pytest.warns(UserWarning, match=r"pass Lower failed.*no such thing"):
        logits, _ = compiled(tokens)
    torch.testing.assert_close(logits, model(tokens)[0])


def test_a_vmap_becomes_what_it_computes(capture: Any) -> None:
    """Two levels of it, a weight inside, a dynamic size, and more than one result."""
    model = nn.Linear(4, 4).requires_grad_(False)

    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        def inner(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return model(a) * b, torch.vmap(lambda c: c.sum() + a[0])(b)

        products, sums = torch.vmap(inner)(x, y)
        return products.relu(), sums + 1

    inputs = torch.randn(3, 4), torch.randn(3, 4)
    program = capture(forward, *inputs)
    assert all("vmap" not in str(node.target) for node in program.graph.nodes)
    results = program.module(*program.examples)
    for actual, expected in zip(results, forward(*inputs), strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_transform_that_cannot_be_lowered_leaves_nothing_behind() -> None:
    def forward(x: Tensor) -> Tensor:
        return torch.func.grad(lambda a: (a * a).sum())(x) + 1

    x = torch.randn(3)
    options = {"inner": "eager"}
    with torch.no_grad():
        actual = torch.compile(forward, backend="spark", options=options)(x)
    torch.testing.assert_close(actual, 2 * x + 1)
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == 0


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_what_dropout_that_is_off_returns_may_be_written_to(
    capture: Any, count: Any, p: float
) -> None:
    """It is its input, which changes too."""

    def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
        inside = x + 1
        written = nn.functional.dropout(inside, p, training=p == 0)
        written *= 2
        return inside, written

    x = torch.randn(2, 3)
    program = capture(scaled, x)
    assert not count(program, "aten.dropout")
    for actual, expected in zip(program.module(*program.examples), scaled(x), strict=True):
        torch.testing.assert_close(actual, expected)
