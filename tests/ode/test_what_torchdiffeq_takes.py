"""What torchdiffeq takes besides what its documentation shows: slopes that it broadcasts or casts, times that go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchdiffeq
from torch import nn

import neuralode

BOTH = (torchdiffeq, neuralode)
T01 = torch.tensor([0.0, 1.0])
TWO = (torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("field", "y0", "how"),
    [
        (lambda t, y: torch.cos(t), torch.zeros(1), {}),
        (lambda t, s: (-s[0], s[0].sum(1)), TWO, {}),
        (lambda t, y: -y[:, :1], torch.ones(2, 2), {"method": "rk4"}),
        (lambda t, s: torch.stack([s[1], -s[0]]), (torch.ones(2), torch.ones(2)), {}),
        (lambda t, s: (-x for x in s), (torch.ones(2), torch.ones(2)), {}),
        (lambda t, s: [-x for x in s], (torch.ones(2), torch.ones(2)), {}),
        (lambda t, y: -y * torch.ones(2, dtype=torch.float64), torch.ones(2), {}),
        (lambda t, y: torch.tensor([1, 0]), torch.ones(2), {"method": "rk4"}),
    ],
    ids=["number", "row for a column", "broadcast", "tensor for a tuple", "generator", "list", "precision", "integers"],
)
def test_what_it_broadcasts_and_casts(field: Any, y0: Any, how: dict[str, Any]) -> None:
    for _ in range(2):
        ours, theirs = (package.odeint(field, y0, T01, **how) for package in BOTH)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_module_that_holds_a_tensor_with_a_history() -> None:
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.code = nn.Linear(4, 2), torch.zeros(2)

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.layer(torch.cat([y, self.code.expand(len(y), 2)], -1)))

    torch.manual_seed(0)
    field, encoder = Conditioned(), nn.Linear(3, 2)
    found = []
    for package in BOTH:
        field.code = encoder(torch.ones(3))
        ys = package.odeint_adjoint(field, torch.ones(2, 2), T01, rtol=1e-5, atol=1e-6)
        found.append(torch.autograd.grad(ys.sum(), list(field.parameters())))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_callbacks_of_the_adjoint_alone() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.steps = nn.Linear(2, 2), 0

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.layer(y))

        def callback_step_adjoint(self, *_: Any) -> None:
            self.steps += 1

    field = Counting()
    ys = neuralode.odeint_adjoint(field, torch.ones(2, 2), T01, method="rk4", options={"step_size": 0.1})
    ys.sum().backward()
    assert field.steps > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_that_go_on_in_place(dtype: torch.dtype) -> None:
    layer = nn.Linear(2, 2).to(dtype)
    found = []
    for package in BOTH:
        times, y = torch.tensor([0.0, 0.1], dtype=dtype), torch.ones(2, 2, dtype=dtype)
        for _ in range(3):
            y = package.odeint(lambda t, y: torch.tanh(layer(y)) * (1 + t), y, times, rtol=1e-6, atol=1e-8)[-1]
            times += 0.1
        found.append(torch.autograd.grad(y.sum(), list(layer.parameters())))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_parts_lie_in_memory_of_their_own() -> None:
    parts = neuralode.odeint(lambda t, s: (-s[0], s[0].sum(1, keepdim=True)), TWO, T01)
    assert all(part[-1].view(-1).shape == (part[0].numel(),) for part in parts)
    conv, y0 = nn.Conv2d(3, 3, 3, padding=1), torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert neuralode.odeint(lambda t, y: torch.tanh(conv(y)), y0, T01)[-1].view(2, -1).shape == (2, 48)


@pytest.mark.parametrize("function", ["odeint", "odeint_adjoint"])
@pytest.mark.parametrize(
    ("method", "option", "near"),
    [
        ("dopri5", "saftey", "safety"),
        ("rk4", "max_num_steps", ""),
        ("dopri5", "step_size", ""),
        ("scipy_solver", "a", ""),
    ],
)
def test_options_that_a_method_does_not_know_are_left_out_with_a_warning(
    function: str, method: str, option: str, near: str
) -> None:
    field, y0 = nn.Linear(2, 2), torch.ones(3, 2)

    def call(package: Any, options: dict[str, Any]) -> torch.Tensor:
        module = nn.Module()
        module.forward = lambda t, y: torch.tanh(field(y))
        with torch.no_grad():
            return getattr(package, function)(module, y0, T01, method=method, options=options)  # type: ignore[no-any-return]

    with pytest.warns(UserWarning, match=option) as said:
        ours = call(neuralode, {option: 1})
    assert len([w for w in said if option in str(w.message)]) == 1
    assert f"did you mean '{near}'" in str(said[0].message) or not near
    torch.testing.assert_close(ours, call(neuralode, {}), rtol=0, atol=0)
    with pytest.warns(UserWarning, match=option):
        torch.testing.assert_close(ours, call(torchdiffeq, {option: 1}), rtol=1e-5, atol=1e-5)


def test_an_option_that_a_method_of_ours_does_not_know() -> None:
    with pytest.warns(UserWarning, match=r"'tsit5' .*'firststep'; did you mean 'first_step'"):
        neuralode.odeint(lambda t, y: -y, torch.ones(2), T01, method="tsit5", options={"firststep": 0.1})


@pytest.mark.parametrize("function", ["odeint", "odeint_adjoint"])
def test_no_name_is_no_method(function: str) -> None:
    for package in BOTH:
        with pytest.raises(ValueError, match=r"[Mm]ethod"):
            getattr(package, function)(nn.Linear(2, 2), torch.ones(2), T01, method="")


@pytest.mark.parametrize("how", [{}, {"method": "rk4"}, {"method": "euler", "options": {"step_size": 0.1}}], ids=str)
def test_fields_that_write_into_the_state_what_is_there(how: dict[str, Any]) -> None:
    layer = nn.Linear(2, 2)
    found = []
    for package in BOTH:
        ys = package.odeint(lambda t, y: torch.tanh(layer(y.clamp_(-9, 9))), torch.ones(3, 2), T01, **how)
        found.append((ys, *torch.autograd.grad(ys.sum(), list(layer.parameters()))))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="writes into the state"):
        neuralode.odeint(lambda t, y: torch.tanh(layer(y.clamp_(-0.5, 0.5))), torch.ones(3, 2), T01, **how)


@pytest.mark.parametrize("how", [{}, {"method": "rk4"}, {"method": "euler", "options": {"step_size": 0.1}}], ids=str)
def test_fields_that_write_into_the_time_what_is_there(how: dict[str, Any]) -> None:
    ours, theirs = (
        package.odeint(lambda t, y: t.clamp_(0, 9).cos() - y, torch.ones(2), T01, **how) for package in BOTH
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", ["odeint", "odeint_adjoint"])
def test_tolerances_of_a_wrong_shape(function: str) -> None:
    solve = getattr(neuralode, function)
    with pytest.raises(ValueError, match=r"rtol has shape \[5\] for a state of shape \[3, 2\]"):
        solve(nn.Linear(2, 2), torch.ones(3, 2), T01, rtol=torch.full((5,), 1e-3))
    with pytest.raises(ValueError, match="'tsit5' is not torchdiffeq's"):
        solve(nn.Linear(2, 2), torch.ones(3, 2), T01, rtol=torch.full((2,), 1e-3), method="tsit5")
    with pytest.raises(ValueError, match="the field returned shape"):
        solve(Flat(), torch.ones(3, 2), T01, method="tsit5")


class Flat(nn.Module):
    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y.sum(1)
