"""The solution as a function of time."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import torch

from neuralode.errors import UsageError
from neuralode.ode.clock import host_values
from neuralode.ode.interpolants import Interpolant
from neuralode.ode.packing import Packing
from neuralode.ode.solution import State


class DenseOutput:
    """Evaluates the interpolants of a solve's steps; differentiable, also in the time.

    Args:
        steps: start, signed size and interpolant of each step, in order.
    """

    def __init__(self, steps: Sequence[tuple[float, float, Interpolant]], packing: Packing):
        self.steps, self.packing = steps, packing
        self.direction = 1.0 if steps[0][1] > 0 else -1.0
        self._ends = [(t + h) * self.direction for t, h, _ in steps]

    def __call__(self, t: Any) -> State:
        """The state at t.

        Args:
            t: a number or a scalar tensor, or times of shape [T].

        Returns:
            The state [*shape], or [T, *shape] for times [T].

        Raises:
            UsageError: for a time outside the solve.
        """
        if isinstance(t, torch.Tensor) and t.dim() == 1:
            return self.packing.unpack(torch.stack([self._at(time) for time in t.unbind()]))
        return self.packing.unpack(self._at(t))

    def _at(self, t: Any) -> torch.Tensor:
        value = host_values(t) if isinstance(t, torch.Tensor) else float(t)
        first, (last, size, _) = self.steps[0][0], self.steps[-1]
        slack = 1e-9 * abs(last + size - first)
        if not -slack <= (value - first) * self.direction <= abs(last + size - first) + slack:
            raise UsageError(f"t = {value:g} lies outside the solve, which went from {first:g} to {last + size:g}.")
        index = min(bisect.bisect_left(self._ends, value * self.direction), len(self.steps) - 1)
        start, size, at = self.steps[index]
        return at((t - start) / size)
