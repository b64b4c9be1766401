"""`solve`: the front that the rest of the package uses."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from neuralode.errors import UsageError
from neuralode.ode import torchdiffeq_engine
from neuralode.ode.observed_field import Field, tensors
from neuralode.ode.solution import Solution, SolveError, State, Stats, Status
from neuralode.ode.solver_config import DEFAULT_MAX_STEPS, SolverConfig


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
    controller: Any = None,
    engine: str = "auto",
    gradient: str = "exact",
    checkpoint: str | int = "auto",
    per_sample: bool = False,
    dense: bool = False,
    events: Any = None,
    max_steps: int = DEFAULT_MAX_STEPS,
    throw: bool = True,
) -> Solution:
    """Solves dy/dt = field(t, y, *args) from y(t[0]) = y0 through every time of `t`.

    Args:
        field: `f(t, y, *args)`, t a scalar tensor, returning dy/dt in the shape of y.
        y0: initial state, a tensor of any shape or a tuple of tensors.
        t: output times, [T], rising or falling; the first is the initial time.
        args: further arguments of the field.
        method, rtol, atol, step_size, options, max_steps: as in `SolverConfig`.
        engine: `auto` or `torchdiffeq`.
        gradient: `exact` differentiates the discrete solve; `adjoint` solves the continuous adjoint equation
            backwards (Chen et al. 2018, "Neural Ordinary Differential Equations").
        throw: raise SolveError on failure; otherwise return a Solution whose status says what happened and whose
            states are NaN.

    Not built yet, refused with a sentence: `controller`, `checkpoint` other than `auto`, `per_sample`, `dense`,
    `events`, and times of shape [B, T].

    Returns:
        A Solution: times [T], states [T, *shape], statistics and status.

    Raises:
        UsageError: for an argument that cannot be used.
        SolveError: when the solve fails and `throw` is true.
    """
    absent = {
        "controller": controller is not None,
        "checkpoint": checkpoint != "auto",
        "per_sample": per_sample,
        "dense": dense,
        "events": events is not None,
    }
    for name, asked in absent.items():
        if asked:
            raise UsageError(f"solve({name}=...) is not built yet; leave it out.")
    config = SolverConfig(
        method=method, rtol=rtol, atol=atol, step_size=step_size, gradient=gradient, engine=engine,
        max_steps=max_steps, options=options or {},
    )  # fmt: skip
    return solve_configured(field, y0, t, config, args=args, throw=throw)


def solve_configured(
    field: Field,
    y0: State,
    t: torch.Tensor | Sequence[float],
    config: SolverConfig,
    *,
    args: Sequence[Any] = (),
    throw: bool = True,
) -> Solution:
    """`solve` for a caller that holds a SolverConfig; same states, statistics and errors."""
    first = tensors(y0)[0]
    ts = _times(t, first)
    stats = Stats(config.engine, config.method, config.gradient)
    if config.engine == "auto":
        stats.engine, stats.reason = "torchdiffeq", "the only engine so far"
    status = Status.SUCCESS
    start = time.perf_counter()
    try:
        ys = torchdiffeq_engine.run(field, y0, ts, tuple(args), config, stats)
    except SolveError as error:
        if throw:
            raise
        status = error.status
        lost = [torch.full((len(ts), *part.shape), float("nan"), dtype=part.dtype) for part in tensors(y0)]
        ys = tuple(part.to(first.device) for part in lost) if isinstance(y0, tuple) else lost[0].to(first.device)
    stats.seconds = time.perf_counter() - start
    return Solution(ts, ys, stats, status)


def _times(t: torch.Tensor | Sequence[float], like: torch.Tensor) -> torch.Tensor:
    real = like.real.dtype if like.is_complex() else like.dtype
    if not real.is_floating_point:
        raise UsageError(f"the state is of type {like.dtype}; a solve needs a floating-point or complex state.")
    ts = t.to(like.device) if isinstance(t, torch.Tensor) else torch.tensor(t, dtype=real, device=like.device)
    if ts.dim() == 2:
        raise UsageError("times of shape [B, T], one row a sample, are not built yet; give one row of times, [T].")
    if ts.dim() != 1 or len(ts) < 2:
        raise UsageError(f"t has shape {tuple(ts.shape)}; a solve needs at least two times, [T].")
    if not ts.is_floating_point():
        raise UsageError(f"t is of type {ts.dtype}; give times in floating point, for example t.float().")
    gaps = ts.detach().diff()
    if not (torch.isfinite(ts).all() and ((gaps > 0).all() or (gaps < 0).all())):
        shown = ", ".join(f"{float(time):g}" for time in ts[:6]) + (", ..." if len(ts) > 6 else "")
        raise UsageError(f"t is [{shown}]; the times have to be finite and strictly rising or strictly falling.")
    return ts
