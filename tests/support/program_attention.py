"""The attention of a random program: product, what happens to the scores, softmax, mix."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from decoders import expanded
from programs import BIASES, GROUPED, HIDDEN, HOSTILE_STEPS, SDPA, Program
from torch import Tensor, nn

LONGEST = 64


class Operands(NamedTuple):
    """What one attention reads: query [B, Hq, L, D], key [B, H, S, D], value [B, H, S, Dv]."""

    query: Tensor
    key: Tensor
    value: Tensor

    @property
    def rows(self) -> Tensor:
        """Positions of the queries [L, 1]: they are the latest."""
        length, total = self.query.shape[2], self.key.shape[2]
        return torch.arange(length).unsqueeze(1) + (total - length)

    @property
    def columns(self) -> Tensor:
        """Positions of the keys [S]."""
        return torch.arange(self.key.shape[2])


def expand(states: Tensor, program: Program) -> Tensor:
    """Hkv heads to Hq heads, as the program does it; Hq heads are left alone."""
    groups = program.heads // states.shape[1]
    if groups == 1 and program.groups > 1:
        return states
    match program.expansion:
        case "tile":
            return states.repeat(1, groups, 1, 1)
        case "expand":
            return expanded(states, groups)
        case "stack":
            return torch.stack([states] * groups, dim=2).flatten(1, 2)
        case "index":
            return states[:, torch.arange(program.heads) // groups]
    return states.repeat_interleave(groups, dim=1)


class Attend(nn.Module):
    """``attend(operands, is_prompt)`` is the output [B, L, Hq * Dv] and what else is returned.

    Scores have four dimensions, or five where product and mix are both grouped.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        heads = program.heads
        self.register_buffer("temperature", torch.tensor(1.7))
        self.register_buffer("head_scale", 0.5 + torch.rand(heads))
        self.register_buffer("slopes", 0.3 * torch.rand(heads))
        self.register_buffer("sinks", torch.randn(heads))
        self.register_buffer("gain", 0.5 + torch.rand(LONGEST))
        self.register_buffer("table", 0.3 * torch.randn(program.key_dim, LONGEST))

    def forward(self, operands: Operands, is_prompt: bool) -> tuple[Tensor, list[Tensor]]:
        if self.program.product in SDPA:
            return self._sdpa(operands, is_prompt).transpose(1, 2).flatten(2), []
        scores = self._product(operands)
        for step in self._steps():
            scores = STEPS[step](self, scores, operands)
        weights = self._weights(scores)
        output = self._mix(weights, operands.value, scores)
        return output, [weights] if "weights_returned" in self.program.hostile else []

    def _steps(self) -> list[str]:
        """The program's steps with hostile ones in the middle."""
        steps = self.program.steps
        middle = len(steps) // 2
        hostile = [name for name in self.program.hostile if name in HOSTILE_STEPS]
        return [*steps[:middle], *hostile, *steps[middle:]]

    def _sdpa(self, operands: Operands, is_prompt: bool) -> Tensor:
        query, key, value = operands
        if self.program.product == "sdpa":
            key, value = expand(key, self.program), expand(value, self.program)
        flag = self.program.mask == "flag" and is_prompt
        mask = None if flag else self._sdpa_mask(operands)
        return F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=flag, enable_gqa=self.program.product == "sdpa_gqa"
        )

    def _sdpa_mask(self, operands: Operands) -> Tensor | None:
        """Boolean where the mask is one of a choice, else the sum of mask and biases."""
        program = self.program
        biased = any(step in BIASES for step in program.steps)
        if not biased and program.mask in ("none", "flag"):
            return None
        if not biased and program.mask not in ("add", "add_first", "sub"):
            return ~self.hidden(operands)
        mask = operands.query.new_zeros(*operands.query.shape[:3], operands.key.shape[2])
        for step in program.steps:
            mask = STEPS[step](self, mask, operands)
        return mask.to(operands.query.dtype)

    def _product(self, operands: Operands) -> Tensor:
        """Scores [B, Hq, L, S], or [B, Hkv, G, L, S] where the values are met like that."""
        program, (query, key, _) = self.program, operands
        if "key_query" in program.hostile:
            scores = (expand(key, program) @ query.mT).mT
        elif program.product in GROUPED:
            grouped = query.unflatten(1, (key.shape[1], -1))
            if program.product == "grouped":
                scores = grouped @ key.unsqueeze(2).transpose(3, 4)
            else:
                scores = torch.einsum("bkgld,bksd->bkgls", grouped, key)
            return scores if program.mix in GROUPED else scores.flatten(1, 2)
        elif program.product == "rows":
            rows = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
            scores = (rows @ key.mT).reshape(*query.shape[:3], key.shape[2])
        else:
            scores = self._flat_product(query, expand(key, program), operands)
        return scores.unflatten(1, (key.shape[1], -1)) if program.mix in GROUPED else scores

    def _flat_product(self, query: Tensor, key: Tensor, operands: Operands) -> Tensor:
        """Scores [B, Hq, L, S] from as many key heads as query heads."""
        flat = query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)
        shape = *query.shape[:3], key.shape[2]
        match self.program.product:
            case "mT":
                return query @ key.mT
            case "permute":
                return torch.matmul(query, key.permute(0, 1, 3, 2))
            case "bmm":
                return torch.bmm(*flat).view(shape)
            case "baddbmm":
                empty = query.new_zeros(flat[0].shape[0], shape[2], shape[3])
                return torch.baddbmm(empty, *flat, beta=0, alpha=0.5).view(shape)
            case "baddbmm_bias":
                bias = self.per_head(self.slopes, query) * operands.columns.to(query.dtype)
                bias = bias.expand(shape[0], -1, 1, -1).reshape(flat[0].shape[0], 1, shape[3])
                return bias.baddbmm(*flat, beta=1.0, alpha=0.5).view(shape)
            case "einsum":
                return torch.einsum("bhld,bhsd->bhls", query, key)
            case "einsum_letters":
                return torch.einsum("b n i d, b n j d -> b n i j", query, key)
            case "einsum_tokens":
                return torch.einsum("blhd,bshd->bhls", query.transpose(1, 2), key.transpose(1, 2))
        return torch.matmul(query, key.transpose(2, 3))

    def _weights(self, scores: Tensor) -> Tensor:
        hostile, sinks = self.program.hostile, self.program.sinks
        if sinks not in ("none", "gate"):
            scores = self._with_sinks(scores)
        weights = self._softmax(scores)
        if sinks not in ("none", "gate"):
            front = (sinks == "first") is not ("wrong_column" in hostile)
            weights = weights[..., 1:] if front else weights[..., :-1]
        for name in self.program.weights:
            weights = _same(name, weights)
        if "difference" in hostile:
            weights = weights - 0.5 * self._softmax(scores * 0.5)[..., : weights.shape[-1]]
        if "weights_gain" in hostile:
            weights = weights * self.gain[: weights.shape[-1]]
        return F.softmax(weights, dim=-1) if "softmax_twice" in hostile else weights

    def _with_sinks(self, scores: Tensor) -> Tensor:
        """Another column of logits that no value belongs to."""
        column = self.per_head(self.sinks, scores).to(scores.dtype).expand(*scores.shape[:-1], 1)
        match self.program.sinks:
            case "first":
                return torch.cat((column, scores), dim=-1)
            case "zero":
                return torch.cat((scores, torch.zeros_like(column)), dim=-1)
            case "last_shifted":
                scores = torch.cat((scores, column), dim=-1)
                return scores - scores.max(dim=-1, keepdim=True).values
        return torch.cat((scores, column), dim=-1)

    def _softmax(self, scores: Tensor) -> Tensor:
        dim = -1
        if "over_queries" in self.program.hostile:
            dim = -2
        if "over_heads" in self.program.hostile:
            dim = 1
        return SOFTMAXES[self.program.softmax](scores, dim)

    def _mix(self, weights: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        """Weights times values, [B, L, Hq * Dv]."""
        program, dtype = self.program, value.dtype
        if program.softmax == "float32_kept":
            value = value.float()
        else:
            weights = weights.to(dtype)
        if program.mix in GROUPED:
            if program.mix == "grouped":
                output = weights @ value.unsqueeze(2)
            else:
                output = torch.einsum("bkgls,bksd->bkgld", weights, value)
            output = output.flatten(1, 2)
        else:
            output = self._flat_mix(weights, expand(value, program))
        if program.sinks == "gate":
            total = torch.logsumexp(scores, dim=-1).reshape(output.shape[:3])
            output = output * torch.sigmoid(total - self.sinks.view(1, -1, 1)).unsqueeze(-1)
        return output.transpose(1, 2).flatten(2).to(dtype)

    def _flat_mix(self, weights: Tensor, value: Tensor) -> Tensor:
        """[B, Hq, L, Dv] from as many value heads as query heads."""
        match self.program.mix:
            case "bmm":
                flat = torch.bmm(weights.flatten(0, 1), value.flatten(0, 1))
                return flat.view(*weights.shape[:3], value.shape[3])
            case "einsum":
                return torch.einsum("bhls,bhsd->bhld", weights, value)
            case "einsum_tokens":
                mixed = torch.einsum("bhij,bjhd->bihd", weights, value.transpose(1, 2))
                return mixed.transpose(1, 2)
            case "sum":
                return (weights.unsqueeze(-1) * value.unsqueeze(2)).sum(-2)
        return torch.matmul(weights, value)

    def per_head(self, vector: Tensor, scores: Tensor) -> Tensor:
        """[Hq] so that it meets the heads of scores of four or five dimensions."""
        if scores.dim() == 4:
            return vector.view(1, -1, 1, 1)
        return vector.view(1, scores.shape[1], -1, 1, 1)

    def hidden(self, operands: Operands) -> Tensor:
        """True where a query may not look: [L, S] or four dimensions."""
        rows, columns = operands.rows, operands.columns
        future = columns > rows
        near = future | (columns <= rows - 3)
        entries = torch.arange(operands.query.shape[0]).view(-1, 1, 1, 1)
        padding = columns == entries + 1
        match self.program.hides:
            case "window":
                return near
            case "padding":
                return padding
            case "causal_padding":
                return future | padding
            case "per_head":
                odd = torch.arange(self.program.heads).view(1, -1, 1, 1) % 2 == 1
                return torch.where(odd, near, future)
        return future

    def mask(self, scores: Tensor, operands: Operands) -> Tensor:
        """Scores with the hidden ones hidden."""
        hidden = self.fit(self.hidden(operands), scores)
        constant = self._constant(scores)
        added = torch.zeros(hidden.shape, dtype=scores.dtype)
        match self.program.mask:
            case "add":
                return scores + added.masked_fill(hidden, constant)
            case "add_first":
                return added.masked_fill(hidden, constant) + scores
            case "sub":
                return scores - added.masked_fill(hidden, -constant)
            case "where":
                return torch.where(hidden, constant, scores)
            case "where_visible":
                return torch.where(~hidden, scores, constant)
            case "where_tensor":
                return torch.where(hidden, torch.full_like(scores, constant), scores)
            case "masked_fill_":
                return scores.masked_fill_(hidden, constant)
            case "gpt2":
                visible = (~hidden).to(scores.dtype)
                return scores * visible + constant * (1 - visible)
        return scores.masked_fill(hidden, constant)

    def fit(self, mask: Tensor, scores: Tensor) -> Tensor:
        """A mask of two or four dimensions so that it meets five."""
        if scores.dim() == 4 or mask.dim() == 2:
            return mask
        if mask.shape[1] == 1:
            return mask.unsqueeze(1)
        return mask.unflatten(1, (scores.shape[1], -1))

    def _constant(self, scores: Tensor) -> float:
        if "small_mask" in self.program.hostile:
            return -1.0
        number = HIDDEN[self.program.hidden]
        return torch.finfo(scores.dtype).min if number is None else number

    def query_bias(self, scores: Tensor, operands: Operands) -> Tensor:
        bias = operands.query.mean(-1, keepdim=True) * operands.columns.to(scores.dtype) * 0.1
        return scores + self.fit(bias, scores)

    def two_products(self, scores: Tensor, operands: Operands) -> Tensor:
        bias = operands.query @ self.table[:, : operands.key.shape[2]]
        return scores + self.fit(bias, scores)


def _same(name: str, x: Tensor) -> Tensor:
    """A step that changes no value."""
    match name:
        case "clone":
            return x.clone()
        case "contiguous":
            return x.contiguous()
        case "view":
            return x.reshape(x.shape)
        case "dropout":
            return F.dropout(x, p=0.0, training=False)
    return x.float()


Step = Callable[[Attend, Tensor, Operands], Tensor]

STEPS: dict[str, Step] = {
    "mask": Attend.mask,
    "mul": lambda a, s, o: s * 0.7,
    "div": lambda a, s, o: s / 1.3,
    "tensor": lambda a, s, o: s / a.temperature,
    "head_tensor": lambda a, s, o: s * a.per_head(a.head_scale, s).to(s.dtype),
    "row_tensor": lambda a, s, o: s * (1.0 + 0.1 * o.rows).to(s.dtype),
    "softcap": lambda a, s, o: torch.tanh(s / 3.0) * 3.0,
    "softcap_mul": lambda a, s, o: 3.0 * torch.tanh(s * 0.5),
    "alibi": lambda a, s, o: s + a.per_head(a.slopes, s).to(s.dtype) * o.columns.to(s.dtype),
    "distance": lambda a, s, o: s - 0.1 * (o.rows - o.columns).abs().to(s.dtype),
    "query_bias": Attend.query_bias,
    "constant": lambda a, s, o: s + 0.5,
    **{name: lambda a, s, o, name=name: _same(name, s) for name in (
        "clone", "contiguous", "view", "dropout", "float")},
    "key_gain": lambda a, s, o: s * a.gain[: s.shape[-1]].to(s.dtype),
    "negate": lambda a, s, o: s * -0.5,
    "zero": lambda a, s, o: s * 0.0,
    "clamp": lambda a, s, o: s.clamp(-1.0, 1.0),
    "flip_keys": lambda a, s, o: s.flip(-1),
    "mix_heads": lambda a, s, o: s.flip(1),
    "data_scale": lambda a, s, o: s / (1.0 + s[..., :1].abs()),
    "key_scale": lambda a, s, o: s / o.key.abs().amax().to(s.dtype),
    "threshold": lambda a, s, o: s.masked_fill(s < -0.5, -1e9),
    "two_products": Attend.two_products,
}  # fmt: skip

SOFTMAXES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "plain": lambda s, dim: F.softmax(s, dim=dim),
    "last": lambda s, dim: torch.softmax(s, dim % s.dim()),
    "method": lambda s, dim: s.softmax(dim),
    "float32": lambda s, dim: F.softmax(s, dim=dim, dtype=torch.float32).to(s.dtype),
    "float32_kept": lambda s, dim: F.softmax(s, dim=dim, dtype=torch.float32),
    "upcast": lambda s, dim: F.softmax(s.float(), dim=dim).type_as(s),
    "shifted": lambda s, dim: F.softmax(s - s.amax(dim=dim, keepdim=True), dim=dim),
    "shifted_max": lambda s, dim: F.softmax(s - s.max(dim=dim, keepdim=True).values, dim=dim),
    "written": lambda s, dim: _written(s, dim),
    "log": lambda s, dim: F.log_softmax(s, dim=dim).exp(),
}


def _written(scores: Tensor, dim: int) -> Tensor:
    powers = torch.exp(scores - scores.amax(dim=dim, keepdim=True))
    return powers / powers.sum(dim=dim, keepdim=True)
