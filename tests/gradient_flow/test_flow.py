"""The gradient flow and the modified flows, against closed forms, conserved quantities and gradient descent."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from neuralode import SolveError
from neuralode.errors import UsageError
from neuralode.gradient_flow import GradientField, OptimizerFlow, Replica, UpdateRule, capture, flow, follow, modified
from tests.gradient_flow.networks import Weights, network_field, regression, relative

REGRESSION = regression()


def test_regression_is_that_of_the_design_page() -> None:
    torch.testing.assert_close(REGRESSION.minimum.tolist(), [4.21509616, 2.77011339], atol=5e-9, rtol=0)
    values = torch.linalg.eigvalsh(REGRESSION.hessian).tolist()
    torch.testing.assert_close(values, [0.33942384, 4.13005521], atol=5e-9, rtol=0)


def test_follow_reaches_the_matrix_exponential() -> None:
    field = REGRESSION.field
    state = capture(torch.optim.SGD(field.parameters, lr=0.01))
    dynamics = OptimizerFlow(field, [UpdateRule("sgd", 0.01)], state, [[0.01]] * 599)
    path = follow(dynamics, dynamics.start(field.theta), range(600), method="dopri5", rtol=1e-10)
    torch.testing.assert_close(path.s, 0.01 * torch.arange(600).double())
    assert (path.thetas - REGRESSION.flow(path.s)).abs().max() < 1e-6


@pytest.mark.parametrize("rtol", [1e-3, 1e-4, 1e-5])
def test_rkc2_within_its_tolerance(rtol: float) -> None:
    times = torch.linspace(0, 6, 61).double()
    path = flow(REGRESSION.field, REGRESSION.field.theta, times, rtol=rtol)
    apart = (path.thetas - REGRESSION.flow(times)).norm(dim=1).max()
    assert apart < 10 * rtol * REGRESSION.minimum.norm()


def test_descent_and_its_largest_gap() -> None:
    field = REGRESSION.field
    replica = Replica(field.theta, capture(torch.optim.SGD(field.parameters, lr=0.01)))
    steps = [field.theta]
    for _ in range(599):
        steps.append(replica.step(field.gradient(steps[-1])))
    taken = torch.stack(steps)
    torch.testing.assert_close(taken, REGRESSION.descent(0.01, 599), atol=1e-12, rtol=0)
    gap = (taken - REGRESSION.flow(0.01 * torch.arange(600).double())).norm(dim=1)
    assert int(gap.argmax()) == 24
    assert float(gap.max()) == pytest.approx(0.0376210, abs=5e-8)


def two_weights() -> GradientField:
    """E = ½(0.6 − ab)²."""
    module = Weights(*torch.tensor([2.8, 3.5], dtype=torch.float64))
    return GradientField(module, lambda m, y: 0.5 * (y - m().prod()).square(), 0.6)


def test_two_weights_conserved_by_the_flow() -> None:
    field = two_weights()
    path = flow(field, field.theta, torch.linspace(0, 3, 13), method="dop853", rtol=1e-12)
    kept = path.thetas[:, 0] ** 2 - path.thetas[:, 1] ** 2
    torch.testing.assert_close(kept, torch.full_like(kept, -4.41), atol=1e-8, rtol=0)
    assert float(field.loss(path.end)) < 1e-6


def test_two_weights_not_conserved_by_descent() -> None:
    field, lr = two_weights(), 0.02
    theta = field.theta
    for _ in range(40):
        a, b = theta.tolist()
        theta = theta - lr * field.gradient(theta)
        expected = (a * a - b * b) * (1 - lr**2 * (a * b - 0.6) ** 2)
        assert float(theta[0] ** 2 - theta[1] ** 2) == pytest.approx(expected, rel=1e-12)


@cache
def gaps(order: int) -> list[float]:
    """Between the descent and a flow at s = 1.6, for η = 0.2, 0.1, 0.05."""
    field, s, apart = network_field(), 1.6, []
    for lr in (0.2, 0.1, 0.05):
        theta = field.theta
        with field.borrowed():
            for _ in range(round(s / lr)):
                theta = theta - lr * field.gradient(theta)
        end = flow(field, field.theta, [0, s], method="dop853", rtol=1e-9, dynamics=modified(field, lr, order)).end
        apart.append(float((theta - end).norm()))
    return apart


@pytest.mark.parametrize(("order", "least", "most"), [(1, 1.7, 2.4), (2, 3.2, 5.0), (3, 6.0, 11.0)])
def test_modified_flows_are_closer_by_an_order_each(order: int, least: float, most: float) -> None:
    found = gaps(order)
    for coarse, fine in pairwise(found):
        assert least < coarse / fine < most


def test_modified_flows_of_unknown_order() -> None:
    with pytest.raises(UsageError, match="order 4"):
        modified(network_field(), 0.1, 4)


def digits() -> GradientField:
    data = load_digits()
    inputs = torch.from_numpy(data.data / 16)
    inputs = (inputs - inputs.mean(0))[:200]
    targets = nn.functional.one_hot(torch.from_numpy(data.target[:200]).long(), 10).double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    return GradientField(module, lambda m, b: 0.5 * (m(b[0]) - b[1]).square().sum(1).mean(), (inputs, targets))


def test_rkc2_follows_a_network_with_fewer_gradients() -> None:
    field, times = digits(), [0.0, 20.0, 60.0]
    start = field.theta
    fine = flow(field, start, times, method="dopri5", rtol=1e-8).thetas
    quick, usual = (flow(field, start, times, method=method, rtol=1e-3) for method in ("rkc2", "dopri5"))
    for theta, true in zip(quick.thetas[1:], fine[1:], strict=True):
        assert (theta - true).norm() < 10e-3 * true.norm()
    assert quick.gradients < 0.7 * usual.gradients


def test_goes_on_from_where_it_ended() -> None:
    field, start = REGRESSION.field, REGRESSION.field.theta
    first = flow(field, start, [0, 1.0], method="dopri5", rtol=1e-8)
    torch.testing.assert_close(first.end, first.thetas[-1], rtol=0, atol=0)
    second = flow(field, first.end, [1.0, 3.0], method="dopri5", rtol=1e-8, first_step=first.last_step)
    true = REGRESSION.flow(torch.tensor([3.0]).double())[0]
    assert relative(second.end, true) < 1e-6
    assert first.last_step is not None
    assert 0 < first.last_step < 1


def test_gradients_are_counted() -> None:
    field = network_field()
    path = flow(field, field.theta, [0, 1.0])
    assert path.gradients == field.gradients > path.stats.nfe > 0


def test_steps_have_a_limit() -> None:
    field = REGRESSION.field
    with pytest.raises(SolveError):
        flow(field, field.theta, [0, 6.0], method="dopri5", rtol=1e-8, max_steps=5)
    dynamics = OptimizerFlow(
        field, [UpdateRule("sgd", 0.01)], capture(torch.optim.SGD(field.parameters, lr=0.01)), [[0.01]] * 600
    )
    with pytest.raises(SolveError):
        follow(dynamics, dynamics.start(field.theta), [0, 600], method="dopri5", rtol=1e-8, max_steps=5)


def test_fixed_steps_are_of_the_size_that_is_asked_for() -> None:
    layer = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    field = GradientField(layer, lambda m, x: m(x).square().mean() / 2, torch.ones(1, 1, dtype=torch.float64))
    start = field.theta
    path = flow(field, start, [0.0, 1.0], method="rk4", step_size=0.1)
    assert path.stats.accepted == 10
    assert float(path.thetas[-1]) == pytest.approx(float(start) * math.exp(-1), rel=1e-5)
