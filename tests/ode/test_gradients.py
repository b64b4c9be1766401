"""Gradients through a solve: closed forms, finite differences, autograd through plain code, exact against adjoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from neuralode.errors import UsageError
from neuralode.nn import MLPField
from neuralode.ode import solve

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
FIXED = ["euler", "midpoint", "heun2", "heun3", "rk4"]


class Growth(nn.Module):
    """dy/dt = a·y, whose solution y0·exp(a·t) can be differentiated by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(-0.7, dtype=torch.float64))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.a * y


def double_field() -> MLPField:
    torch.manual_seed(0)
    return MLPField(2, [8], time=True).double()


def starts(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradients(field: nn.Module, **kwargs: Any) -> list[torch.Tensor]:
    """Of a sum of squares over the path, by y0, t and the parameters."""
    y0 = starts()
    t = torch.tensor([0.0, 0.4, 1.1], dtype=torch.float64, requires_grad=True)
    solution = solve(field, y0, t, **kwargs)
    return list(torch.autograd.grad(solution.ys[1:].pow(2).sum(), [y0, t, *field.parameters()]))


@pytest.mark.parametrize("span", [(0.0, 2.0), (2.0, 0.5)], ids=str)
@pytest.mark.parametrize("gradient", ["exact", "adjoint"])
def test_closed_form(gradient: str, span: tuple[float, float]) -> None:
    field, y0 = Growth(), torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    t = torch.tensor(span, dtype=torch.float64, requires_grad=True)
    solve(field, y0, t, gradient=gradient, **TIGHT).final.backward()

    a, length = field.a.detach(), span[1] - span[0]
    grown = (a * length).exp()
    wanted = {"y0": grown, "a": 1.5 * length * grown, "t1": 1.5 * a * grown, "t0": -1.5 * a * grown}
    found = {"y0": y0.grad[0], "a": field.a.grad, "t1": t.grad[1], "t0": t.grad[0]}
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("method", FIXED)
def test_fixed_steps_against_finite_differences(method: str) -> None:
    field = double_field()

    def final(y0: torch.Tensor, t: torch.Tensor, gain: torch.Tensor) -> Any:
        # 0.95 is no multiple of the step, so that a small change of t does not change the number of steps
        return solve(lambda t, y, g: g * field(t, y), y0, t, args=(gain,), method=method, step_size=0.2).final

    t = torch.tensor([0.0, 0.95], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(final, (starts(), t, torch.tensor(1.3, dtype=torch.float64, requires_grad=True)))


def test_adaptive_steps_against_finite_differences() -> None:
    field, t = double_field(), torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y0, t: solve(field, y0, t, **TIGHT).final, (starts(2), t), atol=1e-6)


def _midpoint(field: nn.Module, y: torch.Tensor, h: float, steps: int) -> torch.Tensor:
    for i in range(steps):
        t = torch.tensor(i * h, dtype=torch.float64)
        y = y + h * field(t + h / 2, y + h / 2 * field(t, y))
    return y


def _heun3(field: nn.Module, y: torch.Tensor, h: float, steps: int) -> torch.Tensor:
    for i in range(steps):
        t = torch.tensor(i * h, dtype=torch.float64)
        k1 = field(t, y)
        k2 = field(t + h / 3, y + h / 3 * k1)
        k3 = field(t + 2 * h / 3, y + 2 * h / 3 * k2)
        y = y + h * (k1 + 3 * k3) / 4
    return y


@pytest.mark.parametrize(("method", "plain"), [("midpoint", _midpoint), ("heun3", _heun3)])
def test_exact_is_autograd_through_the_steps(method: str, plain: Callable[..., torch.Tensor]) -> None:
    field, y0 = double_field(), starts()
    inputs = [y0, *field.parameters()]
    ours = solve(field, y0, [0.0, 1.0], method=method, step_size=0.125).final
    reference = plain(field, y0, 0.125, 8)
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-14)
    for a, b in zip(
        torch.autograd.grad(ours.pow(2).sum(), inputs), torch.autograd.grad(reference.pow(2).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("extra", [{}, {"method": "rk4", "step_size": 0.02}], ids=["dopri5", "rk4"])
def test_adjoint_is_close_to_exact(extra: dict[str, Any]) -> None:
    field = double_field()
    exact, adjoint = (gradients(field, gradient=name, **{**TIGHT, **extra}) for name in ("exact", "adjoint"))
    for a, b in zip(exact, adjoint, strict=True):
        assert a.abs().max() > 1e-4
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_adjoint_comes_closer_as_its_tolerance_falls() -> None:
    field = double_field()
    exact = torch.cat([g.flatten() for g in gradients(field, **TIGHT)])
    errors = []
    for tolerance in (1e-4, 1e-6, 1e-8):
        found = gradients(field, gradient="adjoint", rtol=tolerance, atol=tolerance)
        errors.append(float((torch.cat([g.flatten() for g in found]) - exact).norm()))
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


@pytest.mark.parametrize("gradient", ["exact", "adjoint"])
def test_tuple_and_complex_states(gradient: str) -> None:
    # one rotation by the angle 1, as two real numbers and as one complex number
    x = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    v = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    solve(lambda t, y: (y[1], -y[0]), (x, v), [0.0, 1.0], gradient=gradient, **TIGHT).final[0].backward()
    one = torch.tensor(1.0, dtype=torch.float64)
    torch.testing.assert_close(torch.stack([x.grad, v.grad]), torch.stack([one.cos(), one.sin()]), rtol=1e-8, atol=0)

    z = torch.tensor(0.3 + 0.8j, dtype=torch.complex128, requires_grad=True)
    solve(lambda t, y: -1j * y, z, [0.0, 1.0], gradient=gradient, **TIGHT).final.real.backward()
    torch.testing.assert_close(z.grad, torch.complex(one.cos(), one.sin()), rtol=1e-8, atol=0)


def test_args_get_exact_gradients() -> None:
    rate = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
    y0 = torch.tensor([2.0], dtype=torch.float64)
    solve(lambda t, y, a: a * y, y0, [0.0, 1.0], args=(rate,), **TIGHT).final.backward()
    torch.testing.assert_close(rate.grad, 2 * rate.detach().exp(), rtol=1e-7, atol=0)


def test_torchdiffeqs_adjoint_refuses_parameters_that_it_would_not_see() -> None:
    foreign = double_field()
    rate = torch.ones((), dtype=torch.float64, requires_grad=True)
    refused = [
        (lambda t, y: foreign(t, y), ()),
        (lambda t, y, a: a * y, (rate,)),
        (lambda t, y, a: a[0] * y, ([rate],)),
    ]
    for field, args in refused:
        with pytest.raises(UsageError, match=r"adjoint.*nn\.Module that owns them.*exact"):
            solve(field, starts(), [0.0, 1.0], args=args, gradient="adjoint", engine="torchdiffeq")
        with torch.no_grad():  # where no gradient is asked for, nothing is lost
            solve(field, starts(), [0.0, 1.0], args=args, gradient="adjoint", engine="torchdiffeq")


def test_frozen_field_still_passes_the_gradient_to_y0() -> None:
    field = double_field().requires_grad_(False)
    found = []
    for gradient in ("exact", "adjoint"):
        y0 = starts()
        solve(field, y0, [0.0, 1.0], gradient=gradient, **TIGHT).final.pow(2).sum().backward()
        found.append(y0.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)


def test_method_without_gradients_says_so() -> None:
    with pytest.raises(UsageError):
        solve(double_field(), starts(), [0.0, 1.0], method="scipy_solver")
