"""Stabilised explicit steps for mildly stiff fields, whose Jacobian has its spectrum near the negative real axis.

The second-order Runge-Kutta-Chebyshev method of Sommeijer, Shampine and Verwer 1997, "RKC: an explicit solver for
parabolic PDEs". Its s stages buy stability along 0.65 (s² - 1) of that axis, so that the cost of a long step grows
with the square root of the stiffness, where that of a classical method grows with the stiffness itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from neuralode.errors import UsageError
from neuralode.ode.explicit import Evaluate, Step, moment, moments
from neuralode.ode.interpolants import Interpolant, hermite
from neuralode.ode.tolerance import to_host

_DAMPING = 2 / 13
"""ε: how far the stability polynomial stays below 1 inside its interval; the paper's choice."""
_MOST_BETWEEN, _LEAST_BETWEEN = 25, 3
"""Attempts between two estimates of the spectral radius."""
_MISSED, _MET = 1.02, 1.01
"""Estimates above what was foreseen, as a ratio, from which on they come more often, and below which less often."""
_MOST_STAGES = 500
_MARGIN = 1.2
"""A power iteration stops below the spectral radius, never above it."""
_MOST_ITERATIONS = 50
_SETTLED = 0.01
"""Relative change of the estimate at which the power iteration ends."""
_MOST_GROWTH = 1.5
"""A radius is foreseen to grow by this factor at most: the steps may grow much faster than it does."""
_FIRST_GROWTH = 1.07
"""A given function's first answer is taken to grow by this factor, until the second tells how it grows."""

SpectralRadius = Callable[[float, torch.Tensor], float]


@dataclass(frozen=True)
class Coefficients:
    """What the recurrence of s stages takes, in the paper's letters; entry j - 2 belongs to stage j = 2 … s."""

    first: float
    """μ̃₁."""
    rows: tuple[tuple[float, float, float, float], ...]
    """(μⱼ, νⱼ, μ̃ⱼ, γ̃ⱼ)."""
    c: tuple[float, ...]
    """c₁ … c_{s-1}: where in the step the stages lie at which f is evaluated."""


@functools.lru_cache(maxsize=512)
def coefficients(s: int) -> Coefficients:
    """The coefficients for s ≥ 2 stages, from the Chebyshev polynomials Tⱼ and their first two derivatives at w₀."""
    w0 = 1 + _DAMPING / s**2
    T, dT, ddT = [1.0, w0], [0.0, 1.0], [0.0, 0.0]
    for j in range(2, s + 1):
        T.append(2 * w0 * T[j - 1] - T[j - 2])
        dT.append(2 * T[j - 1] + 2 * w0 * dT[j - 1] - dT[j - 2])
        ddT.append(4 * dT[j - 1] + 2 * w0 * ddT[j - 1] - ddT[j - 2])
    w1 = dT[s] / ddT[s]
    b = [ddT[j] / dT[j] ** 2 for j in range(2, s + 1)]
    b = [b[0], b[0], *b]
    rows = []
    for j in range(2, s + 1):
        mu_tilde = 2 * b[j] * w1 / b[j - 1]
        gamma_tilde = (b[j - 1] * T[j - 1] - 1) * mu_tilde
        rows.append((2 * b[j] * w0 / b[j - 1], -b[j] / b[j - 2], mu_tilde, gamma_tilde))
    c = [b[1] * w1] + [w1 * ddT[j] / dT[j] for j in range(2, s)]
    return Coefficients(b[1] * w1, tuple(rows), tuple(c))


class RKC2:
    """The method with error control.

    The option `spectral_radius` gives a bound on the spectral radius of ∂f/∂y, in units of 1/t: a number, or a function
    of the time (a float) and the state as the solve holds it. It is asked at the start, then every 25 steps and after
    each rejected step; in between it is taken to grow on as it did from one answer to the next, for training sharpens a
    loss by a third in 25 steps. Where it grows faster than that it is asked more often, down to every 3 steps. Until a
    function has answered twice, its answer is taken to be 7 % larger. Without the option the method estimates the
    radius by differences of the field, every 25 steps and after each rejected step.
    """

    name = "rkc2"
    order = 2
    error_order = 3
    adaptive = interpolates = shrinks = True
    by_sample = differentiates = False
    stages = 2
    options = frozenset({"spectral_radius"})

    def __init__(self, spectral_radius: SpectralRadius | float | None = None):
        given = spectral_radius
        if not (given is None or callable(given) or (isinstance(given, int | float) and 0 <= given < math.inf)):
            raise UsageError(
                f"spectral_radius is {given!r}; give a number that is not negative, or a function of (t, y)."
            )
        self._given = given
        self._radius, self._growth = 0.0, math.nan if callable(given) else 0.0
        """The last estimate, and by how much it grows in a unit of time; NaN until that is known."""
        self._vector: torch.Tensor | None = None
        """The direction in which the last power iteration ended."""
        self._estimated_at = self._planned_at = math.nan
        self._age, self._between = 0, _MOST_BETWEEN

    def fresh(self, options: dict[str, Any]) -> RKC2:
        """The method for one solve: what it knows of the spectrum belongs to one path."""
        return RKC2(options.get("spectral_radius"))

    @torch.no_grad()
    def plan(self, field: Evaluate, t: float, y: torch.Tensor, h: float, f0: torch.Tensor,
             cut: bool = False) -> tuple[float, int]:  # fmt: skip
        """The size and number of stages, of those that are stable up to h, with the fewest stages a unit of time.

        These are the least number that makes h stable, or one stage less with the longest step that it makes stable.
        A step that is cut to end at a given time stays whole, for the rest would take another.
        """
        self._look(field, t, y.detach(), f0.detach())
        radius = self._foreseen(t + h)
        stages = 1 + math.floor(math.sqrt(1 + 1.54 * abs(h) * radius))
        most = most_stages(y.dtype)
        if stages > most:
            return math.copysign(longest_step(most, radius), h), most
        if stages > 2 and not cut:
            shorter = longest_step(stages - 1, radius)
            if (stages - 1) * abs(h) < stages * shorter:
                return math.copysign(shorter, h), stages - 1
        return h, stages

    def step(self, field: Evaluate, t: Any, h: Any, y: torch.Tensor, f0: torch.Tensor, plan: int,
             complete: bool = True) -> Step:  # fmt: skip
        """One step from (t, y) of size h in `plan` stages; if not `complete`, only y1 is wanted of it.

        The recurrence runs over the stages' distances from y, not over the stages: small numbers round finely.
        """
        known = coefficients(plan)
        times = moments(t, h, known.c, y)
        last, now = torch.zeros_like(y), (known.first * h) * f0
        for time, (mu, nu, mu_tilde, gamma_tilde) in zip(times, known.rows, strict=True):
            slope = torch.add(gamma_tilde * f0, field(time, y + now), alpha=mu_tilde)
            last, now = now, torch.add(mu * now, last, alpha=nu) + h * slope
        y1 = y + now
        f1 = field(moment(t + h, y), y1) if complete else None
        return Step(t, h, y, f0, y1, f1, [], plan)

    def error(self, step: Step, field: Evaluate) -> torch.Tensor:
        """What is left of y1 when the Hermite quadrature of both slopes is taken off; O(h³), as in the paper."""
        return 0.8 * (step.y0 - step.y1) + (0.4 * step.h) * (step.f0 + step.end_slope(field))

    def interpolant(self, step: Step, field: Evaluate) -> Interpolant:
        return hermite(step.y0, step.f0, step.y1, step.end_slope(field), step.h)

    def stiffness(self, step: Step) -> None:
        """None: stages at different times do not tell the Jacobian from the drift of f."""

    def _look(self, field: Evaluate, t: float, y: torch.Tensor, f0: torch.Tensor) -> None:
        """Takes in an attempt from (t, y): estimates the spectral radius anew, if it is time to."""
        first, rejected = math.isnan(self._planned_at), t == self._planned_at
        if first or rejected or self._age >= self._between:
            found = self._estimate(field, t, y, f0, rejected)
            if self._given is not None and not first:  # the method's own estimate errs by more than it grows
                foreseen = self._radius if math.isnan(self._growth) else self._foreseen(t)
                if found > _MISSED * foreseen:
                    self._between = max(self._between // 2, _LEAST_BETWEEN)
                elif not rejected and found < _MET * foreseen:
                    self._between = min(self._between * 2, _MOST_BETWEEN)
                # over a step or two the errors of the given radius would pass for growth
                if not rejected and t != self._estimated_at:
                    self._growth = max((found - self._radius) / abs(t - self._estimated_at), 0.0)
            self._radius, self._estimated_at, self._age = found, t, 0
        self._planned_at = t
        self._age += 1

    def _foreseen(self, t: float) -> float:
        """The spectral radius at a later time, as the last two estimates have it."""
        if math.isnan(self._growth):
            return _FIRST_GROWTH * self._radius
        return min(self._radius + self._growth * abs(t - self._estimated_at), _MOST_GROWTH * self._radius)

    def _estimate(self, field: Evaluate, t: float, y: torch.Tensor, f0: torch.Tensor, rejected: bool) -> float:
        if self._given is None:
            start = None if rejected or self._vector is None or self._vector.shape != y.shape else self._vector
            radius, self._vector = power_iteration(lambda x: field(moment(t, x), x), y, f0, start)
            radius *= _MARGIN
        else:
            radius = float(self._given(t, y)) if callable(self._given) else float(self._given)
        # a state at which f is not finite fails by its step, which can say more
        return max(radius, 0.0) if math.isfinite(radius) else 0.0


def longest_step(stages: int, radius: float) -> float:
    """The longest step that so many stages make stable, for this spectral radius."""
    return (stages**2 - 1) / (1.54 * radius)


def most_stages(dtype: torch.dtype) -> int:
    """The most stages for a type: rounding errors grow with the square of their number, here to at most 1e-3."""
    return max(2, min(_MOST_STAGES, int(math.sqrt(1e-3 / torch.finfo(dtype).eps))))


def power_iteration(
    field: Callable[[torch.Tensor], torch.Tensor], y: torch.Tensor, f0: torch.Tensor, start: torch.Tensor | None
) -> tuple[float, torch.Tensor | None]:
    """The spectral radius of ∂f/∂y at y, from below, by differences of f along the direction that grows the most.

    Args:
        field: dy/dt as a function of y alone; f0 is its value at y.
        start: the direction of an earlier call. Without it the search starts along f0 and a chirp, which has a share in
            every frequency: a smooth f0 alone would hide the fast modes of a diffusion. No random number is drawn.

    Returns:
        The radius, in units of 1/t, and the direction.
    """
    direction = start
    if direction is None:
        index = torch.arange(1, y.numel() + 1, dtype=torch.float64, device=y.device)
        chirp = index.square().cos().to(y.dtype).view_as(y)
        slope_size = to_host(torch.linalg.vector_norm(f0))
        direction = chirp / torch.linalg.vector_norm(chirp) + (f0 / slope_size if slope_size > 0 else 0)
    reach = torch.finfo(y.dtype).eps ** 0.5 * (torch.linalg.vector_norm(y) + 1e-3)
    radius = 0.0
    for iteration in range(_MOST_ITERATIONS):
        direction = direction / torch.linalg.vector_norm(direction)
        grown = (field(y + reach * direction) - f0) / reach
        last, radius = radius, to_host(torch.linalg.vector_norm(grown))
        if not 0 < radius < math.inf:
            return radius, None
        direction = grown
        if iteration > 0 and abs(radius - last) <= _SETTLED * radius:
            break
    return radius, direction
