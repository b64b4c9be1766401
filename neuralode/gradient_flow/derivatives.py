"""Derivatives along the gradient flow, per iteration: with a dot for d/dk, θ̇ = −ηg."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from neuralode.errors import UsageError, unknown
from neuralode.gradient_flow.field import GradientField, reach

WAYS = ("differences", "autograd")


@dataclass(frozen=True)
class Derivatives:
    """The flow's derivatives at θ, per iteration of learning rate η."""

    loss: float
    gradient: torch.Tensor
    """g, [P]."""
    acceleration: torch.Tensor
    """θ̈ = η²Hg, [P]: minus twice the leading error of an SGD step."""
    jerk: torch.Tensor
    """θ⃛ = −η³(H²g + T[g,g]), [P]."""
    stiffness: torch.Tensor
    """H²g, [P]."""
    drift: torch.Tensor
    """T[g,g] = ∇³L[g,g], [P]: how the curvature changes along the path."""
    rate: float
    """−L̇ = η‖g‖²: what the loss falls by in an iteration of the flow."""
    loss_acceleration: float
    """L̈ = 2η²gᵀHg."""
    loss_jerk: float
    """L⃛ = −η³(4‖Hg‖² + 2T[g,g,g])."""

    @property
    def jerk_ratio(self) -> float:
        """‖T[g,g]‖/‖H²g‖: 0 on a quadratic, where curvature does not change."""
        return float(self.drift.norm() / self.stiffness.norm().clamp_min(torch.finfo(self.drift.dtype).tiny))


def derivatives(field: GradientField, theta: torch.Tensor, lr: float, way: str = "differences",
                step: float | None = None) -> Derivatives:  # fmt: skip
    """The derivatives of the gradient flow at θ, [P], whatever the field's `transform`.

    Args:
        lr: η.
        way: `differences` of gradients, four beyond g, which serve any module; or `autograd`, which first compares
            itself with differences, for the third derivative of some layers (`nn.LayerNorm`) is wrong.
        step: length in θ of the differences; by the type of the weights if not given.

    Raises:
        UsageError: for another way, and if autograd disagrees with the differences.
    """
    if way not in WAYS:
        raise UsageError(unknown("way", way, WAYS))
    with field.borrowed(), field.untransformed():
        loss, g = field.loss_and_gradient(theta)
        hg, hhg, tgg = by_differences(field, theta, g, reach(theta.dtype) if step is None else step)
        if way == "autograd":
            exact = by_autograd(field, theta, g)
            _compare((hg, hhg, tgg), exact, 1e-3 if theta.dtype == torch.float64 else 2e-2)
            hg, hhg, tgg = exact
    return Derivatives(
        loss=float(loss), gradient=g, acceleration=lr**2 * hg, jerk=-(lr**3) * (hhg + tgg), stiffness=hhg, drift=tgg,
        rate=lr * float(g @ g), loss_acceleration=2 * lr**2 * float(g @ hg),
        loss_jerk=-(lr**3) * (4 * float(hg @ hg) + 2 * float(g @ tgg)),
    )  # fmt: skip


def by_differences(
    field: GradientField, theta: torch.Tensor, g: torch.Tensor, step: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hg, H²g and T[g,g] from four gradients: a pair along g, and a pair along Hg."""
    size = torch.linalg.vector_norm(g)
    if size == 0:
        return torch.zeros_like(g), torch.zeros_like(g), torch.zeros_like(g)
    ahead, behind = (field.gradient(theta + sign * step / size * g) for sign in (1, -1))
    hg = (ahead - behind) * (size / (2 * step))
    tgg = (ahead - 2 * g + behind) * (size / step) ** 2
    length = torch.linalg.vector_norm(hg)
    if length == 0:
        return hg, torch.zeros_like(g), tgg
    ahead, behind = (field.gradient(theta + sign * step / length * hg) for sign in (1, -1))
    return hg, (ahead - behind) * (length / (2 * step)), tgg


def by_autograd(
    field: GradientField, theta: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hg, H²g and T[g,g] by differentiating again, twice."""
    parameters = field.parameters

    def along(outputs: list[torch.Tensor], v: torch.Tensor) -> list[torch.Tensor]:
        """∇(v·outputs), v being a constant."""
        parts = v.split([p.numel() for p in parameters])
        total = torch.stack([(x.reshape(-1) * part).sum() for x, part in zip(outputs, parts, strict=True)]).sum()
        if not total.requires_grad:
            return [torch.zeros_like(p) for p in parameters]
        found = torch.autograd.grad(total, parameters, create_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if x is None else x for x, p in zip(found, parameters, strict=True)]

    def flat(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([part.detach().reshape(-1) for part in parts])

    with field.loss_with_graph(theta) as loss:
        try:
            slope = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            outputs = [torch.zeros_like(p) if x is None else x for x, p in zip(slope, parameters, strict=True)]
            product = along(outputs, g)
            return flat(product), flat(along(outputs, flat(product))), flat(along(product, g))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UsageError(
                f"autograd cannot differentiate this loss again ({reason}); use way='differences'."
            ) from error


def _compare(found: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...], most: float) -> None:
    for name, x, y in zip(("Hg", "H²g", "T[g,g]"), found, exact, strict=True):
        scale = max(float(x.norm()), float(y.norm()), float(found[1].norm()))
        apart = float((x - y).norm()) / scale if scale else 0.0
        if not apart <= most:
            raise UsageError(
                f"autograd and differences of gradients differ on {name} by {100 * apart:.1f} %: some layer is not to "
                "be differentiated that often (nn.LayerNorm has a wrong third derivative); use way='differences'."
            )
