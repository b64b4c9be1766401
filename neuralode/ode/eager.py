"""Solves run eagerly: a loop whose length the data decide is nothing that `torch.compile` could trace."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """Makes `torch.compile` leave a function alone; fields that are compiled themselves stay so inside it.

    As `torch.compiler.disable`, whose import of the compiler takes more than a second, but only once a compiler is
    there.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not disabled and "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            import torch

            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    return cast(Function, run)
