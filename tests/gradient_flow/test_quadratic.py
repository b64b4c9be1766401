"""Closed forms on quadratics, and what is none."""

from __future__ import annotations

import torch

from neuralode.gradient_flow.quadratic import quadratic
from tests.gradient_flow.networks import network_field, quadratic_field, regression, symmetric


def test_regression() -> None:
    known = regression()
    found = quadratic(known.field, known.field.theta)
    assert found is not None
    times = torch.linspace(0, 6, 20).double()
    torch.testing.assert_close(found.flow(times), known.flow(times), atol=1e-6, rtol=0)
    steps = torch.arange(200)
    torch.testing.assert_close(found.descent(0.01, steps), known.descent(0.01, 199), atol=1e-6, rtol=0)


def test_flat_and_negative_directions() -> None:
    hessian, start = symmetric(torch.tensor([-0.5, 0.0, 2.0]).double()), torch.tensor([1.0, -2.0, 0.5]).double()
    base = quadratic_field(hessian, start)
    slope = torch.tensor([0.3, -0.1, 0.2]).double()
    base.loss_fn = lambda module, h: 0.5 * module() @ h @ module() + slope @ module()
    found = quadratic(base, start)
    assert found is not None
    theta, fine = start.clone(), start.clone()
    for _ in range(10):
        theta = theta - 0.1 * (hessian @ theta + slope)
    for _ in range(10000):
        fine = fine - 1e-4 * (hessian @ fine + slope)
    torch.testing.assert_close(found.descent(0.1, torch.tensor([10]))[0], theta, atol=1e-7, rtol=0)
    torch.testing.assert_close(found.flow(torch.tensor([1.0]))[0], fine, atol=5e-4, rtol=0)


def test_networks_are_none() -> None:
    field = network_field(lambda: torch.nn.Sequential(torch.nn.Linear(5, 1), torch.nn.Tanh(), torch.nn.Linear(1, 3)))
    assert field.theta.numel() <= 32
    assert quadratic(field, field.theta) is None


def test_large_models_are_not_tried() -> None:
    field = network_field()
    assert quadratic(field, field.theta) is None
    assert field.gradients == 0
