"""Everything one needs to say about a solve, in one typed place; blocks and configs share it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from neuralode.errors import UsageError, unknown
from neuralode.ode.controllers import Controller, controller
from neuralode.ode.methods import check_method, options_of, takes_fixed_steps

ENGINES = ("auto", "fused", "stepper", "torchdiffeq")
GRADIENTS = ("exact", "adjoint")
CHECKPOINTS = ("auto", "always", "never")
DEFAULT_MAX_STEPS = 10_000
DEFAULT_MEMORY_BUDGET = 2**31


@dataclass
class SolverConfig:
    """How to solve and how to differentiate. Raises UsageError for a value that no solve could use."""

    method: str = "dopri5"
    """Name of the method; `neuralode.ode.methods()` lists them."""
    rtol: float = 1e-4
    """Relative tolerance, for methods with error control."""
    atol: float = 1e-5
    """Absolute tolerance, in the units of the state."""
    step_size: float | None = None
    """Step of a fixed-step method, in the units of t."""
    t_span: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """Where a block's solve starts and ends, in the units of t."""
    gradient: str = "exact"
    """`exact` (of the discrete solve) or `adjoint` (continuous, to the tolerance, in constant memory)."""
    adjoint_rtol: float | None = None
    """Tolerances of the adjoint's own solve; those of the forward solve if None."""
    adjoint_atol: float | None = None
    adjoint_seminorm: bool = False
    """Leave the parameters out of the adjoint's error norm (Kidger et al. 2021, "Hey, that's not an ODE")."""
    adjoint_interpolated: bool = False
    """Read the state from the forward solve's dense output instead of solving it backwards."""
    controller: Any = "I"
    """Step-size control: `I`, `PI`, `PID`, or a Controller of one's own."""
    checkpoint: str | int = "auto"
    """For the exact gradient: `never` keeps the graph of every step, `always` recomputes each step from its saved
    state, a number keeps that many states and recomputes in between, `auto` keeps graphs within the memory budget."""
    memory_budget: int = DEFAULT_MEMORY_BUDGET
    """Bytes that the kept graphs may take under `checkpoint="auto"`."""
    per_sample: bool = False
    """Give each sample, along dimension 0, its own step sizes."""
    estimates: bool = False
    """Sum up the error and stiffness estimates as differentiable tensors in the statistics (regularisers)."""
    engine: str = "auto"
    max_steps: int = DEFAULT_MAX_STEPS
    """Steps after which a solve gives up. The torchdiffeq engine bounds its adaptive methods alone: its fixed steps are
    those of `step_size`, and the steps of `scipy_solver` are scipy's."""
    max_steps_between: int | None = None
    """Steps from one output time to the next after which an adaptive solve gives up: torchdiffeq's own limit."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of the method, as torchdiffeq names them."""

    def __post_init__(self) -> None:
        check_method(self.method)
        check_engine(self.engine)
        check_gradient(self.gradient)
        if self.options:
            check_options(self.options, self.method)
        self.controller_object()
        if not _is_checkpoint(self.checkpoint):
            raise UsageError(
                f"solver.checkpoint is {self.checkpoint!r}; it has to be 'auto', 'always', 'never' or a number."
            )
        for name in ("rtol", "atol", "adjoint_rtol", "adjoint_atol", "step_size"):
            value = getattr(self, name)
            optional = name not in ("rtol", "atol")
            if not (optional and value is None) and not (_is_finite(value) and value > 0):
                shown = f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
                raise UsageError(f"solver.{name} is {shown}; it has to be a positive number, as a float.")
        for name, least in (("max_steps", 1), ("memory_budget", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UsageError(f"solver.{name} is {value!r}; it has to be a whole number of at least {least}.")
        span = self.t_span if isinstance(self.t_span, list | tuple) else []
        if len(span) != 2 or span[0] == span[1] or not all(map(_is_finite, span)):
            raise UsageError(f"solver.t_span is {self.t_span}; it has to be two different times, both finite.")
        if (
            takes_fixed_steps(self.method)
            and self.step_size is None
            and not set(self.options) & {"step_size", "grid_constructor"}
        ):
            raise UsageError(
                f"method {self.method!r} takes fixed steps: give step_size (solver.step_size), such as 0.1."
            )

    def controller_object(self) -> Controller:
        """The controller with its limits, after the options safety, ifactor and dfactor of torchdiffeq."""
        chosen = controller(self.controller)
        names = {"safety": "safety", "ifactor": "max_factor", "dfactor": "min_factor"}
        changed = {ours: float(self.options[theirs]) for theirs, ours in names.items() if theirs in self.options}
        return replace(chosen, **changed) if changed else chosen


def _is_checkpoint(value: Any) -> bool:
    return value in CHECKPOINTS or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def check_options(options: Iterable[str], method: str) -> None:
    """Raises UsageError for an option that the method does not take, naming the nearest one that it does."""
    known = options_of(method)
    for option in options:
        if option not in known:
            raise UsageError(unknown(f"option for {method!r}:", option, known))


def check_engine(name: str) -> None:
    if name not in ENGINES:
        raise UsageError(unknown("engine", name, ENGINES))


def check_gradient(name: str) -> None:
    if name not in GRADIENTS:
        raise UsageError(unknown("gradient", name, GRADIENTS))
