"""How close an optimiser is to the edge of stability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from neuralode.gradient_flow.field import GradientField
from neuralode.gradient_flow.optimizer_state import OptimizerState
from neuralode.gradient_flow.sharpness import Eigenpair, Sharpness
from neuralode.gradient_flow.update_rule import UpdateRule, same_or_each


@dataclass(frozen=True)
class Stability:
    """The largest curvature that an optimiser meets, and what it bears."""

    sharpness: float
    """λ_max of H; of P⁻¹H for Adam and AdamW, in whose metric the steps are taken."""
    threshold: float
    """Where the iteration on a quadratic of this curvature begins to diverge."""
    eigenvector: torch.Tensor
    """[P]; of P^-½HP^-½ where there is a preconditioner."""
    residual: float

    @property
    def ratio(self) -> float:
        """λ_max over the threshold: 1 is the edge of stability."""
        return self.sharpness / self.threshold


def stability(
    field: GradientField, theta: torch.Tensor, rules: Sequence[UpdateRule], state: OptimizerState,
    sharpness: Sharpness | None = None,
) -> Stability:  # fmt: skip
    """Sharpness against threshold at θ, [P], for an optimiser in this state.

    Where groups have different learning rates, the eigenvalue is that of DH with the rates over the largest of them as
    D; where they differ otherwise, the strictest threshold counts. Coupled weight decay is part of H for Adam, and for
    SGD where groups differ in it. Before Adam's first step its v is what the gradient at θ will make of it. H is the
    Hessian of the loss, whatever the field's `transform`.
    """
    estimate = Sharpness() if sharpness is None else sharpness
    largest = max(rule.lr for rule in rules)
    apart = len({rule.weight_decay for rule in rules}) == 1
    coupled = [
        rule.weight_decay if rule.kind == "adam" or (rule.kind == "sgd" and not apart) else 0.0 for rule in rules
    ]
    alike = [replace(r, lr=largest, weight_decay=r.weight_decay - c) for r, c in zip(rules, coupled, strict=True)]
    threshold = min(rule.threshold for rule in alike)
    decay = same_or_each(coupled, state.sizes, theta)
    with field.borrowed():
        scale = _scale(field, rules, state, theta, largest)

        def product(v: torch.Tensor) -> torch.Tensor:
            return field.product(theta, v) + decay * v

        with field.untransformed():
            found: Eigenpair = estimate(product, theta, scale)
    return Stability(found.value, threshold, found.vector, found.residual)


def _scale(
    field: GradientField, rules: Sequence[UpdateRule], state: OptimizerState, theta: torch.Tensor, largest: float
) -> torch.Tensor | None:
    """D of `Sharpness`, [P]: learning rates over the largest, over P = (√v̂ + ε)(1 − β₁^t) of Adam."""
    relative = same_or_each([rule.lr / largest if largest else 1.0 for rule in rules], state.sizes, theta)
    if not rules[0].adaptive:
        return None if isinstance(relative, float) else relative
    beta, square, eps = (
        same_or_each([getattr(rule, name) for rule in rules], state.sizes, theta)
        for name in ("momentum", "square", "eps")
    )
    if state.steps:
        mean_square, steps = state.vector("exp_avg_sq", theta) / (1 - square**state.steps), state.steps
    else:
        mean_square, steps = field.gradient(theta).square(), 1.0
    return relative / ((mean_square.sqrt() + eps) * (1 - beta**steps))
