"""The vector field as an engine sees it: counted, checked, and with its parameters held fast."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from neuralode.errors import FieldArgumentsError, UsageError
from neuralode.ode.packing import lasting
from neuralode.ode.solution import State, Stats

Field = Callable[..., Any]
"""A vector field: `f(t, y, *args)` with t a scalar tensor, returning dy/dt in the shape of y."""


def tensors(state: State) -> tuple[torch.Tensor, ...]:
    """The parts of a state, a lone tensor counting as one part."""
    return state if isinstance(state, tuple) else (state,)


def check_state(y0: Any) -> None:
    """Raises UsageError unless it is a tensor or a tuple of tensors."""
    if not all(isinstance(part, torch.Tensor) for part in tensors(y0) or [y0]):
        raise UsageError(f"y0 is a {type(y0).__name__}; give the initial state as a tensor or a tuple of tensors.")


def refuse_other_arguments(field: Field, args: Sequence[Any]) -> None:
    """Looks, after a solve that ended in a TypeError, whether it was the field's call that could not be made.

    Raises:
        FieldArgumentsError: if the field does not take t, y and these arguments.
    """
    try:
        taken = inspect.signature(field.forward if isinstance(field, nn.Module) else field)
    except (TypeError, ValueError):  # nothing that can be called, or a builtin that does not say
        if callable(field):
            return
        raise FieldArgumentsError(f"the field is a {type(field).__name__}; give a function f(t, y).") from None
    try:
        taken.bind(None, None, *args)
    except TypeError:
        names, given = ", ".join(taken.parameters), ", ".join(["t", "y", *(f"a{i + 1}" for i in range(len(args)))])
        raise FieldArgumentsError(f"the field takes ({names}), and a solve calls it as f({given}).") from None


class TooManySteps(Exception):
    """The step limit of the solve was reached."""


class ObservedField:
    """Wraps a field for one solve.

    It counts evaluations and vector-Jacobian products into `stats`, checks the shape that the field returns, and
    records the steps that torchdiffeq reports. The module's parameters are captured when it is made, so that a
    backward pass that evaluates the field again uses the very tensors of the forward pass, also where
    `functional_call` had swapped them in for the time of the call only.
    """

    def __init__(
        self,
        field: Field,
        y0: State,
        args: Sequence[Any],
        stats: Stats,
        callbacks: set[str],
        max_steps: int,
        direction: float,
    ):
        self.field, self.args, self.stats = field, tuple(args), stats
        self.shapes = [part.shape for part in tensors(y0)]
        self.captured: dict[str, torch.Tensor] = {}
        if isinstance(field, nn.Module):
            self.captured = {**dict(field.named_parameters()), **dict(field.named_buffers())}
        self.forward_done = False
        self.direction, self.last_time = direction, float("nan")
        self.last_derivative: State | None = None
        self.max_steps, self._attempts = max_steps, 0
        self.callback_step: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
        if "callback_accept_step" in callbacks:
            stats.accepted = stats.rejected = 0
            self.callback_step = self._begin
            self.callback_accept_step, self.callback_reject_step = self._accept, self._reject
        elif "callback_step" in callbacks:
            stats.accepted, stats.rejected = 0, 0
            self.callback_step = self._accept

    @property
    def parameters(self) -> tuple[torch.Tensor, ...]:
        """The captured tensors that require a gradient."""
        return tuple(p for p in self.captured.values() if p.requires_grad)

    def __call__(self, t: torch.Tensor, y: State) -> State:
        if self.forward_done and self.captured:  # evaluated by the backward pass
            assert isinstance(self.field, nn.Module)
            dy = functional_call(self.field, self.captured, (t, y, *self.args))
        else:
            dy = self.field(t, y, *self.args)
        if not self.forward_done:
            self.stats.nfe += 1
            self._check_shape(dy)
            self.last_derivative = dy
        return self._counting_products(lasting(dy) if isinstance(dy, torch.Tensor) else dy)

    def refuse_unknown_parameters(self, t: torch.Tensor, y0: State) -> None:
        """Raises UsageError if the field depends on a tensor that the continuous adjoint would not see."""
        detached = {name: p.detach() for name, p in self.captured.items()}
        state = tuple(part.detach() for part in y0) if isinstance(y0, tuple) else y0.detach()
        args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in self.args)
        with torch.enable_grad():
            if isinstance(self.field, nn.Module):
                dy = functional_call(self.field, detached, (t.detach(), state, *args))
            else:
                dy = self.field(t.detach(), state, *args)
        self.stats.nfe += 1
        self._check_shape(dy)
        if any(part.requires_grad for part in tensors(dy)) or any(
            isinstance(a, torch.Tensor) and a.requires_grad for a in self.args
        ):
            raise UsageError(
                "the field uses tensors that require a gradient but are not its registered parameters, so "
                "gradient='adjoint' would silently leave them out; make the field an nn.Module that owns them, or use "
                "gradient='exact'."
            )

    def _check_shape(self, dy: Any) -> None:
        regular = isinstance(dy, torch.Tensor | tuple) and all(isinstance(part, torch.Tensor) for part in tensors(dy))
        given = [tuple(part.shape) for part in tensors(dy)] if regular else type(dy).__name__
        wanted = [tuple(shape) for shape in self.shapes]
        if given != wanted:
            raise UsageError(
                f"the field returned {_shapes(given)} for a state of {_shapes(wanted)}; "
                "dy/dt has to have the shape of y."
            )

    def _counting_products(self, dy: State) -> State:
        """`dy` as new tensors that report when a gradient passes them, once for all parts of a tuple.

        New ones, for the field may return its own input or a parameter, whose hooks would outlive the solve.
        """
        if isinstance(dy, torch.Tensor):
            if dy.requires_grad:
                dy = dy.view_as(dy)
                dy.register_hook(self._count_product)
            return dy
        parts = tuple(part.view_as(part) for part in dy)
        watched = [part for part in parts if part.requires_grad]
        counted: list[bool] = []

        def count(gradient: torch.Tensor) -> None:
            if not counted:
                counted.append(True)
                self._count_product(gradient)

        for part in watched:
            part.register_hook(count)
        return parts

    def _count_product(self, _gradient: torch.Tensor) -> None:
        self.stats.nfe_backward += 1

    def _begin(self, _t: torch.Tensor, _y: torch.Tensor, _dt: torch.Tensor) -> None:
        # torchdiffeq's own limit begins anew at each output time
        if self._attempts == self.max_steps:
            raise TooManySteps
        self._attempts += 1

    def _accept(self, t: torch.Tensor, _y: torch.Tensor, dt: torch.Tensor) -> None:
        step = float(dt.detach())
        self.last_time = float(t.detach()) + self.direction * step
        self.stats.accepted = (self.stats.accepted or 0) + 1
        self.stats.step_sizes.append(step)

    def _reject(self, _t: torch.Tensor, _y: torch.Tensor, _dt: torch.Tensor) -> None:
        self.stats.rejected = (self.stats.rejected or 0) + 1


def _shapes(shapes: Any) -> str:
    return f"shape {shapes[0] if len(shapes) == 1 else tuple(shapes)}" if isinstance(shapes, list) else f"a {shapes}"
