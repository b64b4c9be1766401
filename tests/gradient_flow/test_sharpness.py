"""The largest eigenvalue by Lanczos' method, against dense eigenvalues."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from neuralode.gradient_flow import GradientField, Sharpness, lanczos
from tests.gradient_flow.networks import convolutional, exact_hessian, mlp, network_field, symmetric, with_layer_norm


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


def largest(field: GradientField, theta: torch.Tensor) -> float:
    return float(torch.linalg.eigvalsh(exact_hessian(field, theta))[-1])


NETWORKS: dict[str, Any] = {"mlp": mlp, "wide": wide, "layer norm": with_layer_norm, "convolutions": convolutional}


@pytest.mark.parametrize("name", NETWORKS)
def test_cold_and_warm(name: str) -> None:
    field, estimate = network_field(NETWORKS[name]), Sharpness()
    theta = field.theta
    cold = estimate(lambda v: field.product(theta, v), theta)
    assert cold.value == pytest.approx(largest(field, theta), rel=0.012)
    for _ in range(3):
        theta = theta - 0.05 * field.gradient(theta)
        before = field.gradients
        warm = estimate(lambda v, at=theta: field.product(at, v), theta)
        assert field.gradients - before == 2 * 5
        assert warm.value == pytest.approx(largest(field, theta), rel=0.005)


def test_single_precision() -> None:
    field, exact = network_field(wide, torch.float32), network_field(wide)
    estimate, theta = Sharpness(), field.theta
    for _ in range(2):
        found = estimate(lambda v: field.product(theta, v), theta)
    assert found.value == pytest.approx(largest(exact, theta.double()), rel=0.005)


def test_pair_and_residual() -> None:
    matrix = symmetric(torch.linspace(-3, 2, 30).double())
    found = lanczos(lambda v: matrix @ v, torch.ones(30).double(), 8)
    assert float(found.vector.norm()) == pytest.approx(1, rel=1e-12)
    assert found.value == pytest.approx(float(found.vector @ matrix @ found.vector), rel=1e-10)
    image = matrix @ found.vector
    assert found.residual == pytest.approx(float((image - found.value * found.vector).norm()), rel=1e-6)
    assert (torch.linalg.eigvalsh(matrix) - found.value).abs().min() <= found.residual
    assert 2.9 < found.radius <= 3 + 1e-12  # the smallest eigenvalue, -3, is the largest in size


def test_preconditioned() -> None:
    field = network_field()
    theta = field.theta
    scale = torch.rand(theta.numel(), generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 50 + 0.5
    true = float(torch.linalg.eigvals(scale.diag() @ exact_hessian(field, theta)).real.max())
    estimate = Sharpness()
    cold, warm = (estimate(lambda v: field.product(theta, v), theta, scale).value for _ in range(2))
    assert cold == pytest.approx(true, rel=0.012)
    assert warm == pytest.approx(true, rel=0.005)


@pytest.mark.parametrize("values", [[3.0], [-3.0], [1.0, 4.0], [-2.0, -1.0]])
def test_one_and_two_weights(values: list[float]) -> None:
    matrix = symmetric(torch.tensor(values).double())
    found = Sharpness()(lambda v: matrix @ v, torch.zeros(len(values)).double())
    assert found.value == pytest.approx(max(values), rel=1e-12)
    assert found.radius == pytest.approx(max(map(abs, values)), rel=1e-12)
    assert lanczos(lambda v: matrix @ v, torch.ones(len(values)).double(), 40).value == pytest.approx(max(values))


def test_zero_hessian() -> None:
    estimate = Sharpness()
    for _ in range(2):
        found = estimate(torch.zeros_like, torch.zeros(6))
        assert (found.value, found.residual, found.radius) == (0.0, 0.0, 0.0)
        assert float(found.vector.norm()) == pytest.approx(1)


def test_overtaken_eigenvector() -> None:
    """A start that is exactly an eigenvector, no longer of the largest eigenvalue."""
    estimate = Sharpness()
    estimate.vector = torch.tensor([1.0, 0.0, 0.0, 0.0])
    values = torch.tensor([2.0, 3.0, 0.5, -1.0])
    assert estimate(lambda v: values * v, torch.zeros(4)).value == pytest.approx(3.0, rel=1e-5)


def test_not_finite() -> None:
    found = Sharpness()(lambda v: v * float("nan"), torch.zeros(5))
    assert found.value != found.value
    assert found.vector.isfinite().all()


def test_draws_nothing_and_repeats() -> None:
    matrix = symmetric(torch.linspace(0, 1, 20).double())
    before = torch.get_rng_state()
    first, second = (Sharpness()(lambda v: matrix @ v, torch.zeros(20).double()) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.value == second.value
    assert torch.equal(first.vector, second.vector)


def test_state() -> None:
    matrix = symmetric(torch.linspace(0, 1, 40).double())
    first, second = Sharpness(), Sharpness()
    like = torch.zeros(40).double()
    first(lambda v: matrix @ v, like)
    second.load_state_dict(first.state_dict())
    assert first(lambda v: matrix @ v, like).value == second(lambda v: matrix @ v, like).value


def test_start_of_another_size_is_dropped() -> None:
    estimate = Sharpness()
    estimate(lambda v: 2 * v, torch.zeros(3))
    assert estimate(lambda v: 5 * v, torch.zeros(7)).value == pytest.approx(5)
