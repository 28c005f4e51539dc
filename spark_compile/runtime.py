"""Around the compiled graph: states become tensors before the call and states again after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import SymInt

from .adoption import adopt, is_static
from .passes.program import GrownState, NewState, OutputPlan, PlainOutput, Program, StateInput
from .passes.subclasses import flattened
from .report import note_activity
from .state import SparkTensor, new_state


class Length:
    """A number of tokens as a function of the call's arguments."""

    def __init__(self, size: int | SymInt, fakes: Sequence[Any]) -> None:
        """
        Args:
            size: an int, or an expression over sizes of the arguments.
            fakes: the fake arguments, in which those sizes are looked up.

        Raises:
            KeyError: no argument has one of those sizes.
        """
        self._constant = size if isinstance(size, int) else None
        if isinstance(size, SymInt):
            self._expression = size.node.expr
            self._sources = {
                symbol: _find_symbol(symbol, fakes) for symbol in self._expression.free_symbols
            }

    def __call__(self, args: Sequence[Any]) -> int:
        if self._constant is not None:
            return self._constant
        values = {
            symbol: args[index] if dim is None else args[index].shape[dim]
            for symbol, (index, dim) in self._sources.items()
        }
        return int(self._expression.xreplace(values))


def _find_symbol(symbol: object, fakes: Sequence[Any]) -> tuple[int, int | None]:
    """The argument, and its dimension if it is a tensor, whose size is a symbol."""
    for index, fake in enumerate(fakes):
        if isinstance(fake, SymInt) and fake.node.expr == symbol:
            return index, None
        if isinstance(fake, torch.Tensor):
            for dim, size in enumerate(fake.shape):
                if isinstance(size, SymInt) and size.node.expr == symbol:
                    return index, dim
    raise KeyError(f"no argument of the graph has the size {symbol}")


class SparkGraph:
    """A graph that takes and returns compressed states; :meth:`running` makes it one to call."""

    _compiled: Callable[..., Any]

    def __init__(self, program: Program, fakes: Sequence[Any]) -> None:
        """
        Args:
            fakes: the fake arguments of the graph as Dynamo calls it.

        Raises:
            KeyError: a number of tokens cannot be told from the arguments.
        """
        fakes = flattened(fakes, program.wrapped)
        self._wrapped = program.wrapped
        self._outputs = tuple(program.outputs)
        self._count = len(program.inputs)
        self._states = {
            index: plan for index, plan in enumerate(program.inputs) if isinstance(plan, StateInput)
        }
        self._extra = {
            index: Length(plan.growth.extra, fakes)
            for index, plan in self._states.items()
            if plan.growth is not None
        }
        self._lengths = {
            id(plan): Length(plan.length, fakes)
            for plan in program.outputs
            if isinstance(plan, NewState)
        }

    def running(self, compiled: Callable[..., Any]) -> Self:
        """The same with the code that the inner compiler made of the rewritten graph."""
        self._compiled = compiled
        return self

    def __call__(self, *whole_args: Any) -> list[Any]:
        note_activity()
        args = flattened(whole_args, self._wrapped) if self._wrapped else whole_args
        if len(args) != self._count:
            raise ValueError(f"a graph of {self._count} arguments got {len(args)}")
        flat: list[Any] = []
        grown: dict[int, SparkTensor] = {}
        start = 0
        for index, plan in self._states.items():
            flat += args[start:index]
            value, start = args[index], index + 1
            if plan.growth is None:
                if plan.adopted is not None and not is_static(value):
                    value = adopt(value, plan.adopted, args)
                flat.extend(value.stored().values())
            else:
                state = value.grown(
                    self._extra[index](args), plan.growth.keep, shared=plan.growth.shared
                )
                flat.append(state.pages)
                flat.append(state.head)
                grown[index] = state
            if plan.with_length:
                flat.append(value.tokens)
        results = self._compiled(*flat, *args[start:])
        outputs: dict[int, Any] = {}  # by plan: one that is returned twice is one object
        for output in self._outputs:
            if id(output) not in outputs:
                outputs[id(output)] = self._output(output, results, grown, args)
        return [outputs[id(output)] for output in self._outputs]

    def _output(
        self,
        plan: OutputPlan,
        results: Sequence[Any],
        grown: dict[int, SparkTensor],
        args: Sequence[Any],
    ) -> Any:
        if isinstance(plan, PlainOutput):
            return results[plan.position]
        if isinstance(plan, GrownState):
            return grown[plan.argument]
        pages, head = (results[position] for position in plan.positions)
        length = self._lengths[id(plan)](args)
        return new_state(plan.side, plan.form, pages, head, length)
