"""The reference engine: every solve through torchdiffeq."""

from __future__ import annotations

from typing import Any

import torch
import torchdiffeq

from neuralode.errors import UsageError
from neuralode.ode.adjoint import refuse_transforms
from neuralode.ode.diagnosis import bad_samples, diagnosis
from neuralode.ode.methods import supported_callbacks, takes_fixed_steps
from neuralode.ode.observed_field import Field, ObservedField, TooManySteps, tensors
from neuralode.ode.solution import SolveError, State, Stats, Status
from neuralode.ode.solver_config import SolverConfig

# How torchdiffeq words the assertions by which it gives up.
_FAILURES = {
    "max_num_steps exceeded": Status.MAX_STEPS,
    "underflow in dt": Status.STEP_UNDERFLOW,
    "non-finite values in state": Status.NON_FINITE,
}


def run(field: Field, y0: State, t: torch.Tensor, args: tuple[Any, ...], config: SolverConfig, stats: Stats) -> State:
    """Solves from t[0] through all of t, [T]; returns the states [T, *shape] and fills `stats`.

    Raises SolveError with a diagnosis where torchdiffeq gives up or the result is not finite.
    """
    direction = 1.0 if t[-1] > t[0] else -1.0
    callbacks = supported_callbacks(config.method)
    observed = ObservedField(field, y0, args, stats, callbacks, config.max_steps, direction)
    if config.method == "scipy_solver" and config.gradient == "exact" and torch.is_grad_enabled():
        _refuse_lost_gradient(observed, y0)
    kwargs: dict[str, Any] = {
        "rtol": config.rtol,
        "atol": config.atol,
        "method": config.method,
        "options": _options(config, len(t)),
    }
    try:
        if config.gradient == "adjoint" and torch.is_grad_enabled():
            refuse_transforms()
            observed.refuse_unknown_parameters(t[0], y0)
            kwargs.update(adjoint_rtol=config.adjoint_rtol, adjoint_atol=config.adjoint_atol)
            if config.adjoint_seminorm:
                kwargs["adjoint_options"] = {**kwargs["options"], "norm": "seminorm"}
            ys = torchdiffeq.odeint_adjoint(observed, y0, t, adjoint_params=observed.parameters, **kwargs)
        else:
            ys = torchdiffeq.odeint(observed, y0, t, **kwargs)
    except TooManySteps as error:
        raise _error(Status.MAX_STEPS, observed, y0) from error
    except AssertionError as error:
        status = next((status for words, status in _FAILURES.items() if words in str(error)), None)
        if status is None:
            raise
        broken: State = y0
        if status is Status.STEP_UNDERFLOW and bad_samples(y0) | bad_samples(observed.last_derivative):
            # a NaN makes the error estimate NaN and the next step size zero
            status = Status.NON_FINITE
            if not bad_samples(y0) and observed.last_derivative is not None:
                broken = observed.last_derivative
        raise _error(status, observed, broken) from error
    finally:
        observed.forward_done = True
    if not all(torch.isfinite(part[-1]).all() for part in tensors(ys)):
        last = ys[-1] if isinstance(ys, torch.Tensor) else tuple(part[-1] for part in ys)
        raise _error(Status.NON_FINITE, observed, last)
    return ys


def _options(config: SolverConfig, outputs: int) -> dict[str, Any]:
    options = dict(config.options)
    if takes_fixed_steps(config.method):
        if config.step_size is not None:
            options.setdefault("step_size", config.step_size)
            # torchdiffeq interpolates linearly between steps by default, which would cost the method its order
            if outputs > 2:
                options.setdefault("interp", "cubic")
    elif config.method != "scipy_solver":
        options.setdefault("max_num_steps", config.max_steps)
    return options


def _error(status: Status, observed: ObservedField, state: State) -> SolveError:
    stats = observed.stats
    stats.diagnosis = diagnosis(status, stats, observed.last_time if stats.accepted else None, state)
    return SolveError(stats.diagnosis, status, stats)


def _refuse_lost_gradient(observed: ObservedField, y0: State) -> None:
    if observed.parameters or any(part.requires_grad for part in tensors(y0)):
        raise UsageError(
            "method 'scipy_solver' computes outside torch, so gradient='exact' would be lost without a word; choose "
            "another method, or solve under torch.no_grad()."
        )
