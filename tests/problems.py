"""ODEs with closed-form solutions, in float64, and fields that count how often they are used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Problem:
    """dy/dt = field(t, y), y(t0) = exact(t0), on [t0, t1]."""

    name: str
    field: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    exact: Callable[[torch.Tensor], torch.Tensor]
    """Times [T] to states [T, B, D]."""
    span: tuple[float, float]

    def times(self, count: int = 2) -> torch.Tensor:
        return torch.linspace(*self.span, count, dtype=torch.float64)

    @property
    def y0(self) -> torch.Tensor:
        """The initial state, [B, D]."""
        return self.exact(self.times())[0]


_STARTS = torch.tensor([[0.2, 0.5], [0.9, 1.7]], dtype=torch.float64)
_ROTATION = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)


def _column(t: torch.Tensor) -> torch.Tensor:
    return t[:, None, None]


def _rotated(t: torch.Tensor) -> torch.Tensor:
    angle = torch.stack([torch.stack([t.cos(), t.sin()], -1), torch.stack([-t.sin(), t.cos()], -1)], -2)
    return _STARTS @ angle.transpose(1, 2)


PROBLEMS = [
    Problem("modulated", lambda t, y: y * t.cos(), lambda t: _STARTS * _column(t).sin().exp(), (0.0, 3.0)),
    Problem("rotation", lambda t, y: y @ _ROTATION.T, _rotated, (0.0, 3.0)),
    Problem(
        "logistic",
        lambda t, y: y * (1 - y),
        lambda t: _STARTS / (_STARTS + (1 - _STARTS) * (-_column(t)).exp()),
        (0.0, 3.0),
    ),
    Problem(
        "forced",  # y = t - 1 + (c + 1) e^-t
        lambda t, y: t - y,
        lambda t: _column(t) - 1 + (_STARTS + 1) * (-_column(t)).exp(),
        (0.0, 3.0),
    ),
]


class Counting(nn.Module):
    """Wraps a field; counts its evaluations, and the vector-Jacobian products that pass through its result."""

    def __init__(self, field: Callable[..., Any]):
        super().__init__()
        self.field = field
        self.calls = self.vjps = 0

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return _CountBackward.apply(self.field(t, y), self)


class _CountBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: torch.Tensor, counter: Counting) -> torch.Tensor:
        ctx.counter = counter
        return dy.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.counter.vjps += 1
        return gradient, None
