"""Output times between the steps of a recorded solve: each is a sum of the step's start and its slopes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from neuralode.ode.explicit import RungeKutta
from neuralode.ode.interpolants import slope_weights


class Kept:
    """The starts of some steps, and the output times that were read in them.

    Args:
        y, t, h: states [n, *shape], times and sizes [n].
    """

    def __init__(self, y: torch.Tensor, t: torch.Tensor, h: torch.Tensor):
        self.y, self.t, self.h = y, t, h
        self.readings: list[Reading | None] = [None] * len(t)


class Reading:
    """The output times of one step: y(t + θh) = y + Σᵢ wᵢ(θ) kᵢ.

    Args:
        outputs: their indices.
        weights: [outputs, slopes], the size of the step in them.
    """

    def __init__(self, outputs: range, weights: torch.Tensor):
        self.outputs, self.weights = outputs, weights

    @property
    def places(self) -> slice:
        """Where they are among the states after the first time."""
        return slice(self.outputs.start - 1, self.outputs.stop - 1)

    def states(self, y: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The states [outputs, *shape], from that at the start and the slopes [slopes, *shape]."""
        return y + torch.tensordot(self.weights, k, 1)

    def to_slopes(self, cotangents: torch.Tensor) -> torch.Tensor:
        """What the cotangents [outputs, *shape] give the slopes, [slopes, *shape]."""
        return torch.tensordot(self.weights.t(), cotangents, 1)


def reads(method: RungeKutta) -> bool:
    """Whether output times can be read from the slopes of a step alone, the last being the next step's first."""
    return method.interpolates and method.tableau.fsal and not method.tableau.dense_c


def half_way(method: RungeKutta, h: float, like: torch.Tensor) -> Reading:
    """The middle of a step, as the first of its output times."""
    return Reading(range(1, 2), like.new_tensor([_weights(method, h, 0.5)]))


def read(method: RungeKutta, kept: Kept, k: torch.Tensor, times: Sequence[float], first: int) -> list[torch.Tensor]:
    """The states at the output times in the steps that were kept, noted in `kept`.

    Args:
        k: the slopes, [n, slopes, *shape].
        first: index of the output time that comes next; the last time is the solve's end, which is not read.
    """
    direction = 1.0 if times[-1] > times[0] else -1.0
    states = []
    for n, (t, h) in enumerate(torch.stack([kept.t, kept.h], 1).tolist()):
        after = first
        while after < len(times) - 1 and (times[after] - (t + h)) * direction <= 1e-12 * max(abs(t + h), abs(h)):
            after += 1
        if after > first:
            fractions = [(time - t) / h for time in times[first:after]]
            reading = Reading(range(first, after), k.new_tensor([_weights(method, h, theta) for theta in fractions]))
            kept.readings[n] = reading
            states.append(reading.states(kept.y[n], k[n]))
        first = after
    return states


def _weights(method: RungeKutta, h: float, theta: float) -> list[float]:
    return [h * weight for weight in slope_weights(method.tableau, theta)]
