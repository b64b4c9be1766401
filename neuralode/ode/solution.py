"""What a solve returns: the states, what they cost, and how the solve ended."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

State = torch.Tensor | tuple[torch.Tensor, ...]


class Status(enum.Enum):
    """How a solve ended."""

    SUCCESS = "success"
    NON_FINITE = "non-finite state"
    STEP_UNDERFLOW = "step size underflow"
    MAX_STEPS = "too many steps"


@dataclass
class Stats:
    """What one solve cost. A counter that the engine cannot fill is None.

    The only mutable part of a solution: the counters of the backward pass fill in when that pass runs.
    """

    engine: str
    """The engine that ran."""
    method: str
    gradient: str
    reason: str = ""
    """Why this engine was chosen."""
    nfe: int = 0
    """Evaluations of the vector field in the forward solve."""
    nfe_backward: int = 0
    """Vector-Jacobian products of the field in the backward pass, so far."""
    accepted: int | None = None
    rejected: int | None = None
    accepted_per_sample: torch.Tensor | None = field(default=None, repr=False)
    """Accepted steps of each sample, [B], where samples have steps of their own; `accepted` is then the largest."""
    rejected_per_sample: torch.Tensor | None = field(default=None, repr=False)
    failed_per_sample: torch.Tensor | None = field(default=None, repr=False)
    """Whether each sample failed, [B]; only where `throw=False` let the others go on."""
    step_sizes: list[float] = field(default_factory=list, repr=False)
    """Sizes of the accepted steps, in the units of t, in order."""
    seconds: float = 0.0
    """Wall time of the forward solve."""
    kept_bytes: int | None = None
    """Bytes that the kernels keep for the backward pass."""
    diagnosis: str = ""
    """What a failed solve has to say; empty for one that succeeded."""
    error_estimate: torch.Tensor | None = None
    """Sum of the local error estimates; None where the engine does not keep them."""
    stiffness_estimate: torch.Tensor | None = None
    """Estimate of h·‖J‖ along the solve; None where the engine does not keep it."""


@dataclass(frozen=True)
class Events:
    """When and where the solve of each sample ended; [B], or [] for an event of the whole state."""

    ts: torch.Tensor
    """Time of the event, [B]; the last time of the solve where none happened. Differentiable three times."""
    ys: State
    """State at that time, [B, ...]."""
    happened: torch.Tensor
    """Whether there was an event, [B]."""
    index: torch.Tensor
    """Which of the events it was, [B]; -1 for none."""


@dataclass(frozen=True)
class Solution:
    """The result of `solve`."""

    ts: torch.Tensor
    """Output times, [T]."""
    ys: State
    """States at the output times, [T, *shape]; a tuple of such tensors for a tuple state."""
    stats: Stats
    status: Status
    dense: Callable[[Any], State] | None = None
    """The solution as a function of time, if it was asked for; see `DenseOutput`."""
    events: Events | None = None
    """The events, if any were asked for; after its event a sample's states are that of the event."""

    @property
    def final(self) -> State:
        """The state at the last output time, [*shape]."""
        return self.ys[-1] if isinstance(self.ys, torch.Tensor) else tuple(part[-1] for part in self.ys)


class SolveError(AssertionError):
    """A solve that failed, with its diagnosis.

    It is an AssertionError because torchdiffeq signals the same failures by assertions, and programs catch those.
    """

    def __init__(self, message: str, status: Status, stats: Stats):
        super().__init__(message)
        self.status = status
        self.stats = stats

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process, which no graph can follow."""
        held = vars(self.stats).items()
        tensors: dict[str, Any] = {name: x.detach() for name, x in held if isinstance(x, torch.Tensor)}
        return type(self), (*self.args, self.status, replace(self.stats, **tensors))
