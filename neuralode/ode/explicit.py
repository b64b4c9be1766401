"""One step of an explicit Runge-Kutta method. It knows nothing of acceptance: the controller decides."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from neuralode.errors import UsageError, unknown
from neuralode.ode import combine
from neuralode.ode.combine import nonzero
from neuralode.ode.interpolants import Interpolant, Polynomial, hermite, increment, linear
from neuralode.ode.tableaus import Tableau

Evaluate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Step:
    """What one step of size h from (t, y0) gave. Times are floats, or tensors that broadcast against the state."""

    __slots__ = ("f0", "f1", "h", "plan", "stages", "t", "y0", "y1")

    def __init__(self, t: Any, h: Any, y0: torch.Tensor, f0: torch.Tensor, y1: torch.Tensor,
                 f1: torch.Tensor | None, stages: list[torch.Tensor], plan: Any = None):  # fmt: skip
        self.t, self.h, self.y0, self.f0, self.y1, self.f1, self.stages = t, h, y0, f0, y1, f1, stages
        self.plan = plan

    def end_slope(self, field: Evaluate) -> torch.Tensor:
        """f(t + h, y1), evaluated if the method has not done so."""
        if self.f1 is None:
            self.f1 = field(moment(self.t + self.h, self.y1), self.y1)
        return self.f1


class Method(Protocol):
    """What a one-step method offers to the stepper, to the gradients and to dense output."""

    name: str
    order: int
    error_order: int
    adaptive: bool
    stages: int
    """Evaluations in a step, about."""
    by_sample: bool
    """Whether t and h may differ from sample to sample."""
    options: frozenset[str]
    """Names of the options that are this method's own."""
    differentiates: bool
    """Whether its steps differentiate the field, also where nobody asks for a gradient."""
    interpolates: bool
    """Whether its dense output is accurate enough to read output times from; else a step ends at each of them."""
    shrinks: bool
    """Whether a step that barely stood is followed by a shorter one: right where a rejection costs many evaluations."""

    def fresh(self, options: dict[str, Any]) -> Method:
        """The method for one solve, with its options and a state of its own if it keeps one."""

    def plan(self, field: Evaluate, t: float, y: torch.Tensor, h: float, f0: torch.Tensor,
             cut: bool = False) -> tuple[float, Any]:  # fmt: skip
        """Fixes, outside the graph, what the step needs besides h: the size it can take, and anything else.

        Args:
            cut: whether h is all that is left to a time at which a step has to end.
        """

    def step(self, field: Evaluate, t: Any, h: Any, y: torch.Tensor, f0: torch.Tensor, plan: Any,
             complete: bool = True) -> Step:  # fmt: skip
        """One step from (t, y) of size h, f0 being f(t, y); if not `complete`, only y1 is wanted of it."""

    def error(self, step: Step, field: Evaluate) -> torch.Tensor:
        """The estimated local error of y1, in the units of y."""

    def interpolant(self, step: Step, field: Evaluate) -> Interpolant: ...

    def stiffness(self, step: Step) -> torch.Tensor | None:
        """Estimate of |h|·‖J‖, free of further evaluations; one number, or one a row; None if there is none."""


def row_norm(x: torch.Tensor, h: Any) -> torch.Tensor:
    """Euclidean norm of a state: of the whole, or of each sample where h gives each its own step."""
    if isinstance(h, torch.Tensor) and h.dim():
        return torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1)
    return torch.linalg.vector_norm(x)


def moment(t: Any, like: torch.Tensor) -> torch.Tensor:
    """A time as the field receives it: a tensor of the state's real type."""
    if isinstance(t, torch.Tensor):
        return t.to(like.dtype.to_real())
    return torch.scalar_tensor(t, dtype=like.dtype.to_real(), device=like.device)


def moments(t: Any, h: Any, c: tuple[float, ...], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The times t + cᵢh of a step's stages."""
    if isinstance(t, torch.Tensor):
        if not c:
            return ()
        fractions = torch.tensor(c, dtype=t.dtype, device=t.device).view(-1, *[1] * t.dim())
        return (t + fractions * h).to(like.dtype.to_real()).unbind()
    if len(c) < 3 or like.is_cpu:  # on the CPU so few cost less one by one
        return tuple([moment(t + ci * h, like) for ci in c])
    times = [t + ci * h for ci in c]
    return torch.tensor(times, dtype=like.dtype.to_real(), device=like.device).unbind()


class RungeKutta:
    """The explicit Runge-Kutta method of a tableau."""

    differentiates = shrinks = False

    def __init__(self, tableau: Tableau, linear: bool = False):
        self.tableau, self.linear = tableau, linear
        self.name, self.order, self.error_order = tableau.name, tableau.order, tableau.error_order
        self.adaptive = tableau.adaptive
        self.interpolates = tableau.interpolant_order >= tableau.order - 1
        self.by_sample, self.stages = True, len(tableau.c)
        self.options = frozenset() if tableau.adaptive else frozenset({"interp"})
        self._rows = [nonzero(row) for row in tableau.a]
        self._inner = self._rows[1 : -1 if tableau.fsal else None]
        self._later = tableau.c[1:]
        self._last = nonzero(tableau.b)
        self.error_row = [] if tableau.error_low else nonzero(tableau.error)
        """Weights of the slopes in the error, where it is linear in them."""

    def fresh(self, options: dict[str, Any]) -> Method:
        """The method reading output times as the option `interp` says; it keeps nothing from step to step."""
        between = options.get("interp", "cubic")
        if between not in ("cubic", "linear"):
            raise UsageError(unknown("interp", between, ("cubic", "linear")))
        return RungeKutta(self.tableau, linear=True) if between == "linear" else self

    def plan(self, field: Evaluate, t: float, y: torch.Tensor, h: float, f0: torch.Tensor,
             cut: bool = False) -> tuple[float, Any]:  # fmt: skip
        """Nothing to fix: an explicit step needs its size alone."""
        return h, None

    def moments(self, grid: Sequence[float], y: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """For each step of a given grid the times of its stages, as the field receives them."""
        c, real = self.tableau.c, y.dtype.to_real()
        for first in range(0, len(grid) - 1, _AT_ONCE):
            steps = itertools.pairwise(grid[first : first + _AT_ONCE + 1])
            times = [start + ci * (end - start) for start, end in steps for ci in c]
            made = torch.tensor(times, dtype=real, device=y.device).unbind()
            yield from zip(*[iter(made)] * len(c), strict=True)

    def step(self, field: Evaluate, t: Any, h: Any, y: torch.Tensor, f0: torch.Tensor, plan: Any = None,
             complete: bool = True) -> Step:  # fmt: skip
        """One step from (t, y) of size h, f0 being f(t, y); if not `complete`, only y1 is wanted of it."""
        tableau = self.tableau
        times = plan or moments(t, h, self._later, y)
        stages = [f0]
        for row, time in zip(self._inner, times, strict=False):
            stages.append(field(time, combine.stage(y, stages, row, h)))
        y1 = combine.end(y, stages, self._last, h)
        f1 = None
        if tableau.fsal and complete:
            f1 = field(times[-1], y1)
            stages.append(f1)
        return Step(t, h, y, f0, y1, f1, stages)

    def error(self, step: Step, field: Evaluate) -> torch.Tensor:
        tableau = self.tableau
        if self.error_row:
            return combine.error(step.stages, self.error_row, step.h)
        error, low = increment(step.stages, tableau.error), increment(step.stages, tableau.error_low)
        assert error is not None
        assert low is not None
        size = error.abs()
        return error * (size / (size * size + 0.01 * low.abs() ** 2 + _TINY).sqrt()) * step.h

    def interpolant(self, step: Step, field: Evaluate) -> Interpolant:
        tableau = self.tableau
        if self.linear:
            return linear(step.y0, step.y1)
        if not tableau.interpolant:
            return hermite(step.y0, step.f0, step.y1, step.end_slope(field), step.h)
        stages = list(step.stages)
        for row, time in zip(tableau.dense_a, moments(step.t, step.h, tableau.dense_c, step.y0), strict=True):
            stages.append(field(time, combine.stage(step.y0, stages, nonzero(row), step.h)))
        return Polynomial(step.y0, stages, tableau.interpolant, step.h)

    def stiffness(self, step: Step) -> torch.Tensor | None:
        """‖f(y) − f(z)‖/‖y − z‖ for the last two stages at t + h (Shampine 1977; SRNODE, Pal et al. 2021)."""
        c = self.tableau.c
        if not (self.tableau.fsal and c[-2] == c[-1]):
            return None
        before = combine.stage(step.y0, step.stages, self._rows[-2], step.h)
        change = (step.stages[-1] - step.stages[-2]) * step.h
        return row_norm(change, step.h) / (row_norm(step.y1 - before, step.h) + _TINY)


_TINY = 1e-30
_AT_ONCE = 256
"""Steps of a given grid whose times are made as one tensor: a tensor each takes twice as long."""
