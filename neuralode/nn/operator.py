"""A block's solve as one operator of PyTorch, so that `torch.compile(fullgraph=True)` takes a model with it whole.

A compiler cannot trace a solve: the data decide how many steps it takes. It sees one operator that knows the shape of
what comes out; inside it, the solve runs as ever, in the engine that serves it. The backward pass solves once more,
since nothing but tensors may pass from one operator to the next.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from neuralode.errors import UsageError
from neuralode.ode.parameters import leaves_of, new_mark

_UNSEEN = (
    "and inside torch.compile the block does not see what becomes of it; make it a parameter of the block or a part of "
    "the state, or keep the block out with torch.compiler.disable(block)."
)
_blocks: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_looked_at: set[int] = set()


def register(block: nn.Module) -> int:
    """A number by which the operator finds a block, whose forward(y0, t) gives the states at the times t."""
    number = next(_numbers)
    _blocks[number] = block
    return number


@torch.library.custom_op("neuralode::solve", mutates_args=())
def solve(y0: torch.Tensor, t: torch.Tensor, parameters: Sequence[torch.Tensor], block: int) -> torch.Tensor:
    """The states of a block's solve, [T, *shape of y0], for times t, [T]; `parameters` are its field's."""
    if block not in _looked_at:
        _looked_at.add(block)
        _warn_of_others(block, y0, t, parameters)
    with torch.no_grad():
        return _states(block, y0, t, parameters).contiguous()


def _warn_of_others(number: int, y0: torch.Tensor, t: torch.Tensor, parameters: Sequence[torch.Tensor]) -> None:
    """Warns if the field depends on parameters that the operator does not have, whose gradients would be lost."""
    own = [x.detach().requires_grad_(x.is_floating_point()) for x in parameters]
    with _autograd(), torch.enable_grad():
        mark = new_mark()
        ys = _states(number, y0.detach(), t.detach(), own)
        others = leaves_of([ys], own, mark)
    if others:
        warnings.warn(f"the field uses a parameter that is not the block's own, {_UNSEEN}", stacklevel=2)


@solve.register_fake
def _(y0: torch.Tensor, t: torch.Tensor, parameters: Sequence[torch.Tensor], block: int) -> torch.Tensor:
    return y0.new_empty(t.shape[0], *y0.shape)


@torch.library.custom_op("neuralode::solve_backward", mutates_args=())
def solve_backward(
    gradient: torch.Tensor, y0: torch.Tensor, t: torch.Tensor, parameters: Sequence[torch.Tensor], block: int
) -> list[torch.Tensor]:
    """The gradients of y0, of t and of the parameters, from that of the states."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in (y0, t, *parameters)]
    with _autograd(), torch.enable_grad():
        mark, drawn = new_mark(), torch.get_rng_state()
        ys = _states(block, inputs[0], inputs[1], inputs[2:])
        if not torch.equal(drawn, torch.get_rng_state()):
            raise UsageError(
                "the field draws random numbers (dropout?), and inside torch.compile the backward pass would draw "
                "others; keep the block out with torch.compiler.disable(block)."
            )
        if leaves_of([ys], inputs, mark):
            raise UsageError(f"the field uses a parameter that is not the block's own, {_UNSEEN}")
        wanted = [x for x in inputs if x.requires_grad]
        found = iter(torch.autograd.grad(ys, wanted, gradient, allow_unused=True))
    gradients = [next(found) if x.requires_grad else None for x in inputs]
    # what an operator gives has to be memory of its own
    return [torch.zeros_like(x) if g is None else g.clone() for g, x in zip(gradients, inputs, strict=True)]


@solve_backward.register_fake
def _(
    gradient: torch.Tensor, y0: torch.Tensor, t: torch.Tensor, parameters: Sequence[torch.Tensor], block: int
) -> list[torch.Tensor]:
    return [torch.empty_like(x) for x in (y0, t, *parameters)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    y0, t, parameters, ctx.block = inputs
    ctx.save_for_backward(y0, t, *parameters)


def _gradients(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    y0, t, *parameters = ctx.saved_tensors
    to_y0, to_t, *to_parameters = solve_backward(gradient, y0, t, parameters, ctx.block)
    return to_y0, to_t, to_parameters, None


solve.register_autograd(_gradients, setup_context=_save)


def _autograd() -> Any:
    """Autograd again, which does not look inside an operator."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradOther, torch._C.DispatchKey.AutogradFunctionality):
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def _states(number: int, y0: torch.Tensor, t: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    block = _blocks[number]
    for module in block.modules():
        loose = [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]
        if loose:
            raise UsageError(f"the field holds the tensor {loose[0]!r}, which is no parameter and no buffer, {_UNSEEN}")
    held = dict(zip((name for name, _ in block.named_parameters()), parameters, strict=True))
    return cast(torch.Tensor, torch.func.functional_call(block, held, (y0, t), {"prepared": True}))
