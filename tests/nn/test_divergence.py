"""Densities along vector fields: traces against the Jacobian, and flows whose density is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import neuralode
from neuralode.errors import UsageError
from neuralode.kernels.library import library
from neuralode.nn import DensityField, MLPField

CASES: list[dict[str, Any]] = [
    {"hidden": [7]}, {"hidden": [7, 6]}, {"hidden": [7, 6, 5]}, {"hidden": [7, 6], "time": True},
    {"hidden": [5], "power": 3}, {"hidden": [7, 6], "activation_name": "softplus"},
    {"hidden": [7, 6], "activation_name": "silu"}, {"hidden": [7], "activation_name": "elu"},
]  # fmt: skip


def make(options: dict[str, Any], features: int = 3) -> MLPField:
    torch.manual_seed(0)
    return MLPField(features, **options).double()


def jacobian_of(field: nn.Module, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.func.jacrev(lambda row: field(t, row[None])[0])(row) for row in y])


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_exact_trace_is_that_of_the_jacobian(options: dict[str, Any]) -> None:
    field, t = make(options), torch.tensor(0.4).double()
    y = torch.randn(5, 3).double()
    dy, change = DensityField(field)(t, (y, torch.zeros(5).double()))
    trace = jacobian_of(field, t, y).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(dy, field(t, y))
    torch.testing.assert_close(change, -trace)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_hutchinsons_trace_is_a_quadratic_form(options: dict[str, Any]) -> None:
    field, t = make(options), torch.tensor(0.4).double()
    y = torch.randn(5, 3).double()
    density = DensityField(field, trace="hutchinson")
    density.draw(y)
    assert density.noise is not None
    assert set(density.noise.unique().tolist()) <= {-1.0, 1.0}
    expected = torch.einsum("bi,bij,bj->b", density.noise, jacobian_of(field, t, y), density.noise)
    torch.testing.assert_close(density(t, (y, torch.zeros(5).double()))[1], -expected)


def test_a_linear_flow_has_a_known_density() -> None:
    field = MLPField(2, []).double()
    layer = field.net[0]
    assert isinstance(layer, nn.Linear)
    y0 = torch.randn(4, 2).double()
    ys, log_p = neuralode.solve(DensityField(field), (y0, torch.zeros(4).double()), [0.0, 1.0], rtol=1e-9, atol=1e-9).ys
    torch.testing.assert_close(log_p[-1], -layer.weight.trace().expand(4), rtol=1e-7, atol=1e-7)
    assert ys.shape == (2, 4, 2)


@pytest.mark.skipif(library() is None, reason="no kernels are built")
@pytest.mark.parametrize("options", CASES[:7], ids=str)
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_the_kernels_know_it(options: dict[str, Any], trace: str) -> None:
    density = DensityField(make(options), trace=trace)
    y0 = torch.randn(20, 3).double()
    density.draw(y0)
    found = []
    for engine in ("fused", "stepper"):
        state = (y0, torch.zeros(20).double())
        solution = neuralode.solve(density, state, [0.0, 1.0], rtol=1e-6, atol=1e-6, engine=engine)
        loss = solution.ys[1][-1].mean() + solution.ys[0][-1].square().mean()
        found.append([loss, *torch.autograd.grad(loss, list(density.parameters()), allow_unused=True)])
    for ours, theirs in zip(*found, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_density_integrates_to_one() -> None:
    """Carried back from a normal distribution at the end, over a grid of states."""
    grid = torch.linspace(-7, 7, 141).double()
    y0 = torch.cartesian_prod(grid, grid)
    density = DensityField(make({"hidden": [16, 16]}, features=2))
    with torch.no_grad():
        state = (y0, torch.zeros(len(y0)).double())
        ends, change = neuralode.solve(density, state, [0.0, 1.0], rtol=1e-6, atol=1e-6).ys
    log_p = -ends[-1].square().sum(1) / 2 - math.log(2 * math.pi) - change[-1]
    assert abs(float(log_p.exp().sum()) * 0.1**2 - 1) < 1e-3


def test_bad_input_is_refused_with_a_sentence() -> None:
    with pytest.raises(UsageError, match="hutchinson"):
        DensityField(make({"hidden": [3]}), trace="hutchinsen")
    with pytest.raises(UsageError, match="draw"):
        DensityField(make({"hidden": [3]}), trace="hutchinson")(torch.tensor(0.0), (torch.zeros(2, 3), torch.zeros(2)))
    with pytest.raises(UsageError, match="log p"):
        DensityField(make({"hidden": [3]}))(torch.tensor(0.0), torch.zeros(2, 3))
