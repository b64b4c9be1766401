"""Dense output: the solution between two steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from neuralode.ode.tableaus import Row, Tableau

Interpolant = Callable[[Any], torch.Tensor]
"""Maps θ in [0, 1], a float or a tensor that broadcasts against the state, to the state at t + θh."""


def increment(stages: Sequence[torch.Tensor], weights: Sequence[Any]) -> torch.Tensor | None:
    """Σᵢ wᵢkᵢ, leaving out the zeros; None if all are zero. A weight is a float or a broadcastable tensor."""
    total: torch.Tensor | None = None
    for stage, weight in zip(stages, weights, strict=True):
        if isinstance(weight, torch.Tensor):
            total = stage * weight if total is None else total + stage * weight
        elif weight:
            total = stage * weight if total is None else torch.add(total, stage, alpha=weight)
    return total


def advance(y: torch.Tensor, h: Any, slope: torch.Tensor | None) -> torch.Tensor:
    """y + h·slope, for a step h that is a float or a broadcastable tensor."""
    if slope is None:
        return y
    return y + h * slope if isinstance(h, torch.Tensor) else torch.add(y, slope, alpha=h)


def hermite(y0: torch.Tensor, f0: torch.Tensor, y1: torch.Tensor, f1: torch.Tensor, h: Any) -> Interpolant:
    """The cubic with the values and the slopes of both ends (Hairer, Nørsett, Wanner, I, equation II.6.7)."""
    step = y1 - y0

    def at(theta: Any) -> torch.Tensor:
        to_end = theta * theta * (3 - 2 * theta)
        slope0, slope1 = theta * (1 - theta) ** 2, theta * theta * (theta - 1)
        return y0 + to_end * step + h * (slope0 * f0 + slope1 * f1)

    return at


def slope_weights(tableau: Tableau, theta: float) -> list[float]:
    """wᵢ with y(t + θh) = y + h Σᵢ wᵢkᵢ, for a method whose last stage is the slope at the end of the step."""
    if tableau.interpolant:
        return [_horner(row, theta) for row in tableau.interpolant]
    to_end = theta * theta * (3 - 2 * theta)
    weights = [to_end * b for b in tableau.b]
    weights[0] += theta * (1 - theta) ** 2
    weights[-1] += theta * theta * (theta - 1)
    return weights


def linear(y0: torch.Tensor, y1: torch.Tensor) -> Interpolant:
    """The straight line between both ends: torchdiffeq's default for fixed steps."""
    return lambda theta: y0 + theta * (y1 - y0)


class Polynomial:
    """y + h Σᵢ bᵢ(θ)kᵢ, row i holding the coefficients of θ, θ², ... of bᵢ."""

    def __init__(self, y0: torch.Tensor, stages: Sequence[torch.Tensor], rows: Sequence[Row], h: Any):
        self.y0, self.stages, self.rows, self.h = y0, stages, rows, h

    def __call__(self, theta: Any) -> torch.Tensor:
        if isinstance(theta, torch.Tensor):
            found = self._table(theta).unbind(-1)
            weights: list[Any] = [w if any(row) else 0.0 for row, w in zip(self.rows, found, strict=True)]
        else:
            weights = self._weights(theta)
        return advance(self.y0, self.h, increment(self.stages, weights))

    def by_row(self, theta: torch.Tensor) -> torch.Tensor:
        """Row r of the state, or all of it if R is 1, at the fractions theta[:, r], [C, R]; states [C, *shape]."""
        rows = theta.shape[1]
        weights = self._table(theta) * (self.h.reshape(-1, 1) if isinstance(self.h, torch.Tensor) else self.h)
        slopes = torch.stack(list(self.stages)).reshape(len(self.stages), rows, -1)
        change = torch.bmm(weights.transpose(0, 1).to(slopes.dtype), slopes.transpose(0, 1)).transpose(0, 1)
        return self.y0 + change.reshape(len(theta), *self.y0.shape)

    def many(self, thetas: Sequence[float]) -> Sequence[torch.Tensor]:
        """The states at several fractions of a step whose size is a float, in one product of matrices."""
        weights = [[self.h * weight for weight in self._weights(theta)] for theta in thetas]
        table = torch.tensor(weights, dtype=self.y0.dtype, device=self.y0.device)
        stages = torch.stack(list(self.stages)).reshape(len(self.stages), -1)
        return (self.y0 + (table @ stages).reshape(len(thetas), *self.y0.shape)).unbind()

    def _table(self, theta: torch.Tensor) -> torch.Tensor:
        """bᵢ(θ), i along the last dimension.

        In double precision, as for a float: the coefficients of a high order are large and cancel each other.
        """
        theta, real = theta.double(), self.y0.dtype.to_real()
        degrees = torch.arange(1, len(self.rows[0]) + 1, dtype=theta.dtype, device=theta.device)
        table = torch.tensor(self.rows, dtype=theta.dtype, device=theta.device)
        return ((theta[..., None] ** degrees) @ table.T).to(real)

    def _weights(self, theta: float) -> list[float]:
        return [_horner(row, theta) if any(row) else 0.0 for row in self.rows]


def _horner(row: Row, theta: float) -> float:
    value = row[-1]
    for coefficient in row[-2::-1]:
        value = value * theta + coefficient
    return value * theta
