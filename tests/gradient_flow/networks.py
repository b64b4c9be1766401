"""The problems of this folder: closed forms, small networks in float64, and a path that differences can trust."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from neuralode import ODEBlock, SolverConfig
from neuralode.gradient_flow import GradientField, flow
from neuralode.nn import MLPField


def mean_square(module: Any, batch: Any) -> torch.Tensor:
    return (module(batch[0]) - batch[1]).square().mean()


@dataclass(frozen=True)
class Regression:
    """Mean squared error of a line, from θ₀ = 0; θ is (intercept, slope)."""

    field: GradientField
    hessian: torch.Tensor
    minimum: torch.Tensor

    def flow(self, s: torch.Tensor) -> torch.Tensor:
        """Flow times [T] to weights [T, 2]."""
        return torch.stack([self.minimum - torch.matrix_exp(-self.hessian * x) @ self.minimum for x in s])

    def descent(self, lr: float, steps: int) -> torch.Tensor:
        """Weights after 0 … steps steps, [steps + 1, 2]."""
        kept = torch.eye(2, dtype=torch.float64) - lr * self.hessian
        return torch.stack([self.minimum - torch.linalg.matrix_power(kept, k) @ self.minimum for k in range(steps + 1)])


def regression() -> Regression:
    np.random.seed(42)  # noqa: NPY002
    x = 2 * np.random.rand(100, 1)  # noqa: NPY002
    y = 4 + 3 * x + np.random.randn(100, 1)  # noqa: NPY002
    inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
    line = nn.Linear(1, 1).double()
    for p in line.parameters():
        nn.init.zeros_(p)
    design = torch.cat([torch.ones_like(inputs), inputs], 1)
    hessian = design.T @ design / 50
    minimum = torch.linalg.solve(hessian, design.T @ targets / 50)[:, 0]
    return Regression(GradientField(line, mean_square, (inputs, targets), [line.bias, line.weight]), hessian, minimum)


class Weights(nn.Module):
    """Weights whose loss is given as a function of them; several parameters for several groups."""

    def __init__(self, *starts: torch.Tensor):
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(start.clone()) for start in starts])

    def forward(self) -> torch.Tensor:
        return torch.cat([part.reshape(-1) for part in self.parts])


def quadratic_field(hessian: torch.Tensor, *starts: torch.Tensor) -> GradientField:
    """L = ½θᵀHθ."""
    return GradientField(Weights(*starts), lambda module, h: 0.5 * module() @ h @ module(), hessian)


def symmetric(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A symmetric matrix of these eigenvalues."""
    drawn = torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = torch.linalg.qr(drawn).Q
    return basis @ values.diag() @ basis.T


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def with_layer_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv1d(3, 2, 3), nn.SiLU(), nn.Flatten(),
        nn.Linear(6, 3),
    )  # fmt: skip


def neural_ode(**settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return nn.Sequential(ODEBlock(MLPField(5, [4], "tanh"), SolverConfig(**settings)), nn.Linear(5, 3))

    return make


def network_field(make: Callable[[], nn.Module] = mlp, dtype: torch.dtype = torch.float64) -> GradientField:
    """The same 20 random samples for every network, which is always drawn from seed 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make().to(dtype)
        batch = torch.randn(20, 5, dtype=torch.float64).to(dtype), torch.randn(20, 3, dtype=torch.float64).to(dtype)
    return GradientField(module, mean_square, batch)


def exact_hessian(field: GradientField, theta: torch.Tensor) -> torch.Tensor:
    """[P, P], by differentiating twice through `functional_call`."""
    names = {id(p): name for name, p in field.module.named_parameters()}

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([p.numel() for p in field.parameters])
        weights = {names[id(p)]: x.view_as(p) for p, x in zip(field.parameters, parts, strict=True)}

        def call(*inputs: Any) -> Any:
            return torch.func.functional_call(field.module, weights, inputs)

        return field.loss_fn(call, field.batch)

    found = torch.autograd.functional.hessian(loss, theta)
    assert isinstance(found, torch.Tensor)
    return found


STENCILS = {
    1: [-1 / 60, 3 / 20, -3 / 4, 0.0, 3 / 4, -3 / 20, 1 / 60],
    2: [1 / 90, -3 / 20, 3 / 2, -49 / 18, 3 / 2, -3 / 20, 1 / 90],
    3: [-7 / 240, 3 / 10, -169 / 120, 61 / 30, 0.0, -61 / 30, 169 / 120, -3 / 10, 7 / 240],
}
"""Central differences of order six."""


class FinePath:
    """The gradient flow through θ, four points on either side."""

    def __init__(self, field: GradientField, theta: torch.Tensor, h: float):
        times = [0, h, 2 * h, 3 * h, 4 * h]
        tight: dict[str, Any] = {"method": "dop853", "rtol": 1e-13, "atol": 1e-15}
        ahead = flow(field, theta, times, **tight).thetas
        behind = flow(field, theta, times, dynamics=lambda s, y: field.gradient(y), **tight).thetas
        self.h, self.thetas = h, torch.cat([behind.flip(0), ahead[1:]])
        self.losses = torch.stack([field.loss(theta) for theta in self.thetas])

    def derivative(self, order: int, of: torch.Tensor) -> torch.Tensor:
        """The derivative in s at the middle of values at the nine points."""
        weights = torch.tensor(STENCILS[order], dtype=torch.float64)
        values = of[4 - len(weights) // 2 : 5 + len(weights) // 2]
        return torch.tensordot(weights, values, 1) / self.h**order


def relative(found: torch.Tensor | float, true: torch.Tensor | float) -> float:
    found, true = torch.as_tensor(found), torch.as_tensor(true)
    return float((found - true).norm() / true.norm())
