"""Losses that are quadratic in the weights, where the flow and descent have closed forms."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from neuralode.gradient_flow.field import GradientField

MOST_WEIGHTS = 32


@dataclass(frozen=True)
class Quadratic:
    """L around θ₀ as its eigenvalues λ, eigenvectors and gradient there; λ may be zero."""

    theta: torch.Tensor
    """θ₀, [P]."""
    eigenvalues: torch.Tensor
    """[P]."""
    eigenvectors: torch.Tensor
    """In columns, [P, P]."""
    gradient: torch.Tensor
    """In the eigenvectors' coordinates, [P]."""

    def flow(self, s: torch.Tensor) -> torch.Tensor:
        """θ(s) = θ* + e^(−Hs)(θ₀ − θ*) at flow times [T]; [T, P]."""
        x = -self.eigenvalues * s[:, None].to(self.theta)
        way = torch.where(x == 0, s[:, None].to(x), torch.expm1(x) / torch.where(x == 0, 1.0, -self.eigenvalues))
        return self.theta - (way * self.gradient) @ self.eigenvectors.T

    def descent(self, lr: float, steps: torch.Tensor) -> torch.Tensor:
        """Gradient descent's θ_k = θ* + (I − ηH)^k (θ₀ − θ*) after steps [T]; [T, P]."""
        steps = steps[:, None].to(self.theta)
        kept = (1 - lr * self.eigenvalues) ** steps
        flat = self.eigenvalues == 0
        way = torch.where(flat, lr * steps, (1 - kept) / torch.where(flat, 1.0, self.eigenvalues))
        return self.theta - (way * self.gradient) @ self.eigenvectors.T


def quadratic(field: GradientField, theta: torch.Tensor) -> Quadratic | None:
    """The closed forms around θ, [P]; None if the loss is not a quadratic, or has more than 32 weights.

    Whether it is one is tested by a gradient as far away as the minimum.
    """
    if theta.numel() > MOST_WEIGHTS:
        return None
    with field.borrowed():
        g = field.gradient(theta)
        unit = torch.eye(theta.numel(), dtype=theta.dtype, device=theta.device)
        hessian = torch.stack([field.product(theta, v) for v in unit])
        hessian = (hessian + hessian.T) / 2
        values, vectors = torch.linalg.eigh(hessian)
        away = g / values.abs().max().clamp_min(1e-12) + 1
        apart = field.gradient(theta + away) - g - hessian @ away
    exact = 1e-6 if theta.dtype == torch.float64 else 1e-3
    if not torch.linalg.vector_norm(apart) <= exact * torch.linalg.vector_norm(hessian @ away):
        return None
    values = torch.where(values.abs() <= 1e-9 * values.abs().max(), torch.zeros_like(values), values)
    return Quadratic(theta, values, vectors, vectors.T @ g)
