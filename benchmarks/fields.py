"""The fields of the benchmarks that are no plain networks; `peers.py` has their twins in JAX."""

from __future__ import annotations

import torch
from torch import nn


class ConvPair(nn.Module):
    """Two 3x3 convolutions with tanh between them; [B, C, H, W] to the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(y)))


class VanDerPol(nn.Module):
    """van der Pol oscillators ẍ = μ(1 - x²)ẋ - x, each with a learned μ of its own, from 0.1 to 10; [B, 2]."""

    def __init__(self, samples: int):
        super().__init__()
        self.mu = nn.Parameter(torch.logspace(-1, 1, samples))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, v = y.unbind(-1)
        return torch.stack([v, self.mu * (1 - x * x) * v - x], dim=-1)


class Lorenz(nn.Module):
    """The Lorenz system with σ = 10, β = 8/3 and a ρ for each trajectory, from 0 to 21; [B, 3]."""

    def __init__(self, trajectories: int):
        super().__init__()
        self.rho = nn.Parameter(torch.linspace(0, 21, trajectories))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b, c = y.unbind(-1)
        return torch.stack([10.0 * (b - a), a * (self.rho - c) - b, a * b - 8 / 3 * c], dim=-1)


class NormedMLP(nn.Module):
    """A network with a group norm after its first layer, which no kernel of ours knows; [B, D] to the same shape."""

    def __init__(self, features: int, hidden: int):
        super().__init__()
        self.first, self.norm = nn.Linear(features, hidden), nn.GroupNorm(1, hidden)
        self.second, self.last = nn.Linear(hidden, hidden), nn.Linear(hidden, features)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.norm(self.first(y))))))
