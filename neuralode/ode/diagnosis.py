"""Why a solve failed, in one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from neuralode.ode.packing import has_samples
from neuralode.ode.solution import State, Stats, Status
from neuralode.ode.tolerance import finite_rows

REMEDIES = {
    Status.MAX_STEPS: "raise max_steps, loosen the tolerances, or make the field smoother",
    Status.STEP_UNDERFLOW: "the field is too stiff or not smooth here: loosen the tolerances or bound its weights",
    Status.NON_FINITE: "look for a NaN in the input, or lower the step size or the learning rate",
}
_STIFF = 2.0
"""Explicit methods take steps of at most about 2 to 4 over ‖J‖."""
_LONGER_STEPS = {"rkc2": "'esdirk4'", "esdirk4": ""}
"""What is left to recommend where a method for stiff fields was at work; rkc2 has no steps for each sample either."""


def diagnosis(
    status: Status, stats: Stats, time: float | None, suspect: State | None, stiffness: float = math.nan,
    sample: int | None = None, steepest: int | None = None,
) -> str:  # fmt: skip
    """The message of a SolveError.

    Args:
        time: where the solve stopped; None if no step was accepted.
        suspect: the state or derivative in which to look for samples that are not finite.
        sample: which sample it was that could not go on, where samples have steps of their own.
        stiffness: h·‖J‖ of the step that was tried last; NaN if unknown.
        steepest: where samples share their steps, the one that changes fastest.
    """
    where = f" at t = {time:.6g}" if time is not None else " in the first step"
    where += f" in sample {sample}" if sample is not None else ""
    samples = sorted(bad_samples(suspect))
    who = f"; fastest in sample {steepest}" if steepest is not None else ""
    who = f"; not finite in sample {', '.join(map(str, samples[:5]))}" if samples else who
    steps = ", ".join(f"{h:.3g}" for h in stats.step_sizes[-3:])
    last = f"; last accepted steps {steps}" if steps else ""
    stiff = f"; h·‖J‖ is about {stiffness:.2g}" if math.isfinite(stiffness) else ""
    remedy = REMEDIES[status]
    longer = _LONGER_STEPS.get(stats.method, "'esdirk4' or 'rkc2'" if sample is None else "'esdirk4'")
    if status is not Status.NON_FINITE and stiffness > _STIFF and longer:
        remedy += f"; h·‖J‖ above 2 says stiff: method={longer} takes longer steps"
    return (
        f"{stats.method} stopped{where}: {status.value} after {stats.nfe} evaluations{who}{last}{stiff}. "
        f"What to try: {remedy}."
    )


def diagnosis_of_fixed_steps(method: str, needed: int, allowed: int) -> str:
    """The message of a SolveError where fixed steps are more than a solve may take."""
    return (
        f"{method} needs {needed} steps of the given size for these times, and max_steps is {allowed}; raise "
        "max_steps, or take larger steps."
    )


def bad_samples(state: State | None) -> set[int]:
    """Indices along dimension 0 at which a part of the state is not finite."""
    bad: set[int] = set()
    parts = state if isinstance(state, tuple) else () if state is None else (state,)
    for part in parts:
        bad |= set((~finite_rows(part if part.dim() else part[None])).nonzero().flatten().tolist())
    return bad


@torch.no_grad()
def steepest_sample(state: State, slope: State) -> int | None:
    """The sample, along dimension 0, that changes fastest for its size; None where there are not several."""
    parts = state if isinstance(state, tuple) else (state,)
    slopes = slope if isinstance(slope, tuple) else (slope,)
    if not has_samples(state) or len(parts[0]) < 2:
        return None
    size, speed = (
        sum(torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1).square() for x in given) for given in (parts, slopes)
    )
    rate = speed / (size + torch.finfo(parts[0].dtype).tiny)
    return int(rate.nan_to_num(torch.inf).argmax())


@torch.no_grad()
def jacobian_norm(field: Callable[[torch.Tensor], torch.Tensor], y: torch.Tensor, iterations: int = 8) -> float:
    """‖∂f/∂y‖ at y by power iteration on differences; NaN where the field is not finite.

    Args:
        field: dy/dt as a function of y alone.
    """
    if not y.numel():
        return math.nan
    base = field(y)
    direction = torch.linspace(1, 2, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    norm = math.nan
    eps = torch.finfo(y.dtype).eps ** 0.5 * (1 + float(torch.linalg.vector_norm(y)))
    for _ in range(iterations):
        direction = direction / torch.linalg.vector_norm(direction)
        direction = (field(y + eps * direction) - base) / eps
        norm = float(torch.linalg.vector_norm(direction))
        if not norm > 0 or not math.isfinite(norm):
            return norm if norm == 0 else math.nan
    return norm
