"""A block's solve as one operator of PyTorch, so that `torch.compile(fullgraph=True)` takes a model with it whole.

A compiler cannot trace a solve: the data decide how many steps it takes. It sees one operator that knows the shape of
what comes out; inside it, the solve runs as ever, in the engine that serves it. The backward pass solves once more,
since nothing but tensors may pass from one operator to the next, and compares what it finds with the forward pass.
"""

from __future__ import annotations

import itertools
import secrets
import warnings
import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrizations import _SpectralNorm

from neuralode.errors import UsageError
from neuralode.kernels.watch import Watch
from neuralode.nn.others import Others, others_of
from neuralode.ode.parameters import leaves_of, new_mark

_REMEDY = "keep the block out with torch.compiler.disable(block)."
_UNSEEN = (
    "and inside torch.compile the block does not see what becomes of it; make it a parameter of the block or a part of "
    f"the state, or {_REMEDY}"
)
_blocks: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_EXPORTED = secrets.randbits(60) << 2
"""Added to the numbers in exported programs, which other processes may load, where blocks have the same numbers."""
_with_constants: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Blocks whose fields reach tensors that are not the block's own and want no gradient, as yet."""
_to_look_at: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
"""Blocks whose fields hold what a Watch cannot look at, and whether gradients were wanted when they were compiled."""
_lossy: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Blocks whose gradient showed parameters that are not the block's own."""
_said: set[tuple[int, str]] = set()
_FAR = 10.0
"""Tolerances by which the states of the backward pass may differ from those of the forward pass."""


def register(block: nn.Module) -> int:
    """A number by which the operator finds a block, whose forward(y0, t) gives the states at the times t."""
    number = next(_numbers)
    _blocks[number] = block
    return number


def reference(number: int) -> int:
    """The number as a program has it that is compiled, or exported, now."""
    return number + _EXPORTED if torch.compiler.is_exporting() else number


def obstacle(number: int, training: bool) -> str:
    """Why a block's solve cannot be one operator in what is compiled now; empty if it can be.

    The compiler runs this while it traces, and takes the answer for a constant as long as `training`, the block's
    mode, is the same.
    """
    block = _blocks[number]
    lasting = _unfit(block)
    changed = "" if lasting or not _changed_while_tracing(block) else "what its field holds is changed before the call"
    reason = lasting or changed  # which is over when the block is compiled by itself
    if reason and (whole := _wanted_whole()):
        raise UsageError(f"{whole} cannot take an ODEBlock, for {reason}.")
    if lasting and (number, reason) not in _said:
        _said.add((number, reason))
        warnings.warn(f"torch.compile leaves an ODEBlock out, for {reason}", stacklevel=2)
    return reason


obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler's own way takes a second to import


def _unfit(block: nn.Module) -> str:
    """Why no solve of a block can be one operator; empty if one can."""
    for module in block.modules():
        if module.training and (what := _changes(module)):
            return f"its field has a {type(module).__name__} in training mode, which {what} at every call"
        if name := _loose(module):
            return f"its field holds the tensor {name!r}, which is no parameter and no buffer"
    others = _others(block)
    if others.learned or block in _lossy:
        return (
            f"its field reaches {others.learned or 'a parameter'}, which is not the block's own, as it would be if the "
            "field were a module that holds it"
        )
    if others.constant:
        _with_constants.add(block)
    if others.hidden:
        _to_look_at[block] = torch.is_grad_enabled() and not torch.compiler.is_exporting()
    return ""


def _others(block: nn.Module) -> Others:
    return others_of(block, cast(Any, block).field)


def _wanted_whole() -> str:
    """What is at work now that takes nothing but whole models; empty if nothing."""
    if torch.compiler.is_exporting():
        return "torch.export"
    translator = _translator()
    return "torch.compile(fullgraph=True)" if translator is not None and translator.one_graph else ""


def _translator() -> Any:
    """What traces now; None for torch.export, which can do without."""
    from torch._dynamo.symbolic_convert import InstructionTranslator, tls

    return None if getattr(tls, "current_tx", None) is None else InstructionTranslator.current_tx()


def _changes(module: nn.Module) -> str:
    """What a module of PyTorch's does anew at every call in training mode; empty if nothing."""
    if isinstance(module, _NormBase):
        return "changes its statistics" if module.track_running_stats else ""
    if isinstance(module, _SpectralNorm):
        return "changes its buffers"
    draws = module.p > 0 if isinstance(module, _DropoutNd) else isinstance(module, nn.RReLU)
    return "draws random numbers" if draws else ""


def _loose(module: nn.Module) -> str:
    """The name of a tensor that a module holds besides its parameters and buffers; empty if there is none."""
    return next((name for name, value in vars(module).items() if isinstance(value, torch.Tensor)), "")


def _changed_while_tracing(block: nn.Module) -> bool:
    """Whether the code that is traced now sets what the field holds, which takes place only after the operator.

    Buffers do not count: the operator is given them as they then are.
    """
    if (translator := _translator()) is None:
        return False
    effects = translator.output.side_effects
    buffers = {id(module): module._buffers for module in block.modules()}
    dicts = set(map(id, buffers.values()))
    for key in Watch(block).seen & effects.id_to_variable.keys() - dicts:
        variable = effects.id_to_variable[key]
        names = set(effects.store_attr_mutations.get(variable, ()))
        if names - set(buffers.get(key, ())) or (not names and effects.is_modified(variable)):
            return True
    return False


@torch.library.custom_op("neuralode::solve", mutates_args=())
def solve(y0: torch.Tensor, t: torch.Tensor, held: Sequence[torch.Tensor], block: int) -> torch.Tensor:
    """The states of a block's solve, [T, *shape of y0], for times t, [T]; `held` are its parameters and buffers."""
    if _block(block) in _with_constants and (name := _others(_block(block)).learned):
        raise UsageError(f"the field reaches {name}, which wants a gradient by now and is not the block's, {_UNSEEN}")
    if _block(block) in _to_look_at and not torch.is_inference_mode_enabled():  # where there are no gradients to lose
        _look_at_gradient(block, y0, t, held)
    with _autograd(), torch.no_grad():
        return _states(block, y0, t, held).contiguous()


def _look_at_gradient(number: int, y0: torch.Tensor, t: torch.Tensor, held: Sequence[torch.Tensor]) -> None:
    """Looks whether the field depends on parameters that the operator does not have, whose gradients would be lost.

    Raises:
        UsageError: if it does and gradients are wanted; if not, it warns.
    """
    block: Any = _block(number)
    parameters, watch = len(list(block.parameters())), Watch(block.field)
    own = _own(number, held, [i < parameters and x.is_floating_point() for i, x in enumerate(held)])
    with _autograd(), torch.enable_grad():
        mark = new_mark()
        ys = _states(number, y0.detach(), t.detach(), own)
        others = leaves_of([ys], own, mark)
    watch.restore()  # it is no call more to those who count
    if others:
        _lossy.add(block)
        sentence = f"the field uses a parameter that is not the block's own, {_UNSEEN}"
        if _to_look_at[block]:
            raise UsageError(sentence)
        warnings.warn(sentence, stacklevel=2)
    del _to_look_at[block]


@solve.register_fake
def _(y0: torch.Tensor, t: torch.Tensor, held: Sequence[torch.Tensor], block: int) -> torch.Tensor:
    return y0.new_empty(t.shape[0], *y0.shape)


@torch.library.custom_op("neuralode::solve_backward", mutates_args=())
def solve_backward(
    gradient: torch.Tensor, ys: torch.Tensor, y0: torch.Tensor, t: torch.Tensor, held: Sequence[torch.Tensor],
    wanted: Sequence[bool], block: int,
) -> list[torch.Tensor]:  # fmt: skip
    """Those of the gradients of y0, of t and of what the block holds that are wanted, from that of the states `ys`."""
    first = [x.detach().requires_grad_(w) for x, w in zip((y0, t), wanted, strict=False)]
    inputs = [*first, *_own(block, held, wanted[2:])]
    with _autograd(), torch.enable_grad():
        mark, drawn = new_mark(), torch.get_rng_state()
        again = _states(block, inputs[0], inputs[1], inputs[2:])
        if not torch.equal(drawn, torch.get_rng_state()):
            raise UsageError(
                "the field draws random numbers (dropout?), and inside torch.compile the backward pass would draw "
                f"others; {_REMEDY}"
            )
        if leaves_of([again], inputs, mark):
            raise UsageError(f"the field uses a parameter that is not the block's own, {_UNSEEN}")
        _compare(block, ys, again.detach())
        moving = [x for x in inputs if x.requires_grad]
        found = torch.autograd.grad(again, moving, gradient, allow_unused=True)
    # what an operator gives has to be memory of its own
    return [torch.zeros_like(x) if g is None else g.clone() for g, x in zip(found, moving, strict=True)]


@solve_backward.register_fake
def _(
    gradient: torch.Tensor, ys: torch.Tensor, y0: torch.Tensor, t: torch.Tensor, held: Sequence[torch.Tensor],
    wanted: Sequence[bool], block: int,
) -> list[torch.Tensor]:  # fmt: skip
    return [torch.empty_like(x) for x, w in zip((y0, t, *held), wanted, strict=True) if w]


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    y0, t, held, ctx.block = inputs
    ctx.save_for_backward(output, y0, t, *held)


def _gradients(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    ys, y0, t, *held = ctx.saved_tensors
    to_y0, to_t, to_held, _ = ctx.needs_input_grad
    wanted = [to_y0, to_t, *to_held]
    found = iter(solve_backward(gradient, ys, y0, t, held, wanted, ctx.block))
    of_y0, of_t, *of_held = (next(found) if w else None for w in wanted)
    return of_y0, of_t, of_held, None


def _refuse_second_derivatives(ctx: Any, *gradients: Any) -> Any:
    raise UsageError(f"a compiled ODEBlock has first derivatives only; for second ones, {_REMEDY}")


solve.register_autograd(_gradients, setup_context=_save)
solve_backward.register_autograd(_refuse_second_derivatives)


def _autograd() -> Any:
    """Autograd again, which does not look inside an operator, and the count of writes."""
    excluded, keys = torch._C._dispatch_tls_local_exclude_set(), torch._C.DispatchKey
    for key in (keys.AutogradOther, keys.AutogradFunctionality, keys.ADInplaceOrView):
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def _block(number: int) -> nn.Module:
    """The block of a number that a program names."""
    block = _blocks.get(number if number < _EXPORTED else number - _EXPORTED)
    if block is None:
        raise UsageError(
            f"there is no ODEBlock {number} in this process: its model is gone, or another process exported the "
            "program, which does not carry the field; keep the model, or save its state_dict."
        )
    return block


def _own(number: int, held: Sequence[torch.Tensor], wanted: Sequence[bool]) -> list[torch.Tensor]:
    """What the block holds, in a graph of its own, and buffers that it may write to without anybody noticing."""
    parameters = len(list(_block(number).parameters()))
    own = [x.detach() if i < parameters else x.detach().clone() for i, x in enumerate(held)]
    return [x.requires_grad_(w) for x, w in zip(own, wanted, strict=True)]


def _states(number: int, y0: torch.Tensor, t: torch.Tensor, held: Sequence[torch.Tensor]) -> torch.Tensor:
    block = _block(number)
    for module in block.modules():
        if name := _loose(module):
            raise UsageError(f"the field holds the tensor {name!r}, which is no parameter and no buffer, {_UNSEEN}")
    names = [name for name, _ in (*block.named_parameters(), *block.named_buffers())]
    given, versions = {f"block.{name}": x for name, x in zip(names, held, strict=True)}, list(map(_version, held))
    ys = cast(torch.Tensor, torch.func.functional_call(_Uncompiled(block), given, (y0, t)))
    for name, x, version in zip(names, held, versions, strict=True):
        if given[f"block.{name}"] is not x or _version(x) != version:
            raise UsageError(f"a call of the field changes {name!r}, which is lost inside torch.compile; {_REMEDY}")
    return ys


class _Uncompiled(nn.Module):
    """A block's own forward, without its hooks and without what `block.compile()` put in the place of its call."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, y0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.block.forward(y0, t, prepared=True))


def _version(x: torch.Tensor) -> int:
    """How often it was written to, where PyTorch counts that."""
    return 0 if x.is_inference() else x._version


def _compare(number: int, ys: torch.Tensor, again: torch.Tensor) -> None:
    """Raises UsageError unless the states are those of the forward pass."""
    solver: Any = _block(number).solver
    if not torch.allclose(again, ys, rtol=_FAR * solver.rtol, atol=_FAR * solver.atol, equal_nan=True):
        raise UsageError(
            "the backward pass of a compiled ODEBlock solves again, and finds other states than the forward pass: "
            f"the field has changed in between, or its calls change it; {_REMEDY}"
        )
