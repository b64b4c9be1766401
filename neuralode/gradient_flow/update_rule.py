"""What an optimiser does to the weights, in the letters of its equations: SGD, Adam and AdamW, group by group."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from neuralode.errors import UsageError

Numbers = float | torch.Tensor
"""One number, or one for each weight, [P], where parameter groups differ."""


@dataclass(frozen=True)
class UpdateRule:
    """One parameter group of torch's SGD, Adam or AdamW."""

    kind: str
    """`sgd`, `adam` or `adamw`."""
    lr: float
    """η."""
    momentum: float = 0.0
    """β of SGD, β₁ of Adam."""
    dampening: float = 0.0
    nesterov: bool = False
    square: float = 0.0
    """β₂."""
    eps: float = 0.0
    weight_decay: float = 0.0
    """Part of the gradient in SGD and Adam, apart from it in AdamW."""

    @property
    def adaptive(self) -> bool:
        return self.kind != "sgd"

    @property
    def threshold(self) -> float:
        """The sharpness of a quadratic up to which the iteration is stable; of P⁻¹H where the rule is adaptive.

        Cohen et al. 2021, "Gradient descent on neural networks typically occurs at the edge of stability"; for Adam
        Cohen et al. 2022, "Adaptive gradient methods at the edge of stability". Coupled weight decay is part of H in
        Adam's case: see `stability`.
        """
        lr, beta, decay = self.lr, self.momentum, self.weight_decay
        damped = self.dampening if beta else 0.0  # torch ignores it without momentum
        if lr == 0 or damped == 1:  # the gradient moves nothing, or its first value alone does
            return float("inf")
        if self.kind == "adam":
            return (2 + 2 * beta) / (lr * (1 - beta))
        if self.kind == "adamw":
            return (1 + beta) * (2 - lr * decay) / (lr * (1 - beta))
        if self.nesterov:
            return (2 + 2 * beta) / (lr * (1 + 2 * beta)) - decay
        return (2 + 2 * beta) / (lr * (1 - damped)) - decay


def update_rules(optimizer: torch.optim.Optimizer) -> list[UpdateRule]:
    """The rule of each parameter group.

    Raises:
        UsageError: for an optimiser whose flow is not known.
    """
    return [_rule(optimizer, group) for group in optimizer.param_groups]


def _rule(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> UpdateRule:
    name = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.SGD | torch.optim.Adam | torch.optim.AdamW):
        raise UsageError(f"the flow of {name} is not known; known are those of SGD, Adam and AdamW.")
    for flag in ("maximize", "amsgrad"):
        if group.get(flag):
            raise UsageError(f"the flow of {name} with {flag}=True is not known; leave it out.")
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    if isinstance(optimizer, torch.optim.SGD):
        return UpdateRule("sgd", lr, group["momentum"], group["dampening"], group["nesterov"], weight_decay=decay)
    apart = isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
    beta, square = (float(x) for x in group["betas"])
    return UpdateRule("adamw" if apart else "adam", lr, beta, square=square, eps=group["eps"], weight_decay=decay)


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """The learning rate of each group."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def moving(optimizer: torch.optim.Optimizer) -> list[list[torch.nn.Parameter]]:
    """The weights that move, group by group: θ is made of them in this order."""
    return [[p for p in group["params"] if p.requires_grad] for group in optimizer.param_groups]


def same_or_each(values: Iterable[float], sizes: Iterable[int], like: torch.Tensor) -> Numbers:
    """A number for each group as one number where all agree, else as a vector over θ, [P]."""
    known = list(values)
    if len(set(known)) == 1:
        return known[0]
    return torch.cat(
        [torch.full((n,), x, dtype=like.dtype, device=like.device) for x, n in zip(known, sizes, strict=True)]
    )
