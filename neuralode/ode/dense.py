"""The solution as a function of time."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from neuralode.errors import UsageError
from neuralode.ode.clock import Rows, carrying, host_values
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


class DenseOutput:
    """Evaluates the interpolants of a solve's steps; differentiable, also in the time.

    Args:
        steps: the pieces of all steps, in order.
    """

    def __init__(self, steps: Sequence[DensePiece], packing: Packing):
        self.steps, self.packing = steps, packing
        self.direction = 1.0 if steps[0].h > 0 else -1.0
        self._ends = [(piece.t + piece.h) * self.direction for piece in steps]

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
        first, end = self.steps[0].t, self.steps[-1].t + self.steps[-1].h
        slack = 1e-6 * abs(end - first)
        if not -slack <= (value - first) * self.direction <= abs(end - first) + slack:
            raise UsageError(f"t = {value:g} lies outside the solve, which went from {first:g} to {end:g}.")
        piece = self.steps[min(bisect.bisect_left(self._ends, value * self.direction), len(self.steps) - 1)]
        way = value - piece.t
        if isinstance(t, torch.Tensor) or isinstance(piece.start, torch.Tensor):
            way = carrying(way, t - piece.start)
        return piece.at(way / piece.size)


class RowDenseOutput:
    """`DenseOutput` where every row has steps of its own.

    Args:
        steps: the pieces of all steps, in order.
        held: rows, [R], that from the end of their last step to `end`, [R], stay where they are in `y`.
    """

    def __init__(self, steps: Sequence[DensePiece], rows: Rows, packing: Packing, held: torch.Tensor,
                 end: torch.Tensor, y: torch.Tensor):  # fmt: skip
        self.steps, self.rows, self.packing, self.held, self.end, self.y = steps, rows, packing, held, end, y

    def __call__(self, t: Any) -> State:
        """The state at t.

        Args:
            t: a number or a scalar tensor for all rows, or a time for each row, [B].

        Returns:
            The state [*shape].

        Raises:
            UsageError: for a time that lies outside a row's solve.
        """
        like = self.steps[0].t
        times = torch.as_tensor(t, dtype=like.dtype, device=like.device).expand(self.rows.count)
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
        if state is not None:
            start = self.steps[0].t
            rest = self.held & ~found & ((times - start) * (self.end - start) > 0)
            rest = rest & ((times - self.end) * (self.end - start) <= 1e-6 * (self.end - start).square())
            state, found = torch.where(self.rows.spread(rest), self.y, state), found | rest
        if state is None or not bool(found.all()):
            row = int((~found).nonzero()[0])
            raise UsageError(f"t = {float(times[row]):g} lies outside the solve of sample {row}.")
        return self.packing.unpack(state)
