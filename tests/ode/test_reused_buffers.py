"""Fields that write dy/dt into one buffer of their own and give that at every evaluation, to save allocations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import nn

from neuralode import odeint, solve

TIMES = [0.0, 0.4, 1.0]
METHODS = ["euler", "midpoint", "rk4", "bosh3", "dopri5", "dop853", "rkc2"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, dtype=torch.float64)
        self.out = torch.zeros(4, 2, dtype=torch.float64)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[0.3, 1.5], [-1.2, 0.2]]))
            self.linear.bias.copy_(torch.tensor([0.1, -0.4]))


class Fresh(Net):
    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(y)) * (1 + t)


class Reused(Net):
    """Writes the values only."""

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.mul(torch.tanh(self.linear(y)), 1 + t, out=self.out)


class ReusedView(Reused):
    """Gives another tensor object each time, of the same memory."""

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super().forward(t, y)[:]


class ReusedInGraph(Net):
    """Writes the values with their graph."""

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.out = self.out.detach()
        return self.out.copy_(torch.tanh(self.linear(y)) * (1 + t))


def start() -> torch.Tensor:
    return torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)


def settings(method: str) -> dict[str, Any]:
    return {"method": method, "options": {"step_size": 0.1} if method in ("euler", "midpoint", "rk4") else {}}


@pytest.mark.parametrize("field", [Reused, ReusedView, ReusedInGraph])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", METHODS)
def test_states(method: str, mode: Callable[[], Any], field: Callable[[], Net]) -> None:
    with mode():
        wanted = solve(Fresh(), start(), TIMES, engine="stepper", **settings(method))
        found = solve(field(), start(), TIMES, **settings(method))
    torch.testing.assert_close(found.ys, wanted.ys, rtol=1e-12, atol=1e-12)
    assert found.stats.nfe == wanted.stats.nfe


def test_a_stiff_method() -> None:
    """It needs the field's Jacobian, which values without a graph do not have."""
    wanted, found = (solve(field, start(), TIMES, method="esdirk4") for field in (Fresh(), ReusedInGraph()))
    torch.testing.assert_close(found.ys, wanted.ys, rtol=1e-12, atol=1e-12)


def test_a_buffer_made_in_inference_mode() -> None:
    with torch.inference_mode():
        wanted = solve(Fresh(), start(), TIMES, engine="stepper").ys
        torch.testing.assert_close(solve(Reused(), start(), TIMES).ys, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "dopri5"])
def test_the_drop_in_front(method: str) -> None:
    field, t = Reused(), torch.tensor(TIMES, dtype=torch.float64)
    with torch.no_grad():
        wanted = torchdiffeq.odeint(Fresh(), start(), t, method=method, rtol=1e-9, atol=1e-10)
        found = odeint(field, start(), t, method=method, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_torchdiffeqs_steps(method: str) -> None:
    """Its rk4 by itself would keep all four slopes in the field's one buffer."""
    with torch.no_grad():
        wanted, found = (
            solve(field, start(), TIMES, engine="torchdiffeq", **settings(method)).ys for field in (Fresh(), Reused())
        )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per_sample", [False, True])
def test_dense_output(per_sample: bool) -> None:
    values = []
    for field in (Fresh(), ReusedInGraph()):
        dense = solve(field, start(), TIMES, engine="stepper", per_sample=per_sample, dense=True).dense
        assert dense is not None
        values.append(torch.stack([dense(0.13), dense(0.77)]))
    torch.testing.assert_close(values[1], values[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "how",
    [
        {}, {"checkpoint": "always"}, {"checkpoint": "never"}, {"checkpoint": 2}, {"per_sample": True},
        {"method": "rk4", "options": {"step_size": 0.1}, "checkpoint": "always"}, {"method": "rkc2"},
    ],
    ids=str,
)  # fmt: skip
def test_gradients(how: dict[str, Any]) -> None:
    gradients = []
    for field in (Fresh(), ReusedInGraph()):
        y0 = start().requires_grad_()
        ys = solve(field, y0, TIMES, engine="stepper", **how).ys
        gradients.append(torch.autograd.grad((ys[1:] ** 2).sum(), [y0, *field.parameters()]))
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
