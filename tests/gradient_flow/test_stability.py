"""Sharpness against threshold, for the optimiser that really runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

from neuralode.gradient_flow import GradientField, Stability, capture, stability, update_rules
from tests.gradient_flow.networks import exact_hessian, network_field, quadratic_field, symmetric

HESSIAN = symmetric(torch.tensor([0.2, 1.0, 3.0, 7.0], dtype=torch.float64))
STARTS = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64)


def measured(field: GradientField, optimizer: Optimizer) -> Stability:
    return stability(field, field.theta, update_rules(optimizer), capture(optimizer))


def trained(optimizer: Optimizer, field: GradientField, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        field.loss_fn(field.module, field.batch).backward()
        optimizer.step()


@pytest.mark.parametrize("factor", [0.98, 1.02])
@pytest.mark.parametrize(
    "settings", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"weight_decay": 2.0}]
)
def test_ratio_tells_divergence(factor: float, settings: dict[str, Any]) -> None:
    field = quadratic_field(HESSIAN, *STARTS)
    at_one = measured(field, SGD(field.parameters, lr=1.0, **settings))
    decay = settings.get("weight_decay", 0.0)
    lr = factor * (at_one.threshold + decay) / (at_one.sharpness + decay)
    optimizer = SGD(field.parameters, lr=lr, **settings)
    found = measured(field, optimizer)
    assert found.sharpness == pytest.approx(7, rel=1e-6)
    assert (found.ratio > 1) == (factor > 1)
    trained(optimizer, field, 1000)
    assert (field.theta.norm() > 10) == (factor > 1)


@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_groups_of_different_rates(factor: float) -> None:
    """The eigenvalue is that of DH, against dense eigenvalues and against a real divergence."""
    rates = torch.tensor([1.0, 1.0, 0.1, 0.1], dtype=torch.float64)
    true = float(torch.linalg.eigvals(rates.diag() @ HESSIAN).real.max())
    field, lr = quadratic_field(HESSIAN, *STARTS), factor * 2 / true
    first, second = field.parameters
    optimizer = SGD([{"params": [first]}, {"params": [second], "lr": 0.1 * lr}], lr=lr)
    found = measured(field, optimizer)
    assert found.sharpness == pytest.approx(true, rel=1e-6)
    assert found.ratio == pytest.approx(factor, rel=1e-6)
    trained(optimizer, field, 1000)
    assert (field.theta.norm() > 10) == (factor > 1)


@pytest.mark.parametrize("make", [Adam, AdamW])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adam_preconditioner(make: Any, decay: float) -> None:
    """P = (√v̂ + ε)(1 − β₁^t); the coupled decay of Adam is part of H."""
    field = network_field()
    optimizer = make(field.parameters, lr=0.01, betas=(0.8, 0.95), weight_decay=decay)
    trained(optimizer, field, 7)
    theta = field.theta
    squares = torch.cat([optimizer.state[p]["exp_avg_sq"].reshape(-1) for p in field.parameters])
    p = ((squares / (1 - 0.95**7)).sqrt() + 1e-8) * (1 - 0.8**7)
    hessian = exact_hessian(field, theta)
    if make is Adam:
        hessian = hessian + decay * torch.eye(len(theta)).double()
    true = float(torch.linalg.eigvals((1 / p).diag() @ hessian).real.max())
    found = measured(field, optimizer)
    assert found.sharpness == pytest.approx(true, rel=0.02)
    expected = 1.8 * (2 - 0.01 * decay if make is AdamW else 2) / (0.01 * 0.2)
    assert found.threshold == pytest.approx(expected)


@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_adam_with_coupled_decay_diverges_where_said(factor: float) -> None:
    """The mean squares held as they are, so that P is constant."""
    decay, lr = 0.5, 0.01
    field = quadratic_field(HESSIAN, *(1e-6 * start for start in STARTS))
    optimizer = Adam(field.parameters, lr=lr, betas=(0.9, 1 - 1e-13), weight_decay=decay, eps=1e-12)
    p = torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64)
    true = float(torch.linalg.eigvals((1 / p).diag() @ (HESSIAN + decay * torch.eye(4).double())).real.max())
    p = p * true * lr / (38 * factor)
    held = dict(zip(field.parameters, p.square().split(2), strict=True))
    for weight, square in held.items():
        state = {"step": torch.tensor(1e15), "exp_avg": torch.zeros(2).double(), "exp_avg_sq": square.clone()}
        optimizer.state[weight] = state
    assert measured(field, optimizer).ratio == pytest.approx(factor, rel=1e-5)
    for _ in range(1500):
        trained(optimizer, field, 1)
        for weight, square in held.items():
            optimizer.state[weight]["exp_avg_sq"].copy_(square)
    assert (field.theta.norm() > 1e-5) == (factor > 1)


def test_strictest_group_counts() -> None:
    field = quadratic_field(HESSIAN, *STARTS)
    first, second = field.parameters
    optimizer = SGD([{"params": [first], "momentum": 0.9}, {"params": [second]}], lr=0.1)
    assert measured(field, optimizer).threshold == pytest.approx(2 / 0.1)


def test_learning_rate_zero() -> None:
    field = quadratic_field(HESSIAN, *STARTS)
    found = measured(field, SGD(field.parameters, lr=0.0))
    assert found.threshold == float("inf")
    assert found.ratio == 0


def test_groups_of_sgd_that_differ_in_rate_and_decay() -> None:
    """Against the dense matrix of the iteration: I − D(H + W) has its spectral radius at 1 where the ratio is 1."""
    torch.manual_seed(0)
    a, b = torch.zeros(2, dtype=torch.float64).requires_grad_(), torch.zeros(3, dtype=torch.float64).requires_grad_()
    root = torch.randn(5, 5, dtype=torch.float64)
    hessian = root @ root.T
    module = torch.nn.Module()
    module.a, module.b = torch.nn.Parameter(a.detach()), torch.nn.Parameter(b.detach())

    def loss(m: torch.nn.Module, _: object) -> torch.Tensor:
        theta = torch.cat([m.a, m.b])  # type: ignore[list-item]
        return theta @ hessian @ theta / 2 + theta.sum()

    groups = [
        {"params": [module.a], "lr": 0.1, "weight_decay": 0.0},
        {"params": [module.b], "lr": 0.01, "weight_decay": 5.0},
    ]
    optimizer = torch.optim.SGD(groups)
    field = GradientField(module, loss, None)
    found = stability(field, field.theta, update_rules(optimizer), capture(optimizer))
    rate = torch.tensor([0.1, 0.1, 0.01, 0.01, 0.01], dtype=torch.float64)
    decay = torch.tensor([0.0, 0.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    largest = torch.linalg.eigvals(rate[:, None] * (hessian + torch.diag(decay))).real.max()
    assert found.ratio == pytest.approx(float(largest) / 2, rel=1e-4)


def test_a_clipped_gradient_leaves_the_sharpness_that_of_the_loss() -> None:
    field = network_field()
    true = float(torch.linalg.eigvalsh(exact_hessian(field, field.theta))[-1])
    field.transform = lambda g: g * (0.01 / g.norm())
    assert measured(field, SGD(field.parameters, lr=0.1)).sharpness == pytest.approx(true, rel=0.02)


@pytest.mark.parametrize("clip", [None, lambda g: g.clamp(-0.5, 0.5)], ids=["as_it_is", "clipped"])
def test_adam_before_its_first_step_takes_the_gradient_for_what_it_will_be(clip: Any) -> None:
    module = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    ones = torch.ones(1, 1, dtype=torch.float64)
    field = GradientField(module, lambda m, x: (m(x) - 3).square().mean(), ones, transform=clip)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-9, eps=0.0)
    before = stability(field, field.theta, update_rules(optimizer), capture(optimizer)).ratio
    module.weight.grad = field.gradient(field.theta).view_as(module.weight)
    optimizer.step()
    after = stability(field, field.theta, update_rules(optimizer), capture(optimizer)).ratio
    assert before == pytest.approx(after, rel=1e-6)
