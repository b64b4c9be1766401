"""Thresholds of stability, against torch's own optimisers on a parabola; and which rules are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from neuralode.errors import UsageError
from neuralode.gradient_flow import UpdateRule, update_rules

LR = 0.1


def grows(make: Callable[[nn.Parameter], Optimizer], curvature: float, steps: int = 1500) -> bool:
    """Whether the distance from the minimum of a parabola grows, the mean square of Adam held at 1."""
    x = nn.Parameter(torch.full((), 1e-6, dtype=torch.float64))
    optimizer = make(x)
    state: dict[str, Any] = optimizer.state[x]
    adaptive = isinstance(optimizer, Adam)
    if adaptive:
        state.update(step=torch.tensor(1e15), exp_avg=torch.zeros_like(x), exp_avg_sq=torch.ones_like(x))
    largest = []
    for _ in range(steps):
        x.grad = curvature * x.detach()
        optimizer.step()
        if adaptive:
            state["exp_avg_sq"].fill_(1.0)
        largest.append(abs(float(x.detach())))
        if largest[-1] > 1.0:
            return True
    return max(largest[-100:]) > max(largest[steps // 2 - 100 : steps // 2])


def first_divergent(make: Callable[[nn.Parameter], Optimizer], near: float) -> float:
    """By bisection between 0.8 and 1.2 times the curvature `near`, to 2e-4 of it."""
    low, high = 0.8 * near, 1.2 * near
    assert not grows(make, low)
    assert grows(make, high)
    while high - low > 2e-4 * near:
        middle = (low + high) / 2
        low, high = (low, middle) if grows(make, middle) else (middle, high)
    return (low + high) / 2


HELD = 1 - 1e-13
"""β₂ of a mean square that stays; after 1e15 steps its bias correction is 1."""
TINY: dict[str, Any] = {"betas": (0.9, HELD), "eps": 1e-12}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD([p], LR),
    "sgd, decay": lambda p: SGD([p], LR, weight_decay=4.0),
    "sgd, dampening without momentum": lambda p: SGD([p], LR, dampening=0.5),
    "heavy ball": lambda p: SGD([p], LR, momentum=0.9),
    "heavy ball, decay": lambda p: SGD([p], LR, momentum=0.5, weight_decay=4.0),
    "heavy ball, dampening": lambda p: SGD([p], LR, momentum=0.8, dampening=0.3, weight_decay=2.0),
    "nesterov": lambda p: SGD([p], LR, momentum=0.9, nesterov=True),
    "nesterov, decay": lambda p: SGD([p], LR, momentum=0.6, nesterov=True, weight_decay=3.0),
    "adam": lambda p: Adam([p], LR, **TINY),
    "adam, other beta": lambda p: Adam([p], LR, betas=(0.5, HELD)),
    "adamw": lambda p: AdamW([p], LR, weight_decay=0.0, **TINY),
    "adamw, decay": lambda p: AdamW([p], LR, weight_decay=3.0, **TINY),
    "adam, decoupled decay": lambda p: Adam([p], LR, weight_decay=2.0, decoupled_weight_decay=True, **TINY),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_threshold(name: str) -> None:
    make = OPTIMIZERS[name]
    (rule,) = update_rules(make(nn.Parameter(torch.ones(()))))
    assert first_divergent(make, rule.threshold) == pytest.approx(rule.threshold, rel=1e-3)


def test_known_values() -> None:
    assert UpdateRule("sgd", 0.4).threshold == pytest.approx(5.0)
    assert UpdateRule("adam", 1e-3, 0.9).threshold == pytest.approx(38 / 1e-3)
    assert UpdateRule("sgd", 0.0, 0.9).threshold == float("inf")
    assert UpdateRule("sgd", 0.4, dampening=1.0).threshold == pytest.approx(5.0)


@pytest.mark.parametrize("decay", [0.0, 4.0])
def test_a_gradient_that_is_dampened_away_bears_any_curvature(decay: float) -> None:
    make = lambda p: SGD([p], LR, momentum=0.9, dampening=1.0, weight_decay=decay)  # noqa: E731
    assert not grows(make, 1e4)
    (rule,) = update_rules(make(nn.Parameter(torch.ones(()))))
    assert rule.threshold == float("inf")


def test_rules_of_groups() -> None:
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    found = update_rules(SGD([{"params": [a]}, {"params": [b], "lr": 0.5, "momentum": 0.9}], lr=0.1, weight_decay=0.01))
    assert found == [UpdateRule("sgd", 0.1, weight_decay=0.01), UpdateRule("sgd", 0.5, 0.9, weight_decay=0.01)]
    (adam,) = update_rules(Adam([a], lr=torch.tensor(0.25), betas=(0.8, 0.99), eps=1e-6, weight_decay=0.5))
    assert adam == UpdateRule("adam", 0.25, 0.8, square=0.99, eps=1e-6, weight_decay=0.5)
    assert [rule.kind for rule in update_rules(AdamW([a]))] == ["adamw"]


class Mine(AdamW):
    """A subclass of one's own is its parent."""


def test_subclasses() -> None:
    (rule,) = update_rules(Mine([nn.Parameter(torch.ones(2))], lr=0.5))
    assert (rule.kind, rule.lr, rule.weight_decay) == ("adamw", 0.5, 0.01)


@pytest.mark.parametrize("make", [torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.LBFGS, torch.optim.NAdam])
def test_unknown_optimizers(make: Callable[..., Optimizer]) -> None:
    with pytest.raises(UsageError, match=f"the flow of {make.__name__} is not known; known are those of SGD"):  # type: ignore[attr-defined]
        update_rules(make([nn.Parameter(torch.ones(2))]))


@pytest.mark.parametrize(
    "make", [lambda p: Adam(p, amsgrad=True), lambda p: AdamW(p, maximize=True), lambda p: SGD(p, 0.1, maximize=True)]
)
def test_unknown_flags(make: Callable[..., Optimizer]) -> None:
    with pytest.raises(UsageError, match=r"with (amsgrad|maximize)=True is not known; leave it out"):
        update_rules(make([nn.Parameter(torch.ones(2))]))
