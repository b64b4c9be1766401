"""Terminal events: where a function of the solution crosses zero, for each sample on its own."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch

from neuralode.errors import UsageError
from neuralode.ode.dense import DensePiece, Stop
from neuralode.ode.implicit import linearise
from neuralode.ode.packing import Packing
from neuralode.ode.rows import Loop, RowIntegration
from neuralode.ode.solution import Events
from neuralode.ode.stepper import Integration
from neuralode.ode.tolerance import in_transform

Event = Callable[..., torch.Tensor]
"""`g(t, y, *args)`: one number a sample, [B], or one number, [], for the state as a whole.

With an attribute `direction` only crossings in that direction count, as in scipy's `solve_ivp`: from negative to
positive if it is positive, from positive to negative if it is negative, both if it is zero.
"""
_BISECTIONS = 60
_DERIVATIVES = 3
"""Of which order the derivatives of an event are right, at most."""
_NEAR = 1e-6
"""Most, in fractions of a step, that is left between the bisection and the event."""


class EventWatch:
    """Looks at each step of a solve as it comes in, and holds those samples where they are that met an event in it.

    A sample is held with its gradient: another one that depends on it from the next step on depends on its event.
    """

    def __init__(self, events: Event | Sequence[Event], args: tuple[Any, ...], loop: Loop, packing: Packing,
                 keep_dense: bool = False):  # fmt: skip
        self.events = list(events) if isinstance(events, Sequence) else [events]
        if not self.events:
            raise UsageError("events is an empty list; give one event or more, or leave it out.")
        if odd := [event for event in self.events if not callable(event)]:
            raise UsageError(f"events holds {odd[0]!r}; an event is a function g(t, y), or give a list of such.")
        self.args, self.loop, self.packing, self.keep_dense = args, loop, packing, keep_dense
        y = loop.y
        self.count = len(y) if y.dim() else 1
        self.shape: tuple[int, ...] = (self.count, *[1] * (y.dim() - 1)) if y.dim() else ()
        with torch.no_grad():
            first = self.events[0](loop.moment().expand(self.shape), packing.unpack(y), *args)
        self.whole = isinstance(first, torch.Tensor) and first.dim() == 0
        if self.whole and isinstance(loop, RowIntegration):
            raise UsageError("an event of the whole state, a scalar, does not go with steps for each sample.")
        if self.whole:
            self.count, self.shape = 1, ()
        with torch.no_grad():
            self.signs = torch.stack(self._values(loop.moment(), y)).sign()
            """Signs of the events after the last step, [E, B]; of the last value that was not zero."""
        directions = torch.tensor([_direction(event) for event in self.events], device=y.device)
        self.directions = directions.reshape(-1, *[1] * (self.signs.dim() - 1))
        self.index = torch.full_like(self.signs[0], -1, dtype=torch.long)
        self.times = torch.zeros_like(self.signs[0], dtype=y.dtype.to_real())
        self.found: Events | None = None

    @property
    def happened(self) -> torch.Tensor:
        return self.index >= 0

    def look(self) -> bool:
        """Takes in the last step; true if every sample has met an event."""
        pieces = self.loop.extras.dense
        piece = pieces[-1] if self.keep_dense else pieces.pop()
        met = self._met(piece)
        if not bool(met.any()):
            return False
        times, states = self._locate(piece, met)
        self.times = torch.where(met, times, self.times)
        here = met.reshape(self.shape)
        self.loop.hold(here, torch.where(here, states, self.loop.y))
        return bool(self.happened.all())

    @torch.no_grad()
    def _met(self, piece: DensePiece) -> torch.Tensor:
        """The samples, [B], that meet their first event in a step; notes in `index` which event it is."""
        moved = torch.as_tensor(piece.h, device=self.index.device).expand(self.index.shape) != 0
        time, y = self._at(piece, 1.0)
        values = torch.stack(self._values(time, y))
        if in_transform():
            self._refuse_vmap(values)
        self._refuse_nan(values, time, y)
        values = values.sign()
        crossing = (values != self.signs) & (self.signs != 0) & moved & ~self.happened
        crossing = crossing & (self.directions * self.signs <= 0)
        first = crossing.int().argmax(0)
        if len(self.events) > 1 and bool((crossing.sum(0) > 1).any()):
            at = [self._bisected(piece, torch.full_like(first, which)) for which in range(len(self.events))]
            first = torch.where(crossing, torch.stack(at), torch.inf).argmin(0)
        met = crossing.any(0)
        self.index = torch.where(met, first, self.index)
        self.signs = torch.where((values != 0) & moved, values, self.signs)
        return met

    def _refuse_vmap(self, values: torch.Tensor) -> None:
        """Raises UsageError if the events are those of several states at once."""
        try:
            bool((values != 0).any())
        except RuntimeError:
            raise UsageError(
                "events do not work inside torch.func.vmap; leave it out and give all samples in one state, along "
                "dimension 0."
            ) from None

    def _refuse_nan(self, values: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> None:
        """Raises UsageError if an event says nothing of a sample whose state is finite."""
        lost = (values != values).any(0) & ~self.happened
        if bool(lost.any()) and bool(torch.isfinite(y).all()):
            sample = int(lost.flatten().nonzero()[0])
            at = float(t.expand(self.shape).flatten()[sample])
            where = "" if self.whole else f" of sample {sample}"
            raise UsageError(f"an event{where} is NaN at t = {at:g}, where the state is finite; it has to be a number.")

    def fill(self, ts: torch.Tensor) -> torch.Tensor:
        """The states [T, *shape] at the output times, [T] or [B, T]; from its event on each sample stays as it was.

        Sets `found`.
        """
        loop, outputs = self.loop, ts.shape[-1]
        times = torch.where(self.happened, self.times, ts[..., -1].to(self.times.dtype))
        if loop.y.numel():  # a batch in which nothing happens has times too that can be differentiated, by zero
            first = loop.y.reshape(self.count, -1)[:, 0].real if not self.whole else loop.y.flatten()[0].real
            times = torch.where(torch.zeros_like(self.happened), first, times)
        self.found = Events(times, self.packing.unpack(loop.y), self.happened, self.index)
        pieces = list(loop.outputs)
        if isinstance(loop, Integration):
            pieces += [loop.y] * (outputs - len(pieces))  # never reached
        ys = loop.assemble(pieces, loop.y)
        late = (ts.reshape(-1, outputs).T.detach() - times.detach()) * torch.sign(ts[..., -1] - ts[..., 0]).detach() > 0
        late = (late.expand(outputs, self.count) & self.happened).reshape(outputs, *self.shape)
        late = late if not self.whole else late.reshape(outputs, *[1] * loop.y.dim())
        return torch.where(late, loop.y, ys)

    def stop(self) -> Stop:
        """Where the samples stopped."""
        happened, times = (x.reshape(self.shape) for x in (self.happened, self.times))
        return Stop(happened, times, self.loop.y)

    def _locate(self, piece: DensePiece, met: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Times and states of the events in a step: found by bisection, then Newton steps that carry the gradient.

        By the implicit-function theorem dθ/dp = -(∂g/∂p)/(∂g/∂θ) for any p that g depends on: the derivative of one
        Newton step from a constant θ, the slope ∂g/∂θ being constant too. Each further step makes the derivatives of
        one more order right. Where g has no slope in θ, θ is that of the bisection and depends on nothing.
        """
        events = self.index.clamp(min=0)
        high = fraction = self._bisected(piece, events)
        value, pull = linearise(lambda _, at: self._chosen(piece, at, events), high, high)
        slope = pull(torch.ones_like(value)).detach()
        sloped = met & (slope != 0)
        for _ in range(_DERIVATIVES):
            shift = self._chosen(piece, fraction, events) / torch.where(sloped, slope, 1.0)
            near = shift.detach().abs() <= _NEAR  # else the event jumps, and the bisection has its time
            fraction = fraction - torch.where(sloped, torch.where(near, shift, shift - shift.detach()), 0.0)
        time, state = self._at(piece, fraction)
        return time.reshape(self.index.shape), state

    @torch.no_grad()
    def _bisected(self, piece: DensePiece, events: torch.Tensor) -> torch.Tensor:
        """The fraction of a step at which the chosen events change sign, [B]; 1 for those that do not."""
        low = torch.zeros_like(self.index, dtype=torch.float64)
        high = torch.ones_like(low)
        start = self._chosen(piece, low, events).sign()
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            same = self._chosen(piece, middle, events).sign() == start
            low, high = torch.where(same, middle, low), torch.where(same, high, middle)
        return high

    def _at(self, piece: DensePiece, fraction: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Time and state at a fraction of a step; the time broadcasts against the state."""
        y = self.loop.y
        if isinstance(fraction, torch.Tensor):
            fraction = fraction.to(y.dtype.to_real()).reshape(self.shape)
        time = torch.as_tensor(piece.start + fraction * piece.size, dtype=y.dtype.to_real(), device=y.device)
        return time.expand(self.shape), piece.at(fraction)

    def _chosen(self, piece: DensePiece, fraction: torch.Tensor, events: torch.Tensor) -> torch.Tensor:
        """For each sample the value of the event that it meets."""
        return torch.stack(self._values(*self._at(piece, fraction))).gather(0, events[None])[0]

    def _values(self, t: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        state = self.packing.unpack(y)
        values = [event(t.expand(self.shape), state, *self.args) for event in self.events]
        for value in values:
            shape = () if self.whole else (self.count,)
            if not isinstance(value, torch.Tensor) or value.shape != shape or value.is_complex():
                tensor = isinstance(value, torch.Tensor)
                given = f"{(tuple(value.shape), value.dtype)}" if tensor else f"a {type(value).__name__}"
                samples = tuple(self.loop.y.shape[:1])
                raise UsageError(
                    f"an event returned {given}; it has to return one real number a sample, {samples}, or, if the "
                    "first one does so, a scalar tensor for the whole state."
                )
        return [2.0 * value - 1 if value.dtype == torch.bool else value for value in values]


def _direction(event: Event) -> float:
    """In which direction an event counts; zero for both."""
    given = getattr(event, "direction", 0)
    if not isinstance(given, numbers.Real):
        raise UsageError(f"an event has the direction {given!r}; give a number: positive, negative, or 0 for both.")
    return float(given)
