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
