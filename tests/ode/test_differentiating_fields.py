"""Fields that differentiate something themselves: potentials, Hamiltonians."""

from __future__ import annotations

import warnings

import pytest
import torch
import torchdiffeq
from torch import nn

import neuralode

TIMES = torch.tensor([0.0, 1.0], dtype=torch.float64)


@pytest.fixture
def potential() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def test_a_field_of_autograd_has_the_graph_that_it_has_under_torchdiffeq(potential: nn.Module) -> None:
    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return -torch.autograd.grad(potential(y).sum(), y, create_graph=True)[0]

    y0 = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = neuralode.odeint(field, y0, TIMES)[-1]
        solved = neuralode.solve(field, y0, TIMES, rtol=1e-8, atol=1e-8).final
    theirs = torchdiffeq.odeint(field, y0, TIMES)[-1]
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert torch.allclose(solved, theirs, atol=1e-6)
    found, known = (torch.autograd.grad(y.sum(), y0, retain_graph=True)[0] for y in (ours, theirs))
    assert torch.allclose(found, known, atol=1e-6)


def test_a_field_of_torch_func(potential: nn.Module) -> None:
    slope = torch.func.vmap(torch.func.grad(lambda y: potential(y).squeeze()))
    y0 = torch.randn(5, 2, dtype=torch.float64)
    gradients = []
    for checkpoint in ("auto", "never"):
        final = neuralode.solve(lambda t, y: -slope(y), y0, TIMES, checkpoint=checkpoint).final
        gradients.append(torch.autograd.grad(final.square().sum(), potential[0].weight)[0])  # type: ignore[arg-type]
    assert torch.allclose(*gradients, rtol=1e-12)
