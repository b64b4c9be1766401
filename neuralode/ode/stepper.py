"""The loop of steps, around any one-step method and any field."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from neuralode.errors import UsageError
from neuralode.ode import combine
from neuralode.ode.clock import Accepted, Clock
from neuralode.ode.controllers import Controller, StepSize
from neuralode.ode.dense import DenseOutput, DensePiece, Stop
from neuralode.ode.explicit import Method, RungeKutta, Step, moment, row_norm
from neuralode.ode.packing import Packing, alike, lasting, writes
from neuralode.ode.solution import Stats, Status
from neuralode.ode.tolerance import Tolerance, all_finite, in_transform


class Failure(Exception):
    """The solve cannot go on; carries what the diagnosis needs."""

    def __init__(self, status: Status, t: float, y: torch.Tensor, h: float, suspect: torch.Tensor | None = None,
                 sample: int | None = None):  # fmt: skip
        super().__init__(status.value)
        self.status, self.t, self.y, self.h, self.sample = status, t, y, h, sample
        self.suspect = y if suspect is None else suspect
        """Where to look for the sample that is not finite."""


@dataclass(frozen=True)
class Settings:
    """What a stepper is told besides the problem."""

    method: Method
    tolerance: Tolerance
    controller: Controller
    max_steps: int
    max_steps_between: int | None = None
    """Attempts allowed from one output time to the next."""
    first_step: float | None = None
    grid: tuple[float, ...] | None = None
    """The steps' ends, where the caller chose them."""
    estimates: bool = False
    """Sum up the error and stiffness estimates, differentiably."""
    keep_dense: bool = False


class Extras:
    """What a solve keeps of its steps besides the states, if the settings ask for it: estimates and dense output."""

    def __init__(self) -> None:
        self.dense: list[DensePiece] = []
        self.error_sum: torch.Tensor | None = None
        self.stiffness_sum: torch.Tensor | None = None

    def take(self, settings: Settings, step: Step, t: Any, h: Any, field: CountedField) -> None:
        """Takes in an accepted step; t and h are its start and size on the frozen grid."""
        if settings.estimates:
            error, stiffness = step_estimates(settings.method, step, field)
            self.error_sum = error if self.error_sum is None else self.error_sum + error
            if stiffness is not None:
                self.stiffness_sum = stiffness if self.stiffness_sum is None else self.stiffness_sum + stiffness
        if settings.keep_dense:
            self.dense.append(DensePiece(t, h, step.t, step.h, settings.method.interpolant(step, field)))

    def copy(self) -> Extras:
        """The same for a caller that may go back to this point."""
        same = Extras()
        same.dense, same.error_sum, same.stiffness_sum = list(self.dense), self.error_sum, self.stiffness_sum
        return same


class CountedField:
    """The field as the stepper calls it: with its arguments, counted, its shape checked."""

    __slots__ = ("args", "field", "graphs", "held", "nfe", "refuse", "traced", "writes")

    def __init__(self, field: Callable[..., Any], args: tuple[Any, ...], refuse: Callable[[Any, torch.Tensor], None]):
        self.field, self.args, self.refuse, self.nfe, self.graphs = field, args, refuse, 0, 0
        self.traced = True
        """Whether autograd is to see how it depends on the state, as it does not with the adjoint equation."""
        self.writes = False
        """Whether it has written into the state or the time that it was given."""
        self.held: torch.Tensor | None = None
        """Samples whose slope is zero whatever the field says, in a shape that broadcasts against the state."""

    def __call__(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.nfe += 1
        copies = (y.detach().clone(), t.detach().clone()) if self.writes or self.nfe == 1 else (None, None)
        before, before_t = writes(y), writes(t)
        dy = self.field(t, y, *self.args)
        if writes(y) != before:
            self._check_written(y, copies[0], "state", "dy = -y instead of y *= -1, or start from y.clone()")
        if writes(t) != before_t:
            self._check_written(t, copies[1], "time", "t = 2 * t instead of t *= 2, or start from t.clone()")
        if not isinstance(dy, torch.Tensor) or dy.shape != y.shape:
            self.refuse(dy, y)
        if self.held is not None:
            dy = dy.masked_fill(self.held, 0.0)
        self.graphs += dy.requires_grad
        return lasting(alike(dy, y))

    def _check_written(self, x: torch.Tensor, copy: torch.Tensor | None, what: str, example: str) -> None:
        """Raises UsageError if what the field has written into x changed it; a clamp, say, may leave it as it was."""
        self.writes = True
        if copy is None or not torch.allclose(copy, x, 0, 0, equal_nan=True):
            raise UsageError(
                f"the field writes into the {what} that it is given, which the solve still needs; make a new tensor, "
                f"for example {example}."
            )


class Integration:
    """One solve under way, from y at the first time of the clock. `run` takes it to the last time.

    With gradients on, the graph of each accepted step is kept by autograd; what the controller computes never is.
    """

    def __init__(self, settings: Settings, field: CountedField, clock: Clock, y: torch.Tensor, stats: Stats):
        self.settings, self.field, self.clock, self.stats = settings, field, clock, stats
        self.t, self.y = clock.values[0], y
        self.f0: torch.Tensor | None = None
        self.next = 1
        """Index of the output time that comes next."""
        self.outputs = [y]
        self.accepted: list[Accepted] = []
        self.extras = Extras()
        self.size: StepSize | None = None
        self._slope_unused = True
        self._tried_at_output = 0
        self.in_graph = 0
        """Evaluations whose graph the accepted steps hold."""
        stats.accepted = stats.rejected = 0

    @property
    def done(self) -> bool:
        return self.next == len(self.clock.values)

    @property
    def planned_steps(self) -> float:
        """Steps that the solve will take, where they are given; infinite where the errors decide."""
        grid = self.settings.grid
        return math.inf if grid is None else len(grid) - 1

    def run(self, pause: Callable[[], bool] | None = None, on_step: Callable[[Step], None] | None = None) -> None:
        """Steps until done, or until `pause()` is true after an accepted step."""
        settings = self.settings
        watched = pause is not None or on_step is not None or settings.estimates or settings.keep_dense
        if settings.grid is not None and not (watched or self.accepted or self.clock.moves):
            self._walk(settings.grid)
        while not self.done:
            step, record = self._attempt()
            if step is None or record is None:
                continue
            if on_step is not None:
                on_step(step)
            self._move(step, record)
            if pause is not None and pause():
                return

    def _walk(self, grid: tuple[float, ...]) -> None:
        """Takes the steps of a given grid, with as little as possible around the field."""
        if len(grid) - 1 > self.settings.max_steps:
            raise Failure(Status.MAX_STEPS, self.t, self.y, grid[1] - grid[0])
        method, field, graphs = self.settings.method, self.field, self.field.graphs - _graphs(self.f0)
        assert isinstance(method, RungeKutta)  # the only ones without error control
        y = self.y
        f0: torch.Tensor | None = self.slope()
        self.accepted = self.clock.steps_of(grid)
        for record, moments in zip(self.accepted, method.moments(grid, y), strict=False):
            t, h, _, outputs, _ = record
            step = method.step(field, t, h, y, field(moments[0], y) if f0 is None else f0, moments[1:])
            if outputs:
                self.outputs += self.clock.read(method, step, record, field)
            y, f0 = step.y1, step.f1
        self.t, self.y, self.f0, self.next = grid[-1], y, f0, len(self.clock.values)
        self.in_graph += field.graphs - graphs
        self.stats.accepted, self.stats.step_sizes = len(self.accepted), [abs(record.h) for record in self.accepted]

    def detach(self) -> None:
        """Goes on from the present state without its history."""
        self.y = self.y.detach()
        self.f0 = None if self.f0 is None else self.f0.detach()

    def slope(self) -> torch.Tensor:
        """f at the present time and state."""
        if self.f0 is None:
            self.f0 = self.field(moment(self.clock.start(self.t, self.next), self.y), self.y)
        return self.f0

    def moment(self) -> torch.Tensor:
        """The present time, as the field receives it."""
        return moment(self.t, self.y)

    def hold(self, samples: torch.Tensor, y: torch.Tensor) -> None:
        """Goes on from y, in which these further samples stay as they are and have no say in the steps.

        Args:
            samples: a mask that broadcasts against the state.
        """
        self.y, self.f0 = y, None if self.f0 is None else self.f0.masked_fill(samples, 0.0)
        self.field.held = samples if self.field.held is None else self.field.held | samples

    def dense_output(self, packing: Packing, stop: Stop | None = None) -> DenseOutput:
        return DenseOutput(self.extras.dense, packing, self.clock.values[-1], stop)

    def assemble(self, pieces: list[torch.Tensor], final: torch.Tensor) -> torch.Tensor:
        """The states [T, *shape] from the output states, of which `final` is the last."""
        return torch.stack(pieces)

    def _attempt(self) -> tuple[Step | None, Accepted | None]:
        """Tries one step; nothing if it was rejected."""
        settings, stats, y, f0 = self.settings, self.stats, self.y, self.slope()
        tried = (stats.accepted or 0) + (stats.rejected or 0)
        if tried >= settings.max_steps or tried - self._tried_at_output >= (settings.max_steps_between or math.inf):
            raise Failure(Status.MAX_STEPS, self.t, y, self.clock.direction * (self.size.size if self.size else 0.0))
        h, wanted = self._choose(y, f0)
        cut = self.size is not None and abs(h) != wanted
        h, plan = settings.method.plan(self.field, self.t, y, h, f0, cut)
        if self.t + h == self.t or not math.isfinite(h):
            raise Failure(Status.STEP_UNDERFLOW, self.t, y, h)
        record = self.clock.step(self.t, h, plan, self.next)
        graphs = self.field.graphs
        step = settings.method.step(self.field, *self.clock.place(record), y, f0, plan)
        if self.size is not None:
            ratio = error_ratio(settings, step, self.field)
            self.size.size = abs(h)
            if not self.size.accepts(ratio):
                stats.rejected = (stats.rejected or 0) + 1
                if not math.isfinite(ratio):
                    self._check_hope(step, h)
                return None, None
            if record.lands and wanted > abs(h):  # cut short to end at an output time, so no sign of a hard stretch
                self.size.size = max(self.size.size, wanted)
        # a slope at the step's end counts when the next step, or dense output, makes use of it
        self.in_graph += self.field.graphs - graphs + _graphs(f0) * self._slope_unused - _graphs(step.f1)
        self._slope_unused = True
        return step, record

    def _choose(self, y: torch.Tensor, f0: torch.Tensor) -> tuple[float, float]:
        """The signed size of the next step, and the size that the controller wanted."""
        settings, clock = self.settings, self.clock
        if settings.grid is not None:
            h = settings.grid[(self.stats.accepted or 0) + 1] - self.t
            return h, abs(h)
        rest = clock.target(self.next) - self.t
        if self.size is None:
            method = settings.method
            self.size = StepSize(settings.controller, method.error_order, self._first(y, f0), shrinks=method.shrinks)
        wanted = self.size.size
        return (rest if wanted >= abs(rest) * (1 - 1e-9) else clock.direction * wanted), wanted

    def _first(self, y: torch.Tensor, f0: torch.Tensor) -> float:
        if self.settings.first_step is not None:
            return abs(self.settings.first_step)
        direction = self.clock.direction
        # a field that differentiates with respect to the state needs its graph, as it would have under torchdiffeq
        graph = y.requires_grad and torch.is_grad_enabled() and not in_transform()
        with torch.no_grad():
            y, f0 = y.detach(), f0.detach()

            def slope_after(h: float) -> torch.Tensor:
                end, time = torch.add(y, f0, alpha=h * direction), moment(self.t + h * direction, y)
                if not graph:
                    return self.field(time, end).detach()
                with torch.enable_grad():
                    return self.field(time, end.requires_grad_()).detach()

            return self.settings.tolerance.first_step(y, f0, self.settings.method.order, slope_after)

    def _move(self, step: Step, record: Accepted) -> None:
        """Goes to the end of an accepted step."""
        stats, settings = self.stats, self.settings
        stats.accepted = (stats.accepted or 0) + 1
        stats.step_sizes.append(abs(record.h))
        self.accepted.append(record)
        graphs = self.field.graphs
        self.outputs += self.clock.read(settings.method, step, record, self.field)
        self.extras.take(settings, step, record.t, record.h, self.field)
        if self.clock.reads_densely(record):
            self.in_graph += self.field.graphs - graphs + _graphs(step.f1)
            self._slope_unused = False
        if record.outputs:
            self._tried_at_output = stats.accepted + (stats.rejected or 0)
        self.next += len(record.outputs)
        self.t = self.clock.values[self.next - 1] if record.lands else record.t + record.h
        if settings.grid is not None:
            self.t = settings.grid[stats.accepted]
        self.y, self.f0 = step.y1, step.f1

    def _check_hope(self, step: Step, h: float) -> None:
        """A step that met an overflow may do so no more when it is shorter, unless it starts at one or is minute."""
        resolution = torch.finfo(step.y0.dtype).eps * max(
            abs(self.t), abs(self.clock.values[-1] - self.clock.values[0])
        )
        for suspect in (step.y0, step.f0):
            if not all_finite(suspect):
                raise Failure(Status.NON_FINITE, self.t, step.y0, h, suspect)
        if abs(h) <= resolution:
            seen = [x for x in (*step.stages, step.y1, step.f1) if x is not None]
            broken = [x for x in seen if not all_finite(x)]
            raise Failure(Status.NON_FINITE, self.t, step.y0, h, broken[0] if broken else step.y1)


def _graphs(slope: torch.Tensor | None) -> int:
    return int(slope is not None and slope.requires_grad)


def error_ratio(settings: Settings, step: Step, field: CountedField) -> float:
    """The step's error over the tolerance; it stands if that is at most 1."""
    method, tolerance = settings.method, settings.tolerance
    with torch.no_grad():
        if field.held is not None:
            moving = ~field.held.flatten()
            return tolerance.ratio(*(x[moving] for x in (method.error(step, field), step.y0, step.y1)))
        if isinstance(method, RungeKutta) and method.error_row:
            return combine.error_ratio(step.stages, method.error_row, step.h, step.y0, step.y1, tolerance)
        return tolerance.ratio(method.error(step, field), step.y0, step.y1)


def step_estimates(
    method: Method, step: Step, field: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """|h|·‖error‖ and |h|·‖J‖ of one step, or of each row's.

    ERNODE and SRNODE (Pal et al. 2021, "Opening the blackbox").
    """
    size = abs(step.h)
    if isinstance(size, torch.Tensor) and size.dim():
        size = size.flatten()
    stiffness = method.stiffness(step)
    return row_norm(method.error(step, field), step.h) * size, stiffness
