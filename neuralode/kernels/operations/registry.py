"""The operations of PyTorch, below autograd, that can be written as lines of a program: one handler each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from neuralode.kernels.values import Writer

Handler = Callable[[Writer, Any, Any, Any], Any]

HANDLERS: dict[Any, Handler] = {}
MAKERS: set[Any] = set()
"""Operations that make tensors of one number, of nothing but a shape."""


def handles(*functions: Any) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


def given_by(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments by name, with the defaults of the schema."""
    found = {}
    for i, argument in enumerate(func._schema.arguments):
        if i < len(args):
            found[argument.name] = args[i]
        else:
            found[argument.name] = kwargs.get(argument.name, argument.default_value)
    return found


def scaled(writer: Writer, register: int, width: int, factor: float) -> int:
    return writer.emit("scale", register, width=width, constants=(factor,))
