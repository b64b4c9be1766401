"""Output times, and how a frozen grid of steps moves with them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from neuralode.ode.explicit import Evaluate, Method, Step


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

    def place(self, step: Accepted) -> tuple[Any, Any]:
        """Time and size of a step as the method takes them: floats, or tensors that carry a gradient."""
        t = self.start(step.t, step.outputs.start)
        if self.moves and step.lands and self.anchored(step.outputs[-1]):
            return t, self.ts[step.outputs[-1]] - t
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
            states = [at(self.fraction(output, step.t, step.h)) for output in inner]
        return states if len(inner) == len(record.outputs) else [*states, step.y1]

    def fraction(self, output: int, t: Any, h: Any) -> Any:
        """Where in the step (t, h), as `place` gave it, an output time lies."""
        return ((self.ts if self.moves else self.values)[output] - t) / h


def host_values(ts: torch.Tensor) -> Any:
    """Times as floats, nested as their dimensions are, whatever torch.func has wrapped them in."""
    while torch._C._functorch.is_functorch_wrapped_tensor(ts):
        ts = torch._C._functorch.get_unwrapped(ts)
    return ts.detach().tolist()
