"""Keeps measurements within a share of a run's wall time, by stretching their cadences."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from neuralode.errors import UsageError

_LONG = 1.0
"""Seconds beside which what the first run of a piece of work costs beyond the others is nothing."""


class Governor:
    """Decides at each training step which measurement is due and can be afforded.

    Each kind of measurement has a cadence in steps and a weight. Of those that are due, the one that will have had the
    least time for its weight is next; it waits until all measurements together, its expected cost included, stay within
    the budget, and meanwhile no other goes before it. So the dear ones are stretched, not starved.

    Args:
        cadences: steps between two measurements of a kind.
        weights: share of the budget, relative to the others.
        budget: share of wall time for all measurements; None for no limit.
        at_end: the kind that is made at the end in any case, so that its cost is kept back.
        clock: seconds.
    """

    def __init__(self, cadences: Mapping[str, int], weights: Mapping[str, float], budget: float | None,
                 at_end: str = "", clock: Callable[[], float] = time.perf_counter):  # fmt: skip
        for kind, cadence in cadences.items():
            if cadence < 1:
                raise UsageError(f"the cadence of {kind} is {cadence}; it has to be at least 1.")
        if budget is not None and not budget > 0:
            raise UsageError(
                f"monitor.flow_budget is {budget}; give a share of wall time above 0, or null for no limit."
            )
        self.cadences, self.weights, self.budget, self.at_end, self._clock = (
            dict(cadences),
            weights,
            budget,
            at_end,
            clock,
        )
        self._next = dict.fromkeys(cadences, 0)
        self._spent = dict.fromkeys(cadences, 0.0)
        self._cost = dict.fromkeys(cadences, 0.0)
        self._count = dict.fromkeys(cadences, 0)
        self._first = dict.fromkeys(cadences, 0)
        self._last = dict.fromkeys(cadences, 0)
        self._earlier = 0.0
        self._started = clock()
        self._stopped: float | None = None

    @property
    def wall(self) -> float:
        """Seconds of training so far, measurements and earlier parts of a resumed run included."""
        return self._earlier + (self._clock() if self._stopped is None else self._stopped) - self._started

    @property
    def spent(self) -> float:
        """Seconds of all measurements."""
        return sum(self._spent.values())

    @property
    def overhead(self) -> float:
        """Measurements over training without them."""
        return self.spent / max(self.wall - self.spent, 1e-9)

    def start(self) -> None:
        """Starts the wall clock."""
        self._started, self._stopped = self._clock(), None

    def stop(self) -> None:
        """Stops the wall clock: nothing is measured any more."""
        self._stopped = self._clock()

    def expect(self, kind: str, seconds: float) -> None:
        """What a measurement that has not been made yet will cost."""
        if not self._count[kind]:
            self._cost[kind] = seconds

    def choose(self, step: int, kinds: set[str]) -> str | None:
        """The measurement to make next at this step, out of those that can be made."""
        due = [kind for kind in self.cadences if step >= self._next[kind] and kind in kinds]
        if not due:
            return None
        if self.budget is None:  # all are made, and in an order that does not depend on the clock
            return due[0]
        kind = min(due, key=lambda k: (self._spent[k] + self._cost[k]) / self.weights[k])
        return kind if self.affords_another(kind) else None

    def affords(self, seconds: float) -> bool:
        """Whether so much more stays within the budget."""
        return self.spent + seconds <= self._allowance

    def affords_another(self, kind: str) -> bool:
        """Whether one more measurement of a kind stays within the budget."""
        return self.affords(self._cost[kind])

    def allows(self, kind: str, step: int) -> bool:
        """Whether a measurement that cannot wait for its turn is due, and within its own part of the budget."""
        part = self.weights[kind] / sum(self.weights.values())
        return step >= self._next[kind] and self._spent[kind] + self._cost[kind] <= part * self._allowance

    @property
    def _allowance(self) -> float:
        """Seconds of the budget, which is a share of training without the measurements, but for what the end takes."""
        if self.budget is None:
            return math.inf
        return self.budget * (self.wall - self.spent) - self._cost.get(self.at_end, 0.0)

    @contextlib.contextmanager
    def measuring(self, kind: str, step: int, ends: bool = True) -> Iterator[None]:
        """Counts a block as time of a kind; if it `ends` a measurement, the next is due a cadence later.

        Time that belongs to no measurement may have a kind of its own, which never ends.
        """
        _synchronise()
        began = self._clock()
        try:
            yield
        finally:
            _synchronise()
            seconds = self._clock() - began
            self._spent[kind] = self._spent.get(kind, 0.0) + seconds
            if ends:
                self._cost[kind] = seconds
                if not self._count[kind]:
                    self._first[kind] = step
                self._count[kind] += 1
                self._last[kind] = step
                self._next[kind] = step + self.cadences[kind]

    def cadences_reached(self) -> dict[str, float]:
        """Mean steps between two measurements, of those kinds that were made at least twice."""
        return {
            kind: (self._last[kind] - self._first[kind]) / (count - 1)
            for kind, count in self._count.items()
            if count > 1
        }

    def report(self) -> str:
        """Overhead and cadences in words."""
        reached = {kind: mean for kind, mean in self.cadences_reached().items() if kind != self.at_end}
        counts = {kind: count for kind, count in self._count.items() if kind != self.at_end}
        # the last measurement, at the end of the training, comes sooner than its turn
        parts = [
            f"{kind} every {max(mean, self.cadences[kind]):.0f} steps (asked: {self.cadences[kind]})"
            for kind, mean in reached.items()
        ]
        parts += [f"{kind} once" for kind, count in counts.items() if count == 1]
        missing = [kind for kind, count in counts.items() if count == 0]
        parts += [f"{kind} never, for it would have cost {self._cost[kind]:.1f} s" for kind in missing]
        advice = (
            "; raise the budget (monitor.flow_budget), or take a smaller probe (monitor.flow_probe)" if missing else ""
        )
        return f"{100 * self.overhead:.1f} % of the training's time: {', '.join(parts)}{advice}"

    def state_dict(self) -> dict[str, Any]:
        names = ("_next", "_spent", "_cost", "_count", "_first", "_last")
        return {"wall": self.wall, **{name: dict(getattr(self, name)) for name in names}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._earlier = state["wall"]
        self.start()
        for name, value in state.items():
            if name != "wall":
                getattr(self, name).update(value)


def seconds_of(work: Callable[[], Any]) -> float:
    """How long a piece of work takes; the first time takes longer, which matters where it is short."""
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
        if seconds > _LONG:
            break
    return seconds


def _synchronise() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
