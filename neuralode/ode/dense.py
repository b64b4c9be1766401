"""The solution as a function of time."""

from __future__ import annotations

import bisect
import contextlib
import math
import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from neuralode.errors import UsageError
from neuralode.ode.clock import Rows, carrying, host_values
from neuralode.ode.eager import eager
from neuralode.ode.interpolants import Interpolant
from neuralode.ode.packing import Packing
from neuralode.ode.solution import State


class DensePiece(NamedTuple):
    """Dense output over one step."""

    t: Any
    """Start and signed size on the frozen grid: floats, or for each row, [R], a size of zero for one without a step."""
    h: Any
    start: Any
    """The same as the step took them: with their gradient, and in a shape that broadcasts against the state."""
    size: Any
    at: Interpolant


class Stop(NamedTuple):
    """Where samples have stopped before the end, in shapes that broadcast against the state."""

    happened: torch.Tensor
    times: torch.Tensor
    y: torch.Tensor
    """The state at its last time."""

    @classmethod
    def of_failures(cls, failed: torch.Tensor, direction: torch.Tensor, y: torch.Tensor, others: Stop | None) -> Stop:
        """Samples that failed are y at all times; `others` were stopped by events."""
        before = -math.inf * direction
        if others is None:
            return cls(failed, before, y)
        times = torch.where(failed, before, others.times)
        return cls(others.happened | failed, times, torch.where(failed, y, others.y))

    def after(self, t: Any, state: torch.Tensor, direction: Any) -> torch.Tensor:
        """A state at t, in which each sample from its event on stays as it is."""
        return torch.where(self.happened & ((t - self.times.detach()) * direction > 0), self.y, state)


class DenseOutput:
    """Evaluates the interpolants of a solve's steps; differentiable, also in the time.

    Args:
        steps: the pieces of all steps, in order.
        end: the last time of the solve, which events may keep the steps from.
    """

    def __init__(self, steps: Sequence[DensePiece], packing: Packing, end: float, stop: Stop | None = None):
        self.steps, self.packing, self.end, self.stop = steps, packing, end, stop
        self.direction = 1.0 if steps[0].h > 0 else -1.0
        self._ends = [(piece.t + piece.h) * self.direction for piece in steps]

    def __repr__(self) -> str:
        first, last = self.steps[0], self.steps[-1]
        return f"{type(self).__name__}(t from {first.t:g} to {last.t + last.h:g}, {len(self.steps)} steps)"

    @eager
    def __call__(self, t: Any) -> State:
        """The state at t.

        Args:
            t: a number or a scalar tensor, or times of shape [T] or in a list.

        Returns:
            The state [*shape], or [T, *shape] for times [T].

        Raises:
            UsageError: for a time outside the solve, or times of another shape.
        """
        times = t.unbind() if isinstance(t, torch.Tensor) and t.dim() == 1 else t
        if isinstance(times, list | tuple) and times:
            return self.packing.unpack(torch.stack([self._at(time) for time in times]))
        return self.packing.unpack(self._at(t))

    def _at(self, t: Any) -> torch.Tensor:
        value = _number(t)
        first, end = self.steps[0].t, self.end
        slack = 1e-6 * abs(end - first)
        if not -slack <= (value - first) * self.direction <= abs(end - first) + slack:
            raise UsageError(f"t = {value:g} lies outside the solve, which went from {first:g} to {end:g}.")
        piece = self.steps[min(bisect.bisect_left(self._ends, value * self.direction), len(self.steps) - 1)]
        way = value - piece.t
        if isinstance(t, torch.Tensor) or isinstance(piece.start, torch.Tensor):
            way = carrying(way, t - piece.start)
        state = piece.at(way / piece.size)
        return state if self.stop is None else self.stop.after(value, state, self.direction)


class RowDenseOutput:
    """`DenseOutput` where every row has steps of its own.

    Args:
        steps: the pieces of all steps, in order.
        end: the last times of the rows, [R].
    """

    def __init__(self, steps: Sequence[DensePiece], rows: Rows, packing: Packing, end: torch.Tensor,
                 stop: Stop | None = None):  # fmt: skip
        self.steps, self.rows, self.packing, self.end, self.stop = steps, rows, packing, end, stop

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rows.count} samples, up to {len(self.steps)} steps)"

    @eager
    def __call__(self, t: Any) -> State:
        """The state at t.

        Args:
            t: a number or a scalar tensor for all rows, or a time for each row, [B].

        Returns:
            The state [*shape].

        Raises:
            UsageError: for a time that lies outside a row's solve, or times of another shape.
        """
        times = self._times(t)
        found = torch.zeros(self.rows.count, dtype=torch.bool, device=times.device)
        state: torch.Tensor | None = None
        for piece in self.steps:
            inside = (piece.h != 0) & ~found
            way = times.detach() - piece.t
            fraction = torch.where(inside, way / torch.where(inside, piece.h, 1.0), 0.0)
            inside = self.rows.spread(inside & (fraction >= -1e-6) & (fraction <= 1 + 1e-6))
            way = carrying(self.rows.spread(way), self.rows.spread(times) - piece.start)
            value = piece.at(torch.where(inside, way / torch.where(inside, piece.size, 1.0), 0.0))
            state = value if state is None else torch.where(inside, value, state)
            found = found | inside.reshape(found.shape)
        if state is not None and self.stop is not None:
            span = self.end - self.steps[0].t
            within = (times - self.end) * span <= 1e-6 * span.square()
            late = self.stop.happened.flatten() & ((times - self.steps[0].t) * span >= 0) & within
            state, found = self.stop.after(self.rows.spread(times), state, self.rows.spread(span)), found | late
        if state is None or not bool(found.all()):
            row = int((~found).nonzero()[0])
            raise UsageError(f"t = {float(times[row]):g} lies outside the solve of sample {row}.")
        return self.packing.unpack(state)

    def _times(self, t: Any) -> torch.Tensor:
        """A time for each row, [R]."""
        like, count = self.steps[0].t, self.rows.count
        with contextlib.suppress(TypeError, ValueError):
            times = torch.as_tensor(t, dtype=like.dtype, device=like.device)
            if times.shape in ((), (1,), (count,)):
                return times.expand(count)
        raise UsageError(
            f"t {_described(t)}; the samples have steps of their own: give one number for all, or a time for each of "
            f"them, of shape [{count}]."
        )


def _number(t: Any) -> float:
    if not isinstance(t, torch.Tensor) or t.dim() == 0:
        with contextlib.suppress(TypeError, ValueError):
            return float(host_values(t) if isinstance(t, torch.Tensor) else t)
    raise UsageError(f"t {_described(t)}; give a number, a scalar tensor, or times of shape [T].")


def _described(t: Any) -> str:
    return f"has shape {tuple(t.shape)}" if hasattr(t, "shape") else f"is {reprlib.repr(t)}"
