"""Solves run eagerly: a loop whose length the data decide is nothing that `torch.compile` could trace."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch._C._dynamo.eval_frame import (
    _FrameAction,
    _FrameExecStrategy,
    get_eval_frame_callback,
    set_code_exec_strategy,
)

Function = TypeVar("Function", bound=Callable[..., Any])

_WHY = "the data decide how many steps a solve takes; under fullgraph=True solve with an ODEBlock, which is taken whole"


def eager(function: Function) -> Function:
    """Makes `torch.compile` leave a function alone; fields that are compiled themselves stay so inside it.

    As `torch.compiler.disable`, but only where a compiler is at work: its import takes more than a second, and each
    call through it some microseconds.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if get_eval_frame_callback() is None:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    run._torchdynamo_disable_msg = _WHY  # type: ignore[attr-defined]
    code = cast(types.FunctionType, run).__code__
    set_code_exec_strategy(code, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.DEFAULT))
    return cast(Function, run)
