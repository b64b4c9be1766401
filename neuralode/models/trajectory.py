"""Models of time series: a vector field fitted to what was observed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from neuralode.models.registry import build_field, register_model
from neuralode.nn import ODEBlock
from neuralode.ode import SolverConfig


@register_model("trajectory")
class TrajectoryModel(nn.Module):
    """Solves from observed initial states through the observed times.

    Args:
        features: number of observed columns D.
        scale: size of each column, [D]; the field acts on y / scale, so that no column outweighs another.
        solver: how to solve; its time span is not used.
        field, field_args: registered name and arguments of the vector field.
        learn_initial_state: learn a factor for the initial state of the one trajectory, since the first observation
            is as noisy as the others.
    """

    scale: torch.Tensor

    def __init__(
        self,
        features: int,
        scale: Sequence[float] | None = None,
        solver: SolverConfig | None = None,
        field: str = "mlp",
        field_args: dict[str, Any] | None = None,
        learn_initial_state: bool = False,
    ):
        super().__init__()
        self.register_buffer("scale", torch.tensor(list(scale or [1.0] * features)))
        self.block = ODEBlock(build_field(field, features, field_args or {}), solver, output="trajectory")
        self.initial_factor = nn.Parameter(torch.ones(features)) if learn_initial_state else None

    def forward(self, y0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """States [B, T, D] at times t [T], from the states y0 [B, D] at t[0]."""
        y0 = y0 / self.scale
        if self.initial_factor is not None:
            y0 = y0 * self.initial_factor
        return self.block(y0, t).transpose(0, 1) * self.scale

    def depends_on_time(self, y: torch.Tensor, t: torch.Tensor) -> bool:
        """Whether the field at y [B, D] sees the time: by its graph, and by its values at t[0] and t[-1]."""
        first = t[0].detach().clone().requires_grad_()
        found = []
        try:
            block = copy.deepcopy(self.block).eval()  # which counts and learns nothing here
            for time in (first, t[-1]):
                with torch.enable_grad(), torch.random.fork_rng(devices=[]):
                    found.append(block.vector_field(time, y / self.scale))
        except Exception:
            return False  # a field with a mistake in it: what the solve says of it is clearer
        seen = found[0].requires_grad and torch.autograd.grad(found[0].sum(), first, allow_unused=True)[0] is not None
        return seen or not torch.equal(*found)

    def vector_field(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """dy/dt in the data's units: [B, D] to [B, D]."""
        return self.block.vector_field(t, y / self.scale) * self.scale
