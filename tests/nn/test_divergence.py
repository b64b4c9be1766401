"""Densities along vector fields: traces against the Jacobian, and flows whose density is known."""

from __future__ import annotations

import math
from collections.abc import Callable
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


class LowRank(nn.Linear):
    """A linear layer with an update of low rank beside it."""

    def __init__(self, before: int, after: int):
        super().__init__(before, after)
        self.down, self.up = nn.Linear(before, 2), nn.Linear(2, after)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.up(self.down(x))


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, output: 2 * output)


def patched(layer: nn.Module) -> None:
    layer.forward = torch.sin  # type: ignore[assignment]


CHANGES: dict[str, Callable[[MLPField], Any]] = {
    "a subclass": lambda field: field.net.__setitem__(2, LowRank(7, 6)),
    "a hook on a layer": lambda field: hooked(field.net[2]),
    "a hook on an activation": lambda field: hooked(field.net[1]),
    "a hook on the network": lambda field: hooked(field.net),
    "a hook before an activation": lambda field: field.net[1].register_forward_pre_hook(lambda _, xs: (2 * xs[0],)),
    "a forward of its own": lambda field: patched(field.net[1]),
    "another softplus": lambda field: field.net.__setitem__(1, nn.Softplus(beta=3, threshold=1)),
    "in place": lambda field: field.net.__setitem__(1, nn.SiLU(inplace=True)),
    "normalised weights": lambda field: nn.utils.parametrizations.weight_norm(field.net[2]),
    "weights normalised by a hook": lambda field: nn.utils.weight_norm(field.net[2]),
    "two linear layers in a row": lambda field: field.net.__setitem__(1, nn.Linear(7, 7)),
    "tanh first": lambda field: field.net.insert(0, nn.Tanh()),
}


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_network_that_was_changed_has_the_trace_of_what_it_is_now(change: str, trace: str) -> None:
    field, t = make({"hidden": [7, 6]}), torch.tensor(0.4).double()
    CHANGES[change](field)
    density, y = DensityField(field.double(), trace=trace), torch.randn(5, 3).double()
    with torch.no_grad():
        for parameter in field.parameters():  # a weight that a hook makes of these is an old one now
            parameter.mul_(1.5)
    density.draw(y)
    signs, jacobian = density.noise, jacobian_of(field, t, y)
    exact = torch.einsum("bii->b", jacobian)
    wanted = exact if trace == "exact" else torch.einsum("bi,bij,bj->b", signs, jacobian, signs)
    dy, change_of_density = density(t, (y, torch.zeros(5).double()))
    torch.testing.assert_close(change_of_density, -wanted)
    torch.testing.assert_close(dy, field(t, y))


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
