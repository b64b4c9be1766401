"""The gradient flow, and the flows that gradient descent follows more closely, by the package's own solvers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from neuralode.errors import UsageError
from neuralode.gradient_flow.derivatives import by_differences
from neuralode.gradient_flow.field import GradientField, reach
from neuralode.gradient_flow.sharpness import Sharpness
from neuralode.ode import Solution, Stats, solve

Dynamics = Callable[[Any, torch.Tensor], torch.Tensor]

_MARGIN = 1.03
"""Lanczos ends below the spectral radius, never above it."""


@dataclass(frozen=True)
class Path:
    """A flow's way through the space of weights."""

    s: torch.Tensor
    """Flow times, [T]."""
    thetas: torch.Tensor
    """Weights, [T, P]."""
    stats: Stats
    gradients: int
    """Gradients that it took, those for the spectral radius included."""
    end: torch.Tensor
    """The solver's last state, to go on from: θ, [P], or with the momenta of an optimiser, [n, P]."""

    @property
    def last_step(self) -> float | None:
        """The size of the last step that the solver chose, to go on with; the very last may have been cut short."""
        return max(self.stats.step_sizes[-2:], default=None)


def flow(
    field: GradientField, theta: torch.Tensor, s: Any, *, method: str = "rkc2", rtol: float = 1e-3,
    atol: float | None = None, dynamics: Dynamics | None = None, sharpness: Sharpness | None = None,
    first_step: float | None = None, step_size: float | None = None, max_steps: int = 10_000,
) -> Path:  # fmt: skip
    """Integrates dθ/ds = −∇L(θ) from θ, [P], through the times s.

    Args:
        s: rising flow times, [T]; the first belongs to θ.
        method: any method of `solve`. `rkc2` follows mildly stiff flows with the fewest gradients; its spectral
            radius is the sharpness.
        rtol, atol: tolerances of a step; atol is rtol/100 if not given.
        dynamics: another right-hand side on the same weights, such as `modified`.
        sharpness: a warm-started estimate to share with others.
        first_step: see `Path.last_step`.
        step_size: of methods with fixed steps, such as `rk4`; stable on this flow below 2.8/λ_max.

    Raises:
        SolveError: if the flow cannot be followed, with a diagnosis.
    """
    times = torch.as_tensor(s, dtype=torch.float64).tolist()
    begun = field.gradients
    solution = integrate(
        dynamics or field,
        field,
        theta,
        times,
        method,
        rtol,
        atol,
        sharpness,
        lambda s: 1.0,
        first_step,
        max_steps,
        step_size,
    )
    assert isinstance(solution.ys, torch.Tensor)
    made = field.gradients - begun
    return Path(torch.tensor(times, dtype=torch.float64), solution.ys, solution.stats, made, solution.ys[-1])


def integrate(
    dynamics: Dynamics, field: GradientField, start: torch.Tensor, times: list[float], method: str, rtol: float,
    atol: float | None, sharpness: Sharpness | None, pace: Callable[[float], float], first_step: float | None = None,
    max_steps: int = 10_000, step_size: float | None = None,
) -> Solution:  # fmt: skip
    """Solves for dynamics made of `field`; `pace` is ds over what `times` are in, for the spectral radius of rkc2."""
    estimate = sharpness or Sharpness(first_products=8)
    options: dict[str, Any] = {} if first_step is None else {"first_step": first_step}
    if method == "rkc2":

        def radius(t: float, y: torch.Tensor) -> float:
            theta = y if y.dim() == 1 else y[0]
            return _MARGIN * pace(t) * estimate(lambda v: field.product(theta, v), theta).radius

        options["spectral_radius"] = radius
    with torch.no_grad(), field.borrowed():
        return solve(
            dynamics, start.detach(), times, method=method, rtol=rtol, atol=rtol / 100 if atol is None else atol,
            options=options, max_steps=max_steps, step_size=step_size,
        )  # fmt: skip


def modified(field: GradientField, lr: float, order: int) -> Dynamics:
    """The flow that gradient descent of step η follows more closely: −[g + (η/2)Hg + η²(H²g/3 + T[g,g]/12)].

    Order 1 is the gradient flow; 2 the implicit regularisation of Barrett and Dherin 2021; 3 the next term of the
    backward error analysis. The products come from differences of gradients.
    """
    if order not in (1, 2, 3):
        raise UsageError(f"a modified flow of order {order!r} is not known; give 1, 2 or 3.")

    def dynamics(s: Any, theta: torch.Tensor) -> torch.Tensor:
        g = field.gradient(theta)
        if order == 1:
            return -g
        if order == 2:
            return -(g + lr / 2 * field.product(theta, g))
        hg, hhg, tgg = by_differences(field, theta, g, reach(theta.dtype))
        return -(g + lr / 2 * hg + lr**2 * (hhg / 3 + tgg / 12))

    return dynamics
