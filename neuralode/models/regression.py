"""Regression models."""

from __future__ import annotations

import torch
from torch import nn

from neuralode.models.registry import register_model


@register_model("linear")
class LinearModel(nn.Module):
    """y = x·w + b: [B, features] to [B, targets], starting at zero, where the gradient flow has a closed form."""

    def __init__(self, features: int, targets: int = 1):
        super().__init__()
        self.linear = nn.Linear(features, targets)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


@register_model("two_weights")
class TwoWeights(nn.Module):
    """y = a·b·x: [B, 1] to [B, 1], the smallest network that is not linear in its weights.

    The gradient flow of any loss conserves a² − b²; gradient descent does not.

    Args:
        a, b: where the weights start.
    """

    def __init__(self, a: float = 2.8, b: float = 3.5):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(float(a))), nn.Parameter(torch.tensor(float(b)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a * self.b * x
