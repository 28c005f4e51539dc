"""The module that a :class:`programs.Program` describes: attention layers over a tuple cache."""

from __future__ import annotations

from typing import Any

import torch
from decoders import KeyValue, Past
from program_attention import Attend, Operands, expand
from programs import Program
from torch import Tensor, nn

WIDTH = 6


class Layer(nn.Module):
    """``layer(x [B, L, W], past)`` is its output, the cache and whatever else it returns."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.query = nn.Linear(WIDTH, program.heads * program.key_dim)
        self.key = nn.Linear(WIDTH, program.kv_heads * program.key_dim)
        self.value = nn.Linear(WIDTH, program.kv_heads * program.value_dim)
        self.out = nn.Linear(program.heads * program.value_dim, WIDTH)
        self.attend = Attend(program)

    def forward(self, x: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue, list[Tensor]]:
        key, value = self._split(self.key(x)), self._split(self.value(x))
        present = self._append(past, key, value)
        # A condition in code, not a value: it would be symbolic where the length is.
        is_prompt = True if past is None or past[0].numel() == 0 else False  # noqa: SIM210
        operands = self._meddle(Operands(self._query(x), *self._cached(present)))
        output, more = self.attend(operands, is_prompt)
        output = self.out(output)
        if "shared_cache" in self.program.hostile:
            again, _ = self.attend(operands._replace(query=self._query(output)), is_prompt)
            output = output + self.out(again)
        return self._keep(output, operands, past, present, more)

    def _query(self, x: Tensor) -> Tensor:
        query = self.query(x).unflatten(-1, (self.program.heads, -1)).transpose(1, 2)
        match self.program.query:
            case "scaled":
                return query * 0.6
            case "scaled_by_tensor":
                return query / self.attend.temperature
        return query

    def _split(self, x: Tensor) -> Tensor:
        """[B, L, Hkv * D] to [B, Hkv, L, D]."""
        return x.unflatten(-1, (self.program.kv_heads, -1)).transpose(1, 2)

    def _append(self, past: KeyValue | None, key: Tensor, value: Tensor) -> KeyValue:
        """The new cache, in the layout and with the quirks of the program."""
        new_key, new_value = self._stored(key, is_key=True), self._stored(value, is_key=False)
        if "swapped" in self.program.hostile and past is not None:
            past = past[1], past[0]
        past_key, past_value = (None, None) if past is None else past
        key = self._joined(past_key, new_key, self._length_dim(is_key=True))
        value = self._joined(past_value, new_value, self._length_dim(is_key=False))
        return (value, key) if "swapped" in self.program.hostile else (key, value)

    def _stored(self, new: Tensor, *, is_key: bool) -> Tensor:
        """[B, Hkv, L, D] as the cache holds it."""
        if "cast_cache" in self.program.hostile:
            new = new.to(torch.float16)
        match self.program.layout:
            case "expanded":
                return expand(new, self.program)
            case "tokens_first":
                return new.transpose(1, 2).contiguous()
            case "merged":
                return new.transpose(1, 2).flatten(2)
            case "folded":
                return new.flatten(0, 1)
            case "keys_transposed" if is_key:
                return new.transpose(2, 3)
        return new

    def _length_dim(self, *, is_key: bool) -> int:
        match self.program.layout:
            case "tokens_first" | "merged" | "folded":
                return 1
            case "keys_transposed" if is_key:
                return 3
            case "negative_dim":
                return -2
        return 2

    def _joined(self, past: Tensor | None, new: Tensor, dim: int) -> Tensor:
        hostile, join = self.program.hostile, torch.cat
        if self.program.layout == "concat":
            join = torch.concat
        if past is None:
            match self.program.first:
                case "empty":
                    return join((torch.tensor([], dtype=new.dtype), new), dim=dim)
                case "empty_rows":
                    return join((new.narrow(dim, 0, 0), new), dim=dim)
            return new
        if "past_scaled" in hostile:
            past = past * 0.9
        if "past_flipped" in hostile:
            past = past.flip(-1)
        if "three_parts" in hostile and past.shape[dim] > 1:
            first, rest = past.narrow(dim, 0, 1), past.narrow(dim, 1, past.shape[dim] - 1)
            return join((first, rest, new), dim=dim)
        return join((new, past) if "prepend" in hostile else (past, new), dim=dim)

    def _cached(self, present: KeyValue) -> KeyValue:
        """Keys and values [B, H, S, D] from the cache."""
        key, value = present
        if "swapped" in self.program.hostile:
            key, value = value, key
        if "cast_cache" in self.program.hostile:
            key, value = key.to(self.out.weight.dtype), value.to(self.out.weight.dtype)
        heads = self.program.kv_heads
        match self.program.layout:
            case "tokens_first":
                return key.transpose(1, 2), value.transpose(1, 2)
            case "merged":
                key, value = key.unflatten(-1, (heads, -1)), value.unflatten(-1, (heads, -1))
                return key.transpose(1, 2), value.transpose(1, 2)
            case "folded":
                return key.unflatten(0, (-1, heads)), value.unflatten(0, (-1, heads))
            case "keys_transposed":
                return key.transpose(2, 3), value
        return key, value

    def _meddle(self, operands: Operands) -> Operands:
        """What hostile programs do between the cache and the attention."""
        query, key, value = operands
        for name in self.program.hostile:
            match name:
                case "late_key":
                    key = key * 1.5
                case "late_value":
                    value = value + 0.5
                case "crop_before":
                    key, value = key[:, :, 1:], value[:, :, 1:]
                case "value_rolled":
                    value = value.roll(1, 2)
                case "heads_flipped":
                    key = key.flip(1)
                case "first_batch":
                    key = key[:1].expand_as(key)
        return Operands(query, key, value)

    def _last(self, states: Tensor, *, is_key: bool) -> Tensor:
        """A window of a cache."""
        dim = self._length_dim(is_key=is_key) % states.dim()
        return states[(*[slice(None)] * dim, slice(-6, None))]

    def _keep(
        self,
        output: Tensor,
        operands: Operands,
        past: KeyValue | None,
        present: KeyValue,
        more: list[Tensor],
    ) -> tuple[Tensor, KeyValue, list[Tensor]]:
        """The outputs, with what hostile programs do to them and to the cache."""
        for name in self.program.hostile:
            match name:
                case "key_reader":
                    output = output + operands.key.norm(dim=-1).mean() * 0.1
                case "value_reader":
                    output = output + operands.value[:, :, -1:].mean()
                case "past_reader" if past is not None:
                    output = output + past[0].sum() * 0.01
                case "crop_after":
                    present = (
                        self._last(present[0], is_key=True),
                        self._last(present[1], is_key=False),
                    )
                case "mutated":
                    present[0].mul_(1.1)
                case "returned_twice":
                    more = [*more, present[0]]
        return output, present, more


class Model(nn.Module):
    """Layers with residuals: ``model(x [B, L, W], past)``."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.layers = nn.ModuleList(Layer(program) for _ in range(program.layers))

    def forward(self, x: Tensor, past: Past | None = None) -> tuple[Tensor, Past, list[Tensor]]:
        present, more = [], []
        for index, layer in enumerate(self.layers):
            output, states, others = layer(x, None if past is None else past[index])
            present.append(states)
            more += others
            x = x + output
        return x, tuple(present), more

    def nothing(self, batch: int) -> Past | None:
        """What a caller hands over as the cache of no tokens."""
        if self.program.first != "given":
            return None
        layer: Any = self.layers[0]
        x = torch.zeros(batch, 0, WIDTH, dtype=layer.out.weight.dtype)
        key, value = layer._split(layer.key(x)), layer._split(layer.value(x))
        return tuple(layer._append(None, key, value) for _ in self.layers)


def build(program: Program) -> Model:
    """The program's module, with the same weights each time."""
    torch.manual_seed(0)
    dtype = getattr(torch, program.dtype)
    return Model(program).eval().requires_grad_(False).to(dtype)


def calls(program: Program) -> list[list[Tensor]]:
    """What to feed: for each prompt its own inputs [B, L, W] and those that follow it."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(program.batch, (program.prompt, *program.feed))]
    if program.again == "longer":
        sizes.append((program.batch, (program.prompt + 4, 1, 1)))
    if program.again == "wider":
        sizes.append((program.batch + 2, (program.prompt, 1, 1)))
    dtype = getattr(torch, program.dtype)
    return [
        [torch.randn(batch, n, WIDTH, generator=generator).to(dtype) for n in lengths]
        for batch, lengths in sizes
    ]
