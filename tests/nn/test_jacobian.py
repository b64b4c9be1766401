"""The largest Jacobian norm, against matrices whose norm is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from neuralode import ODEBlock, SolverConfig
from neuralode.nn import MLPField, largest_jacobian_norm

MATRIX = torch.tensor([[1.0, 2.0], [0.0, -0.5]])
NORM = float(torch.linalg.matrix_norm(MATRIX, ord=2))
Y0 = torch.tensor([[1.0, 0.0], [0.3, -0.2]])


@pytest.mark.parametrize("field", [lambda t, y: y @ MATRIX.T, lambda y: y @ MATRIX.T], ids=["f(t,y)", "f(y)"])
def test_linear_field(field: Any) -> None:
    assert largest_jacobian_norm(ODEBlock(field), Y0) == pytest.approx(NORM, rel=1e-5)


def test_largest_over_times() -> None:
    block = ODEBlock(lambda t, y: t * (y @ MATRIX.T), SolverConfig(t_span=[0.5, 2.0]))
    assert largest_jacobian_norm(block, Y0) == pytest.approx(2 * NORM, rel=1e-5)


def test_largest_over_samples() -> None:
    # ∂(y²/2)/∂y = y, and y decays from the larger start
    block = ODEBlock(lambda t, y: -(y**2) / 2)
    assert largest_jacobian_norm(block, torch.tensor([[0.5], [3.0]])) == pytest.approx(3.0, rel=1e-5)


def test_augmented_block() -> None:
    linear = nn.Linear(3, 3, bias=False)
    block = ODEBlock(linear, augment=1)
    wanted = float(torch.linalg.matrix_norm(linear.weight.detach(), ord=2))
    assert largest_jacobian_norm(block, Y0) == pytest.approx(wanted, rel=1e-4)


def test_leaves_no_gradients() -> None:
    block = ODEBlock(MLPField(2, [8], time=True))
    assert largest_jacobian_norm(block, Y0) > 0
    assert all(p.grad is None for p in block.parameters())
