"""What ``generate`` of a model calls, and a word if nothing of that is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .report import activity


def called_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that a user of a model or its ``generate`` may call.

    Those are the model and whatever in it has a ``generate`` of its own: a wrapper, such as PEFT's
    or one that hands attributes on to a module inside, hands ``generate`` on, too.
    """
    found = [m for m in model.modules() if m is model or hasattr(type(m), "generate")]
    # A wrapper may keep what it hands on to where torch does not see it.
    owner = getattr(getattr(model, "generate", None), "__self__", None)
    if isinstance(owner, nn.Module) and all(owner is not m for m in found):
        found.append(owner)
    return found


def watch_generate(model: nn.Module, complain: Callable[[str], None]) -> None:
    """Let ``complain`` be told when ``generate`` of a model ends and the backend had no part in it.

    A model without ``generate`` is left as it is.
    """
    if callable(getattr(model, "generate", None)):
        # Not by setattr, which a wrapper may hand on to the module inside.
        vars(model)["generate"] = _WatchedGenerate(model, complain)


class _WatchedGenerate:
    """Stands in for a model's ``generate`` until the backend had part in a call.

    Not a closure: a copy of the model must call the copy.
    """

    def __init__(self, model: nn.Module, complain: Callable[[str], None]) -> None:
        before = vars(model).get("generate")
        if isinstance(before, _WatchedGenerate):
            before._restore()  # the model is optimized again
        self._model = model
        self._complain = complain
        self._own = vars(model).get("generate")
        self.__wrapped__: Callable[..., Any] = model.generate  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = activity()
        result = self.__wrapped__(*args, **kwargs)
        if activity() != before:
            self._restore()
            return result
        self._complain(
            f"generate of {type(self._model).__name__} ran nothing that spark has compiled, its "
            "cache is dense: it calls none of the modules that are compiled (optimize the one that "
            "it calls), or Dynamo is disabled there"
        )
        return result

    def _restore(self) -> None:
        if self._own is not None:
            vars(self._model)["generate"] = self._own
        else:
            vars(self._model).pop("generate", None)
