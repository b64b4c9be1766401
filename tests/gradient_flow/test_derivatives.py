"""Derivatives along the flow, against differences of the flow itself, finely integrated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from neuralode.errors import UsageError
from neuralode.gradient_flow import GradientField, derivatives
from tests.gradient_flow.networks import (
    FinePath,
    convolutional,
    exact_hessian,
    mlp,
    network_field,
    neural_ode,
    quadratic_field,
    relative,
    symmetric,
    with_layer_norm,
)  # fmt: skip

TIGHT = {"rtol": 1e-8, "atol": 1e-8}
NETWORKS = {
    "mlp": mlp,
    "layer norm": with_layer_norm,
    "convolutions": convolutional,
    "neural ODE, exact": neural_ode(checkpoint="never", **TIGHT),
    "neural ODE, recomputed": neural_ode(checkpoint="always", **TIGHT),
    "neural ODE, adjoint": neural_ode(gradient="adjoint", **TIGHT),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_flow(name: str) -> None:
    field, lr = network_field(NETWORKS[name]), 0.3
    theta = field.theta
    path, found = FinePath(field, theta, 0.005), derivatives(field, theta, lr)
    assert relative(-lr * found.gradient, lr * path.derivative(1, path.thetas)) < 1e-7
    assert relative(found.acceleration, lr**2 * path.derivative(2, path.thetas)) < 1e-6
    assert relative(found.jerk, lr**3 * path.derivative(3, path.thetas)) < 1e-6
    assert found.loss == pytest.approx(float(path.losses[4]), rel=1e-12)
    assert -found.rate == pytest.approx(lr * float(path.derivative(1, path.losses)), rel=1e-6)
    assert found.loss_acceleration == pytest.approx(lr**2 * float(path.derivative(2, path.losses)), rel=1e-6)
    assert found.loss_jerk == pytest.approx(lr**3 * float(path.derivative(3, path.losses)), rel=1e-6)


def test_quadratic() -> None:
    hessian, start = symmetric(torch.tensor([0.1, 1.0, 2.5, 4.0], dtype=torch.float64)), torch.ones(4).double()
    found = derivatives(quadratic_field(hessian, start), start, 0.1)
    assert found.drift.norm() < 1e-6 * found.stiffness.norm()
    assert found.jerk_ratio < 1e-6
    torch.testing.assert_close(found.acceleration, 0.1**2 * hessian @ hessian @ start, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.jerk, -(0.1**3) * hessian @ hessian @ found.gradient, rtol=0, atol=1e-7)


def test_minimum() -> None:
    field = quadratic_field(torch.eye(3).double(), torch.zeros(3).double())
    found = derivatives(field, field.theta, 0.1)
    assert not found.acceleration.any()
    assert not found.jerk.any()
    assert found.rate == found.loss_jerk == found.jerk_ratio == 0


def test_single_precision() -> None:
    exact, rough = (network_field(dtype=dtype) for dtype in (torch.float64, torch.float32))
    theta = exact.theta
    true, found = derivatives(exact, theta, 1.0), derivatives(rough, theta.float(), 1.0)
    assert relative(found.acceleration.double(), true.acceleration) < 1e-3
    assert relative(found.drift.double(), true.drift) < 1e-2


def test_product() -> None:
    field = network_field()
    theta, v = field.theta, torch.randn(field.theta.numel(), generator=torch.Generator().manual_seed(1)).double()
    assert relative(field.product(theta, v), exact_hessian(field, theta) @ v) < 1e-6
    torch.testing.assert_close(field.product(theta, -1e6 * v), -1e6 * field.product(theta, v), rtol=1e-9, atol=1e-9)
    assert not field.product(theta, torch.zeros_like(v)).any()


def test_product_single_precision() -> None:
    exact, rough = (network_field(dtype=dtype) for dtype in (torch.float64, torch.float32))
    theta, v = exact.theta, exact.gradient(exact.theta)
    assert relative(rough.product(theta.float(), v.float()).double(), exact.product(theta, v)) < 1e-3


@pytest.mark.parametrize("make", [mlp, convolutional], ids=["mlp", "convolutions"])
def test_autograd(make: Callable[[], nn.Module]) -> None:
    field = network_field(make)
    found, other = (derivatives(field, field.theta, 0.5, way) for way in ("autograd", "differences"))
    assert relative(found.acceleration, other.acceleration) < 1e-6
    assert relative(found.jerk, other.jerk) < 1e-6
    assert relative(found.drift, other.drift) < 1e-5
    assert relative(found.acceleration, 0.25 * exact_hessian(field, field.theta) @ found.gradient) < 1e-12


def test_autograd_of_layer_norm() -> None:
    field = network_field(with_layer_norm)
    with pytest.raises(UsageError, match=r"differ on T\[g,g\] by .*nn\.LayerNorm.*use way='differences'"):
        derivatives(field, field.theta, 0.1, way="autograd")


class _Square(torch.autograd.Function):
    """Its second derivative is lost without a word: what `once_differentiable` returns is no function of x."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return 2 * ctx.saved_tensors[0] * gradient


def test_autograd_that_loses_second_derivatives() -> None:
    base = network_field()
    field = GradientField(base.module, lambda m, b: _Square.apply(m(b[0]) - b[1]).mean(), base.batch)
    with pytest.raises(UsageError, match=r"(differ on Hg|cannot differentiate).*; use way='differences'"):
        derivatives(field, field.theta, 0.1, way="autograd")
    right = derivatives(base, base.theta, 0.1)
    assert relative(derivatives(field, field.theta, 0.1).jerk, right.jerk) < 1e-9


def attention(module: Any, batch: Any) -> torch.Tensor:
    x = module(batch[0])[None, None].expand(1, 2, -1, -1)
    return nn.functional.scaled_dot_product_attention(x, x, x).square().mean()


def test_autograd_without_double_backward() -> None:
    base = network_field()
    field = GradientField(base.module, attention, base.batch)
    with pytest.raises(
        UsageError, match=r"autograd cannot differentiate this loss again \(.*\); use way='differences'"
    ):
        derivatives(field, field.theta, 0.1, way="autograd")
    assert derivatives(field, field.theta, 0.1).stiffness.norm() > 0


def test_autograd_of_adjoint() -> None:
    field = network_field(neural_ode(gradient="adjoint", rtol=1e-6, atol=1e-6))
    with pytest.raises(UsageError, match="no second derivatives"):
        derivatives(field, field.theta, 0.1, way="autograd")


@pytest.mark.parametrize("way", ["differences", "autograd"])
def test_a_clipped_gradient_has_the_derivatives_of_the_loss(way: str) -> None:
    field = network_field()
    free = derivatives(field, field.theta, 0.1, way)
    field.transform = lambda g: g * (0.01 / g.norm())
    clipped = derivatives(field, field.theta, 0.1, way)
    assert torch.equal(clipped.jerk, free.jerk)
    assert torch.equal(clipped.gradient, free.gradient)


def test_unknown_way() -> None:
    field = network_field()
    with pytest.raises(UsageError, match="unknown way 'autogard'; did you mean 'autograd'"):
        derivatives(field, field.theta, 0.1, way="autogard")


def test_costs_four_gradients_beyond_the_first() -> None:
    field = network_field()
    derivatives(field, field.theta, 0.1)
    assert field.gradients == 5
