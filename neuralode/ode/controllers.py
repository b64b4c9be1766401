"""Step-size control: from the error of a step to the size of the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from neuralode.errors import UsageError, unknown

_SMALLEST = 1e-10
"""Error ratios below this one ask for the largest factor anyway."""


@dataclass(frozen=True)
class Controller:
    """A PID controller (Söderlind 2003, "Digital filters in adaptive time-stepping").

    A step is accepted when its error ratio (error estimate over tolerance) is at most 1; the next step is the last
    one times safety · ∏ ratio^-coefficient, within [min_factor, max_factor].
    """

    integral: float = 1.0
    proportional: float = 0.0
    derivative: float = 0.0
    safety: float = 0.9
    min_factor: float = 0.2
    max_factor: float = 10.0

    def __post_init__(self) -> None:
        if not (0 < self.safety <= 1 and 0 < self.min_factor < 1 < self.max_factor):
            raise UsageError(
                f"{self}: safety has to lie in (0, 1], min_factor in (0, 1), and max_factor has to be above 1."
            )

    def factor(self, ratio: Any, last: Any, before: Any, order: int) -> Any:
        """The unclipped factor for the next step; floats, or tensors with one entry a sample.

        Args:
            ratio: error ratio of this step, positive.
            last, before: those of the accepted steps before it, newest first.
            order: the error estimate is O(h^order).
        """
        now = -(self.integral + self.proportional + self.derivative) / order
        factor = self.safety * ratio**now
        if self.proportional or self.derivative:
            factor = factor * last ** ((self.proportional + 2 * self.derivative) / order)
        if self.derivative:
            factor = factor * before ** (-self.derivative / order)
        return factor


CONTROLLERS = {
    "I": Controller(),
    # Gustafsson 1991; Hairer and Wanner, II, section IV.2
    "PI": Controller(integral=0.3, proportional=0.4),
    "PID": Controller(integral=0.3, proportional=0.3, derivative=0.0625),
}


def controller(choice: Any) -> Controller:
    """The controller of that name; the I controller for None. Raises UsageError for a name that does not exist."""
    if isinstance(choice, Controller):
        return choice
    name = "I" if choice is None else choice
    if not isinstance(name, str) or name not in CONTROLLERS:
        raise UsageError(unknown("controller", str(name), CONTROLLERS))
    return CONTROLLERS[name]


@dataclass
class StepSize:
    """The running state of a controller: the size to try next, and the errors that it remembers."""

    controller: Controller
    order: int
    size: float
    last: float = 1.0
    before: float = 1.0
    rejected: bool = False
    shrinks: bool = False
    """Whether a step that stood, but barely, is followed by a shorter one under the I controller too."""

    def accepts(self, ratio: float) -> bool:
        """Takes in the error ratio of a step of the present size; true if the step stands.

        The first step after a rejection does not grow, and a ratio that is not finite shrinks the step by the most.
        """
        control = self.controller
        accepted = ratio <= 1
        ratio = max(ratio, _SMALLEST) if ratio < float("inf") else float("inf")
        factor = control.factor(ratio, self.last, self.before, self.order) if ratio < float("inf") else 0.0
        ceiling = 1.0 if self.rejected or not accepted else control.max_factor
        keeps = accepted and not (self.shrinks or control.proportional or control.derivative)
        floor = 1.0 if keeps else control.min_factor
        self.size *= min(ceiling, max(floor, factor))
        self.rejected = not accepted
        if accepted:
            self.last, self.before = ratio, self.last
        return accepted
