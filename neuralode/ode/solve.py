"""`solve`: the front that the rest of the package uses."""

from __future__ import annotations

import functools
import itertools
import math
import reprlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from neuralode.errors import UsageError
from neuralode.ode import stepper_engine, torchdiffeq_engine
from neuralode.ode.clock import host_values
from neuralode.ode.controllers import Controller
from neuralode.ode.eager import eager
from neuralode.ode.events import Event
from neuralode.ode.fastest import run_fastest
from neuralode.ode.methods import METHODS, in_torchdiffeq
from neuralode.ode.observed_field import Field, check_state, refuse_other_arguments, tensors
from neuralode.ode.setup import unable
from neuralode.ode.solution import Events, Solution, SolveError, State, Stats, Status
from neuralode.ode.solver_config import DEFAULT_MAX_STEPS, DEFAULT_MEMORY_BUDGET, SolverConfig


@eager
def solve(
    field: Field,
    y0: State,
    t: torch.Tensor | Sequence[float],
    *,
    args: Sequence[Any] = (),
    method: str = "dopri5",
    rtol: float = 1e-4,
    atol: float = 1e-5,
    step_size: float | None = None,
    options: dict[str, Any] | None = None,
    controller: str | Controller = "I",
    engine: str = "auto",
    gradient: str = "exact",
    checkpoint: str | int = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    per_sample: bool = False,
    dense: bool = False,
    estimates: bool = False,
    events: Event | Sequence[Event] | None = None,
    max_steps: int = DEFAULT_MAX_STEPS,
    throw: bool = True,
) -> Solution:
    """Solves dy/dt = field(t, y, *args) from y(t[0]) = y0 through every time of `t`.

    Args:
        field: `f(t, y, *args)`, t a scalar tensor, returning dy/dt in the shape of y.
        y0: initial state, a tensor of any shape or a tuple of tensors.
        t: output times, [T], rising or falling; the first is the initial time. [B, T] gives each sample, along
            dimension 0 of the state, times and steps of its own.
        args: further arguments of the field.
        method, rtol, atol, step_size, options, controller, checkpoint, memory_budget, estimates, max_steps: as in
            `SolverConfig`.
        engine: `auto`, `fused` (the whole solve in compiled kernels), `stepper` (any field) or `torchdiffeq`; the
            statistics say which ran and why. On a GPU, `auto` records the steps of a field that the kernels do not know
            as a CUDA graph, from the second solve of a kind on: `captured`.
        gradient: `exact` differentiates the discrete solve on its accepted steps; `adjoint` solves the continuous
            adjoint equation backwards (Chen et al. 2018, "Neural Ordinary Differential Equations").
        per_sample: each sample takes steps of its own; the field then receives t as [B, 1, ..., 1], which broadcasts
            against the state, and must not mix samples.
        dense: also return the solution as a function of time, `Solution.dense`.
        events: `g(t, y, *args)`, or several: the solve of a sample ends where one of them crosses zero, or, where it
            returns a bool, changes. It returns one number a sample, [B], and receives t in a shape that broadcasts
            against the state; or a scalar, for an event of the state as a whole. If it has an attribute `direction`,
            only crossings from negative to positive count (a positive one) or from positive to negative (a negative
            one), as in scipy. Two crossings within one step are not seen. From its event on a sample stays as it is,
            with a slope of zero, also where samples share their steps. `Solution.events` has the times and states,
            differentiable three times; the time of an event without a gradient (a bool, a sign, a detached state) is
            a constant.
        throw: raise SolveError on failure; otherwise return a Solution whose status says what happened and whose
            states are NaN. Where samples have steps of their own, only those that failed are NaN, as
            `Stats.failed_per_sample` says: the stepper solves once more, and takes the others to the end. Their
            gradients hold as well, unless something else that is damaged reaches the field (a NaN in `args`).

    Returns:
        A Solution: times [T], states [T, *shape], statistics and status.

    Raises:
        UsageError: for an argument that cannot be used.
        SolveError: when the solve fails and `throw` is true.
    """
    config = SolverConfig(
        method=method, rtol=rtol, atol=atol, step_size=step_size, gradient=gradient, engine=engine,
        controller=controller, checkpoint=checkpoint, memory_budget=memory_budget, per_sample=per_sample,
        estimates=estimates, max_steps=max_steps, options=options or {},
    )  # fmt: skip
    return solve_configured(field, y0, t, config, args=args, throw=throw, dense=dense, events=events)


@eager
def solve_configured(
    field: Field,
    y0: State,
    t: torch.Tensor | Sequence[float],
    config: SolverConfig,
    *,
    args: Sequence[Any] = (),
    throw: bool = True,
    dense: bool = False,
    events: Event | Sequence[Event] | None = None,
) -> Solution:
    """`solve` for a caller that holds a SolverConfig; same states, statistics and errors."""
    _check_arguments(y0, args)
    if torch.is_inference_mode_enabled() and (events is not None or _differentiates(config.method)):
        with torch.inference_mode(False), torch.no_grad():  # they differentiate on their way
            y0 = tuple(part.clone() for part in y0) if isinstance(y0, tuple) else y0.clone()
            t, args = (_ordinary(t), tuple(map(_ordinary, args)))
            return solve_configured(field, y0, t, config, args=args, throw=throw, dense=dense, events=events)
    first = tensors(y0)[0]
    ts = _times(t, first)
    by_sample = config.per_sample or ts.dim() == 2
    engine, reason = choose_engine(config, dense, by_sample, ts.shape[-1], events is not None)
    stats = Stats(engine, config.method, config.gradient, reason)
    status = Status.SUCCESS
    at: Callable[[Any], State] | None = None
    found: Events | None = None
    start = time.perf_counter()
    try:
        if engine == "fused":
            ys = run_fastest(field, y0, ts, tuple(args), config, stats)
        elif engine == "stepper":
            ys, at, found = stepper_engine.run(field, y0, ts, tuple(args), config, stats, dense, events)
        else:
            ys = torchdiffeq_engine.run(field, y0, ts, tuple(args), config, stats)
    except TypeError:
        refuse_other_arguments(field, args)
        raise  # a mistake inside the field, which its own words describe best
    except SolveError as error:
        if throw:
            raise
        status, failed = error.status, stats
        if by_sample and first.numel():
            stats = Stats("stepper", config.method, config.gradient, "it goes on without the samples that failed")
            ys, at, found = stepper_engine.run(
                field, y0, ts, tuple(args), config, stats, dense, events, strict=False, leave_out=True
            )
            stats.nfe, stats.diagnosis = stats.nfe + failed.nfe, failed.diagnosis
            failures = stats.failed_per_sample
            if failures is not None and not bool(failures.any()):  # so it may be with a field that draws
                status, stats.diagnosis = Status.SUCCESS, ""
        else:
            lost = [part.new_full((ts.shape[-1], *part.shape), math.nan) for part in tensors(y0)]
            ys = tuple(lost) if isinstance(y0, tuple) else lost[0]
    stats.seconds = time.perf_counter() - start
    return Solution(ts, ys, stats, status, at, found)


def choose_engine(
    config: SolverConfig, dense: bool = False, by_sample: bool = False, outputs: int = 2, events: bool = False
) -> tuple[str, str]:
    """The engine that serves a solve, and why; `fused` of a field that the kernels do not know means the stepper.

    Raises:
        UsageError: if the engine that was asked for cannot serve it.
    """
    obstacle = unable(config, by_sample, outputs, events, dense)
    if config.engine == "fused" and (dense or events):
        obstacle = "the kernels have no dense output and no events"
    if config.engine in ("fused", "stepper") and obstacle:
        raise UsageError(f"engine={config.engine!r} cannot serve this solve: {obstacle}; give engine='auto'.")
    if config.engine == "torchdiffeq" or obstacle:
        wanted = {
            "dense output": dense, "events": events, "estimates": config.estimates, "steps for each sample": by_sample,
            "choice of controller": config.controller != "I",
        }  # fmt: skip
        lacking = [name for name, asked in wanted.items() if asked]
        if not in_torchdiffeq(config.method):
            lacking.insert(0, f"method {config.method!r}")
        if lacking and config.engine == "torchdiffeq":
            raise UsageError(f"torchdiffeq has no {lacking[0]}; give engine='auto'.")
        if lacking:
            raise UsageError(f"no engine can serve this solve: {obstacle}; and torchdiffeq has no {lacking[0]}.")
        return "torchdiffeq", "asked for" if config.engine == "torchdiffeq" else obstacle
    if config.engine != "auto":
        return config.engine, "asked for"
    if dense or events:
        return "stepper", "not the kernels: they have no dense output and no events"
    return "fused", ""


def _differentiates(method: str) -> bool:
    return method in METHODS and METHODS[method].differentiates


def _check_arguments(y0: State, args: Sequence[Any]) -> None:
    check_state(y0)
    if not isinstance(args, tuple | list):
        raise UsageError(f"args is a {type(args).__name__}; give the field's further arguments as a tuple, args=(a,).")


def _ordinary(x: Any) -> Any:
    return x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x


def _times(t: torch.Tensor | Sequence[float], like: torch.Tensor) -> torch.Tensor:
    real = like.real.dtype if like.is_complex() else like.dtype
    if not real.is_floating_point:
        raise UsageError(f"the state is of type {like.dtype}; a solve needs a floating-point or complex state.")
    ts = t.to(like.device) if isinstance(t, torch.Tensor) else _as_tensor(t, real, like.device)
    if ts.dim() not in (1, 2) or ts.shape[-1] < 2:
        raise UsageError(f"t has shape {tuple(ts.shape)}; a solve needs at least two times, [T] or [B, T].")
    if not ts.is_floating_point():
        raise UsageError(f"t is of type {ts.dtype}; give times in floating point, for example t.float().")
    for values in [host_values(ts)] if ts.dim() == 1 else host_values(ts):
        _check_order(tuple(values))
    return ts


def _as_tensor(t: Any, real: torch.dtype, device: torch.device) -> torch.Tensor:
    precise = torch.promote_types(real, torch.float32)  # neighbouring times may be one in half precision
    try:
        return torch.tensor(t, dtype=precise, device=device)
    except (TypeError, ValueError):
        raise UsageError(f"t is {reprlib.repr(t)}; give the times as numbers, [0.0, 1.0], or as a tensor.") from None


@functools.lru_cache(maxsize=64)
def _check_order(times: tuple[float, ...]) -> None:
    gaps = [b - a for a, b in itertools.pairwise(times)]
    if not (all(map(math.isfinite, times)) and (min(gaps) > 0 or max(gaps) < 0)):
        shown = ", ".join(f"{time:g}" for time in times[:6]) + (", ..." if len(times) > 6 else "")
        raise UsageError(f"t is [{shown}]; the times have to be finite and strictly rising or strictly falling.")
