"""The flows of optimisers with momenta, against the optimisers themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

from neuralode.errors import UsageError
from neuralode.gradient_flow import GradientField, OptimizerFlow, capture, flow, follow, update_rules
from tests.gradient_flow.networks import network_field, quadratic_field, regression, relative, symmetric

Make = Callable[[Any, float], Optimizer]
OPTIMIZERS: dict[str, tuple[Make, float]] = {
    "heavy ball": (lambda p, lr: SGD(p, lr, momentum=0.9), 0.04),
    "dampening": (lambda p, lr: SGD(p, lr, momentum=0.9, dampening=0.5, weight_decay=0.1), 0.04),
    "nesterov": (lambda p, lr: SGD(p, lr, momentum=0.9, nesterov=True, weight_decay=0.1), 0.04),
    "adam": (lambda p, lr: Adam(p, lr, weight_decay=0.02), 0.01),
    "adamw": (lambda p, lr: AdamW(p, lr, weight_decay=0.1), 0.01),
}


def bowl() -> GradientField:
    return quadratic_field(symmetric(torch.linspace(0.1, 2, 8).double()), torch.ones(8).double())


def train(field: GradientField, optimizer: Optimizer, rates: Sequence[float]) -> torch.Tensor:
    """The weights before and after each step, [K + 1, P]."""
    thetas = [field.theta]
    for lr in rates:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        field.loss_fn(field.module, field.batch).backward()
        optimizer.step()
        thetas.append(field.theta)
    return torch.stack(thetas)


def gap(make: Make, rates: Sequence[float], begun: int, field: GradientField, **wrong: float) -> float:
    """Between optimiser and flow, over how far the weights moved: the largest at any step."""
    optimizer = make(field.parameters, rates[0])
    train(field, optimizer, [rates[0]] * begun)
    state, rules = capture(optimizer), [replace(rule, **wrong) for rule in update_rules(optimizer)]
    taken = train(field, optimizer, rates)
    dynamics = OptimizerFlow(field, rules, state, [[lr] for lr in rates])
    path = follow(dynamics, dynamics.start(taken[0]), range(len(rates) + 1), rtol=1e-6)
    return float((taken - path.thetas).norm(dim=1).max() / (taken - taken[0]).norm(dim=1).max())


@cache
def gaps(name: str, problem: Callable[[], GradientField]) -> list[float]:
    """For η, η/2 and η/4 over the same flow time, from the middle of a training."""
    make, lr = OPTIMIZERS[name]
    return [gap(make, [lr / n] * (20 * n), 20 * n, problem()) for n in (1, 2, 4)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_network_gap_falls_with_the_learning_rate(name: str) -> None:
    found = gaps(name, network_field)
    assert found[0] < 0.05
    assert found[1] < found[0] / 1.7
    assert found[2] < found[1] / 1.7


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_quadratic_gap_falls_with_the_learning_rate(name: str) -> None:
    found = gaps(name, bowl)
    assert found[2] < 0.02
    assert found[2] < found[0] / 2.9


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_from_the_first_step(name: str) -> None:
    """The averages begin at zero and, for Adam, are corrected for it."""
    make, lr = OPTIMIZERS[name]
    assert gap(make, [lr / 4] * 80, 0, network_field()) < 0.035


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("heavy ball", {"momentum": 0.8}), ("heavy ball", {"dampening": 0.3}), ("dampening", {"dampening": 0.0}),
        ("dampening", {"weight_decay": 0.0}), ("nesterov", {"momentum": 0.8}), ("adam", {"momentum": 0.5}),
        ("adam", {"square": 0.9}), ("adamw", {"weight_decay": 0.0}),
    ],
)  # fmt: skip
def test_wrong_numbers_are_clearly_worse(name: str, wrong: dict[str, float]) -> None:
    make, lr = OPTIMIZERS[name]
    assert gap(make, [lr / 2] * 40, 40, network_field(), **wrong) > 2 * gaps(name, network_field)[1]


def test_nesterov_is_not_heavy_ball() -> None:
    make, lr = OPTIMIZERS["nesterov"]
    assert gap(make, [lr / 2] * 40, 40, network_field(), nesterov=False) > 1.5 * gaps("nesterov", network_field)[1]


SCHEDULES: dict[str, Callable[[float], float]] = {"drop": lambda x: 1.0 if x < 0.5 else 0.1, "line": lambda x: 1 - x}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_schedules(name: str, schedule: str) -> None:
    make, lr = OPTIMIZERS[name]
    assert gap(make, [lr / 2 * SCHEDULES[schedule](k / 40) for k in range(40)], 40, network_field()) < 0.04


def test_flow_time_is_the_sum_of_the_learning_rates() -> None:
    """On a plane the weights fall by s times the slope."""
    rates = [0.1, 0.3, 0.3, 0.02, 0.2]
    field = quadratic_field(torch.zeros(2, 2).double(), torch.ones(2).double())
    field.loss_fn = lambda module, batch: module().sum()
    state = capture(SGD(field.parameters, lr=0.1))
    dynamics = OptimizerFlow(field, update_rules(SGD(field.parameters, lr=0.1)), state, [[lr] for lr in rates])
    path = follow(dynamics, dynamics.start(field.theta), [0, 2, 5], method="dopri5", rtol=1e-9)
    torch.testing.assert_close(path.s, torch.tensor([0.0, 0.4, 0.92]).double())
    torch.testing.assert_close(path.thetas[-1], torch.full((2,), 1 - 0.92).double(), rtol=0, atol=1e-4)


def test_schedule_of_plain_descent_only_changes_the_time() -> None:
    known, rates = regression(), [0.05 - 0.001 * k for k in range(40)]
    optimizer = SGD(known.field.parameters, lr=0.05)
    dynamics = OptimizerFlow(known.field, update_rules(optimizer), capture(optimizer), [[lr] for lr in rates])
    assert dynamics.method == "rkc2"
    path = follow(dynamics, dynamics.start(known.field.theta), [0, 10, 40], rtol=1e-7)
    assert float(path.s[-1]) == pytest.approx(sum(rates))
    assert relative(path.thetas[1:], known.flow(path.s)[1:]) < 1e-3
    assert relative(path.end[0], flow(known.field, known.field.theta, [0, sum(rates)], rtol=1e-7).end) < 1e-4


@pytest.mark.parametrize("name", ["heavy ball", "adamw"])
def test_groups_with_numbers_of_their_own(name: str) -> None:
    """Two groups on two bowls that do not touch are two flows."""
    hessian = torch.block_diag(*(symmetric(torch.tensor([0.5, 2.0]).double(), seed) for seed in (1, 2)))
    starts = torch.tensor([1.0, 2.0]).double(), torch.tensor([-1.0, 0.5]).double()
    make, lr = OPTIMIZERS[name]
    beta: dict[str, Any] = {"momentum": 0.5} if name == "heavy ball" else {"betas": (0.5, 0.9)}

    def run(field: GradientField, optimizer: Optimizer) -> torch.Tensor:
        rates = [group["lr"] for group in optimizer.param_groups]
        dynamics = OptimizerFlow(field, update_rules(optimizer), capture(optimizer), [rates] * 30)
        return follow(dynamics, dynamics.start(field.theta), [0, 30], rtol=1e-8).end[0]

    both = quadratic_field(hessian, *starts)
    second = {"params": both.parameters[1:], "lr": lr / 3, **beta}
    joint = run(both, make([{"params": both.parameters[:1]}, second], lr))
    alone = [quadratic_field(hessian[i : i + 2, i : i + 2], start) for i, start in zip((0, 2), starts, strict=True)]
    first = run(alone[0], make(alone[0].parameters, lr))
    last = run(alone[1], make([{**second, "params": alone[1].parameters}], lr))
    torch.testing.assert_close(joint, torch.cat([first, last]), rtol=1e-4, atol=1e-5)


def test_state_goes_on() -> None:
    """A flow in two pieces is the whole one."""
    field = network_field()
    make, lr = OPTIMIZERS["adam"]
    optimizer = make(field.parameters, lr)
    train(field, optimizer, [lr] * 3)
    state, rules, theta = capture(optimizer), update_rules(optimizer), field.theta
    whole = OptimizerFlow(field, rules, state, [[lr]] * 20)
    z = whole.start(theta)
    assert z.shape == (3, len(theta))
    there = follow(whole, z, [0, 20], rtol=1e-8).end
    middle = follow(whole, z, [0, 12], rtol=1e-8).end
    rest = OptimizerFlow(field, rules, state, [[lr]] * 8, begun=state.steps + 12)
    torch.testing.assert_close(follow(rest, middle, [0, 8], rtol=1e-8).end, there, rtol=1e-5, atol=1e-7)


def test_groups_of_different_kinds() -> None:
    field = quadratic_field(torch.eye(4).double(), torch.ones(2).double(), torch.ones(2).double())
    groups = [{"params": field.parameters[:1], "momentum": 0.9}, {"params": field.parameters[1:]}]
    optimizer = SGD(groups, lr=0.1)
    with pytest.raises(UsageError, match="groups of different kinds"):
        OptimizerFlow(field, update_rules(optimizer), capture(optimizer), [[0.1, 0.1]])
