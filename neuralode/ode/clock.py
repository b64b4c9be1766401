"""Output times, and how a frozen grid of steps moves with them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from neuralode.errors import UsageError
from neuralode.ode.explicit import Evaluate, Method, Step
from neuralode.ode.interpolants import Polynomial


class Accepted(NamedTuple):
    """A step of the frozen grid."""

    t: float
    h: float
    plan: Any
    """What the method fixed for this step besides its size."""
    outputs: range
    """Indices of the output times in (t, t + h]."""
    lands: bool
    """Whether the step ends at the last of them."""


class Clock:
    """The times of a solve, on the host.

    The steps that a solve accepted are constants. A gradient with respect to the times is that of the discrete solve
    on this grid, which starts where the solve starts and whose last step takes up what is left: the grid shifts with
    t[0], and the step that ends at t[-1] stretches with it. Where steps end at every output time, that holds from
    each of them to the next. Where the times carry no gradient, a step's time and size are plain floats.

    Args:
        ts: output times, [T], rising or falling.
        lands: whether a step ends at every output time.
    """

    def __init__(self, ts: torch.Tensor, lands: bool):
        self.ts = ts
        self.values: list[float] = host_values(ts)
        self.moves = ts.requires_grad and torch.is_grad_enabled()
        self.lands = lands
        self.direction = 1.0 if self.values[-1] > self.values[0] else -1.0

    def target(self, output: int) -> float:
        """The time at which the next step ends at the latest, `output` being the next output's index."""
        return self.values[output if self.lands else -1]

    def anchored(self, output: int) -> bool:
        """Whether the grid moves with this output time."""
        return self.lands or output == len(self.values) - 1

    def start(self, t: float, output: int) -> Any:
        """The time t of the grid, `output` being the next output's index: a float, or a tensor with its gradient."""
        if not self.moves:
            return t
        anchor = output - 1 if self.lands else 0
        return self.ts[anchor] + (t - self.values[anchor])

    def step(self, t: float, h: float, plan: Any, output: int) -> Accepted:
        """The step of size h from t as a part of the frozen grid, `output` being the next output's index."""
        values, direction, last = self.values, self.direction, output
        end = t + h
        rounding = 1e-12 * max(abs(end), abs(h))
        if (values[last] - end) * direction > rounding:
            return Accepted(t, h, plan, range(output, output), False)
        while last < len(values) and (values[last] - end) * direction <= rounding:
            last += 1
        lands = last > output and abs(values[last - 1] - end) <= rounding
        return Accepted(t, h, plan, range(output, last), lands)

    def steps_of(self, grid: Sequence[float]) -> list[Accepted]:
        """The steps of a grid from the first output time on, until all of them are passed."""
        steps, output = list[Accepted](), 1
        for start, end in itertools.pairwise(grid):
            if output == len(self.values):
                break
            steps.append(self.step(start, end - start, None, output))
            output = steps[-1].outputs.stop
        return steps

    def place(self, step: Accepted) -> tuple[Any, Any]:
        """Time and size of a step as the method takes them: floats, or tensors that carry a gradient."""
        t = self.start(step.t, step.outputs.start)
        if self.moves and step.lands and self.anchored(step.outputs[-1]):
            return t, carrying(step.h, self.ts[step.outputs[-1]] - t)
        return t, step.h

    def with_times(self, ts: torch.Tensor) -> Clock:
        """The same clock over times that may carry another gradient."""
        return Clock(ts, self.lands)

    def reads_densely(self, step: Accepted) -> range:
        """Those outputs of a step that dense output gives; the one that may be left is the step's end.

        A step that meets an output time by chance does not move with it, so that the gradient to that time has to
        come from dense output.
        """
        if step.lands and (not self.moves or self.anchored(step.outputs[-1])):
            return step.outputs[:-1]
        return step.outputs

    def read(self, method: Method, step: Step, record: Accepted, field: Evaluate) -> list[torch.Tensor]:
        """The states at the output times that lie in a step."""
        inner = self.reads_densely(record)
        states = []
        if inner:
            at = method.interpolant(step, field)
            fractions = [self.fraction(output, record.t, step) for output in inner]
            if isinstance(at, Polynomial) and len(inner) > 2 and not self.moves:
                states = list(at.many(fractions))
            else:
                states = [at(fraction) for fraction in fractions]
        return states if len(inner) == len(record.outputs) else [*states, step.y1]

    def fraction(self, output: int, t: float, step: Step) -> Any:
        """Where in a step, which starts at t, an output time lies."""
        way = self.values[output] - t
        return (carrying(way, self.ts[output] - step.t) if self.moves else way) / step.h


def carrying(value: Any, moving: Any) -> Any:
    """A difference of times, known in double precision, with the gradient of the same in that of the times.

    Late in a long solve a difference of times in single precision has few digits left.
    """
    return value + (moving - moving.detach())


def host_values(ts: torch.Tensor) -> Any:
    """Times as floats, nested as their dimensions are, whatever torch.func has wrapped them in."""
    while torch._C._functorch.is_functorch_wrapped_tensor(ts):
        ts = torch._C._functorch.get_unwrapped(ts)
    return ts.tolist()


class Rows:
    """How row-wise numbers, [R], broadcast against the state: one row a sample, or one row for the whole batch."""

    def __init__(self, y: torch.Tensor, shared: bool):
        self.shared = shared
        self.count = 1 if shared else len(y)
        self.shape = () if shared else (self.count, *[1] * (y.dim() - 1))
        self.several = (-1, *[1] * y.dim()) if shared else (-1, *self.shape)
        self.real = y.dtype.to_real()

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """[R] in a shape that broadcasts against the state, and in its precision; [C, R] against C states."""
        return (x.to(self.real) if x.is_floating_point() else x).reshape(self.shape if x.dim() < 2 else self.several)

    def rms(self, x: torch.Tensor) -> torch.Tensor:
        """Root mean square of each row, [R]."""
        flat = x.reshape(self.count, -1)
        return torch.linalg.vector_norm(flat, dim=1).double() / max(flat.shape[1], 1) ** 0.5


def check_rows(y: torch.Tensor, ts: torch.Tensor) -> None:
    """Raises UsageError if a state has no samples to give steps of their own."""
    if y.dim() == 0 or (ts.dim() == 2 and len(ts) != len(y)):
        raise UsageError(
            f"the state has shape {tuple(y.shape)} and t has shape {tuple(ts.shape)}; with steps or times of its own "
            "for each sample, dimension 0 of both are the samples: [B, ...] and [T] or [B, T]."
        )


class RowStep(NamedTuple):
    """A step of the frozen grid, row by row. Rows that rejected it or had ended take no step: their h is zero."""

    t: torch.Tensor
    h: torch.Tensor
    lands: torch.Tensor
    """Rows whose step ends at their last time, [R]."""
    plan: None = None
    outputs: range = range(0)
    """Indices of the pieces that dense output gave in this step."""
    inner: torch.Tensor | None = None
    """For each piece, the index of the output time that each row reads there, [C, R]; zero for none."""


class RowClock:
    """Output times of the rows, [R, T]; steps move with them as `Clock` says."""

    def __init__(self, ts: torch.Tensor, rows: Rows):
        self.ts, self.rows = ts, rows
        self.grid = ts.expand(rows.count, -1)
        self.values = self.grid.detach().double().contiguous()
        self.moves = ts.requires_grad and torch.is_grad_enabled()

    def with_times(self, ts: torch.Tensor) -> RowClock:
        return RowClock(ts, self.rows)

    def place(self, step: RowStep) -> tuple[torch.Tensor, torch.Tensor]:
        spread = self.rows.spread
        if not self.moves:
            return spread(step.t), spread(step.h)
        t = self.grid[:, 0] + (step.t - self.values[:, 0]).to(self.grid)
        return spread(t), spread(torch.where(step.lands, carrying(step.h, self.grid[:, -1] - t), step.h))

    def fractions(self, outputs: torch.Tensor, t: torch.Tensor, step: Step) -> torch.Tensor:
        """Where in a step, which starts at t, [R], output times lie, by their indices, [C, R]; 0 in rows without one.

        They broadcast against C states.
        """
        spread, index = self.rows.spread, outputs.T
        way = spread((self.values.gather(1, index) - t[:, None]).T)
        if self.moves:
            way = carrying(way, spread(self.grid.gather(1, index).T) - step.t)
        still = step.h == 0
        return torch.where(still, 0.0, way / torch.where(still, 1.0, step.h))

    def reads_densely(self, step: RowStep) -> bool:
        return step.inner is not None

    def read(self, method: Method, step: Step, record: RowStep, field: Evaluate) -> list[torch.Tensor]:
        """The dense output at the output times of this step, one piece for each time that some row reads."""
        if record.inner is None:
            return []
        at, fractions = method.interpolant(step, field), self.fractions(record.inner, record.t, step)
        states = at.by_row(fractions.flatten(1)) if isinstance(at, Polynomial) else at(fractions)
        return list(states.unbind())
