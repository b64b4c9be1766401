"""ODEBlock: a vector field and a solver as one layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from neuralode.errors import UsageError
from neuralode.nn.operator import obstacle, reference, register
from neuralode.nn.operator import solve as solve_operator
from neuralode.ode import Solution, SolverConfig, Stats, solve_configured
from neuralode.ode.observed_field import check_state, tensors
from neuralode.ode.solution import State


class ODEBlock(nn.Module):
    """Maps y(t0) to y(t1), the solution of dy/dt = field(t, y).

    Parameters are found at the call, so the block works under `torch.func.functional_call` with every gradient
    method. It solves in float32 or float64: under autocast the solve runs with autocast off, since the rounding of
    a bfloat16 field would defeat the error estimate.

    Args:
        field: `f(t, y)` or `f(y)`, a module or a function, returning dy/dt in the shape of y. If all arguments but the
            first have a default, the first is the state, unless its name is t or time.
        solver: method, tolerances, gradient and time span.
        augment: zeros appended along dimension 1 before the solve (ANODE, Dupont et al. 2019); the field then acts
            on the larger state and the block returns it.
        output: `final` returns y(t1), `trajectory` all requested times, [T, *shape].
    """

    autonomous: bool
    """Whether the field is f(y)."""

    def __init__(
        self,
        field: Callable[..., Any],
        solver: SolverConfig | None = None,
        *,
        augment: int = 0,
        output: str = "final",
    ):
        super().__init__()
        if output not in ("final", "trajectory"):
            raise UsageError(f"output is {output!r}; it has to be 'final' or 'trajectory'.")
        if not isinstance(solver, SolverConfig | None):
            raise UsageError(
                f"solver is a {type(solver).__name__}; give a SolverConfig, for example SolverConfig(method='tsit5')."
            )
        self.field = field
        self.solver = solver or SolverConfig()
        self.augment, self.output = augment, output
        self.stats: Stats | None = None
        """Statistics of the last call."""
        self._number = register(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "field":  # also one that takes another's place
            self.autonomous = _takes_state_alone(value)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "stats": None}  # which may hold a graph

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number = register(self)  # of the copy

    def forward(self, y0: State, t: torch.Tensor | Sequence[float] | None = None, *, prepared: bool = False) -> State:
        """Solves from y0.

        Args:
            y0: initial state, a tensor of any shape or a tuple of tensors.
            t: output times, [T]; the solver's time span if None. Given times, the block returns the trajectory.
            prepared: y0 is augmented already.
        """
        if torch.compiler.is_compiling() and isinstance(y0, torch.Tensor) and not obstacle(self._number, self.training):
            return self._compiled(y0, t)
        solution = self.solve(y0, t, prepared=prepared)
        return solution.final if t is None and self.output == "final" else solution.ys

    def solve(self, y0: State, t: torch.Tensor | Sequence[float] | None = None, *, prepared: bool = False) -> Solution:
        """As `forward`, returning the whole Solution."""
        state = y0 if prepared else self._prepare(y0)
        field = self._of_time_and_state() if self.autonomous else self.field
        times: Any = self.solver.t_span if t is None else t
        with torch.autocast(tensors(state)[0].device.type, enabled=False):
            solution = solve_configured(field, state, times, self.solver)
        self.stats = solution.stats
        return solution

    def _compiled(self, y0: torch.Tensor, t: torch.Tensor | Sequence[float] | None) -> torch.Tensor:
        """As `forward`, the solve being one operator to the compiler."""
        state = self._prepare(y0)
        assert isinstance(state, torch.Tensor)
        ts = torch.as_tensor(self.solver.t_span if t is None else t, dtype=state.real.dtype, device=state.device)
        ys = solve_operator(state, ts, [*self.parameters(), *self.buffers()], reference(self._number))
        return ys[-1] if t is None and self.output == "final" else ys

    def vector_field(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The field at (t, y), whichever way it takes its arguments."""
        return self.field(y) if self.autonomous else self.field(t, y)

    def _of_time_and_state(self) -> _Autonomous:
        """The field as f(t, y): the same object in every solve, for what is known of it is kept with it."""
        known: _Autonomous | None = self.__dict__.get("_wrapped")
        if known is None or known.field is not self.field:
            known = self.__dict__["_wrapped"] = _Autonomous(self.field)  # not a part of the block's state
        return known

    def augmented(self, y0: torch.Tensor) -> torch.Tensor:
        """y0 with the block's zeros appended along dimension 1."""
        if not self.augment:
            return y0
        return torch.cat([y0, y0.new_zeros(y0.shape[0], self.augment, *y0.shape[2:])], dim=1)

    def _prepare(self, y0: State) -> State:
        check_state(y0)
        if isinstance(y0, tuple):
            if self.augment:
                raise UsageError("a tuple state cannot be augmented; append the zeros to the part that needs them.")
            return tuple(_full_precision(part, self.field) for part in y0)
        return self.augmented(_full_precision(y0, self.field))


class _Autonomous(nn.Module):
    """f(t, y) from f(y)."""

    def __init__(self, field: Callable[..., Any]):
        super().__init__()
        self.field = field

    def forward(self, t: torch.Tensor, y: Any) -> Any:
        return self.field(y)


_TIMES = ("t", "time", "")
"""Names of a first parameter that is the time, where the second has a default."""


def _takes_state_alone(field: Callable[..., Any]) -> bool:
    function = getattr(field, "_orig_mod", field)  # what torch.compile wrapped
    function = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return True  # a builtin such as torch.neg, which has no signature, acts on the state
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    if len(required) > 1 or not positional:
        return False
    names, is_time = [p.name for p in positional], positional[0].name.strip("_").lower() in _TIMES
    others = [f"*{p.name}" for p in parameters if p.kind is p.VAR_POSITIONAL]
    if others and not is_time:
        raise UsageError(
            f"the field takes ({', '.join(names + others)}), and {names[0]} may be the state or the time; give it as "
            "f(y) or f(t, y)."
        )
    return not others and (len(positional) == 1 or not is_time)


def _full_precision(y: torch.Tensor, field: Any) -> torch.Tensor:
    low = (torch.float16, torch.bfloat16)
    if isinstance(field, nn.Module) and any(p.dtype in low for p in field.parameters()):
        raise UsageError(
            "the field's parameters are in half precision, whose rounding defeats error control; keep the block in "
            "float32 and use torch.autocast around the model."
        )
    return y.float() if y.dtype in low else y
