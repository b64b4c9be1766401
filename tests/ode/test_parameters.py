"""Every tensor that a field depends on gets its gradient, wherever the field keeps it, or the solve is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from neuralode.errors import UsageError
from neuralode.ode import solve
from tests.ode.test_adjoint import leaf, start

WAYS = {"never": {"checkpoint": "never"}, "always": {"checkpoint": "always"}, "some": {"checkpoint": 2},
        "adjoint": {"gradient": "adjoint"}}  # fmt: skip
AGAIN = {name: how for name, how in WAYS.items() if name != "never"}
"""Ways that evaluate the field again in the backward pass."""


class Late(nn.Module):
    """Uses, in the second half only, a parameter that it keeps in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.others = nn.Parameter(torch.tensor(0.4, dtype=torch.float64)), [leaf(-0.9)]

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.early * y if t < 0.5 else self.others[0] * y


@pytest.mark.parametrize("how", AGAIN.values(), ids=AGAIN)
def test_a_parameter_that_a_module_does_not_register_and_uses_only_later_is_refused(how: dict[str, Any]) -> None:
    final = solve(Late(), start(), [0.0, 1.0], method="rk4", step_size=0.1, engine="stepper", **how).final
    with pytest.raises(UsageError, match="without a gradient"):
        final.sum().backward()


def by_a_late_parameter(how: dict[str, Any]) -> torch.Tensor:
    """The gradient to what a field without a module uses in the second half only, where y0 wants none."""
    late, y0 = leaf(-0.9), torch.tensor([[1.0, -0.5]], dtype=torch.float64)
    final = solve(lambda t, y: late * y if t > 0.5 else -y, y0, [0.0, 1.0], engine="stepper", **how).final
    (found,) = torch.autograd.grad((final * leaf(2.0)).sum(), late, allow_unused=True)
    assert found is not None
    return found


@pytest.mark.parametrize("kind", [{}, {"method": "rk4", "step_size": 0.1}, {"per_sample": True}], ids=str)
@pytest.mark.parametrize("checkpoint", ["always", 2])
def test_a_parameter_that_comes_in_late_is_found_where_nothing_else_wants_a_gradient(
    checkpoint: Any, kind: dict[str, Any]
) -> None:
    found, wanted = (by_a_late_parameter({**kind, "checkpoint": policy}) for policy in (checkpoint, "never"))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", [{}, {"method": "rk4", "step_size": 0.1}], ids=str)
def test_the_adjoint_refuses_a_parameter_that_comes_in_late_where_nothing_else_wants_a_gradient(
    kind: dict[str, Any],
) -> None:
    with pytest.raises(UsageError, match="without a gradient"):
        by_a_late_parameter({**kind, "gradient": "adjoint"})


@pytest.mark.parametrize("how", AGAIN.values(), ids=AGAIN)
def test_a_tensor_inside_a_dict_of_the_arguments_is_refused_for_that(how: dict[str, Any]) -> None:
    rate = 2 * leaf(0.4)
    with pytest.raises(UsageError, match=r"args=\(...\), as an argument of its own and not inside a list or a dict"):
        solve(lambda t, y, all: -all["rate"] * y, start(), [0.0, 1.0], args=({"rate": rate},), engine="stepper", **how)


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_a_field_may_give_a_parameter_itself(how: dict[str, Any]) -> None:
    y0, speed = leaf(1.0, -0.5), leaf(0.3, 0.7)
    final = solve(lambda t, y: speed, y0, [0.0, 2.0], engine="stepper", **how).final
    by_start, by_speed = torch.autograd.grad(final.sum(), [y0, speed])
    torch.testing.assert_close(by_start, torch.ones_like(y0))
    torch.testing.assert_close(by_speed, torch.full_like(speed, 2.0))


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_a_parameter_with_hooks_that_the_field_gives_itself(how: dict[str, Any]) -> None:
    speed, calls = leaf(0.3, 0.7), []
    speed.register_hook(lambda gradient: calls.append(1) or 3 * gradient)
    solve(lambda t, y: speed, leaf(1.0, -0.5), [0.0, 2.0], engine="stepper", **how).final.sum().backward()
    torch.testing.assert_close(speed.grad, torch.full_like(speed, 6.0))
    assert len(calls) == 1


class Product(torch.autograd.Function):
    """What no mode that looks at operations sees."""

    @staticmethod
    def forward(ctx: Any, rate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rate, y)
        return rate * y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rate, y = ctx.saved_tensors
        return gradient * y, gradient * rate


@pytest.mark.parametrize("how", AGAIN.values(), ids=AGAIN)
def test_a_parameter_with_hooks_in_a_function_of_the_users_is_refused(how: dict[str, Any]) -> None:
    rate = leaf(0.3, 0.7)
    rate.register_hook(lambda gradient: 2 * gradient)
    final = solve(lambda t, y: Product.apply(rate, y), leaf(1.0, -0.5), [0.0, 1.0], engine="stepper", **how).final
    with pytest.raises(UsageError, match="hooks"):
        final.sum().backward()


@pytest.mark.parametrize("how", AGAIN.values(), ids=AGAIN)
def test_dropout_is_refused_where_the_backward_pass_would_draw_other_masks(how: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    field = lambda t, y: net(y)  # noqa: E731
    with pytest.raises(UsageError, match=r"draws random numbers.*checkpoint='never'"):
        solve(field, start(), [0.0, 1.0], method="rk4", step_size=0.1, engine="stepper", **how)
    net.eval()
    solve(field, start(), [0.0, 1.0], method="rk4", step_size=0.1, engine="stepper", **how).final.sum().backward()


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_a_batch_without_samples(how: dict[str, Any]) -> None:
    y0, rate = start()[:0], leaf(0.5)
    solve(lambda t, y: rate * y, y0, [0.0, 1.0], engine="stepper", **how).final.sum().backward()
    assert torch.equal(rate.grad, torch.zeros_like(rate))


class Controlled(nn.Module):
    """A field whose control has no effect at the end of the solve."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, dtype=torch.float64)
        self.control: Any = 1.0
        self.nfe = 0

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.nfe += 1
        return torch.tanh(self.linear(y)) + self.control * torch.relu(0.5 - t) * y


@pytest.mark.parametrize("control", [1.0, torch.tensor(1.0)], ids=["number", "tensor"])
@pytest.mark.parametrize("way", [{"gradient": "adjoint"}, {"checkpoint": "always"}, {"checkpoint": 2}], ids=str)
def test_a_change_that_shows_only_early_in_the_solve_is_noticed(way: dict[str, Any], control: Any) -> None:
    field, y0 = Controlled(), torch.ones(3, 2, dtype=torch.float64)
    field.control = control
    final = solve(field, y0, [0.0, 1.0], engine="stepper", **way).final
    field.nfe = 0  # which programs read and reset between the two passes
    torch.autograd.grad(final.sum(), field.linear.bias, retain_graph=True)
    field.control = 3.0 * control
    with pytest.raises(UsageError, match="'control' of the field was changed between the solve and its gradient"):
        torch.autograd.grad(final.sum(), field.linear.bias)


def test_a_change_of_what_a_function_closes_over_is_noticed() -> None:
    weight, control = torch.ones(2, dtype=torch.float64, requires_grad=True), 1.0

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(weight * y) + control * torch.relu(0.5 - t) * y

    final = solve(field, torch.ones(3, 2, dtype=torch.float64), [0.0, 1.0], gradient="adjoint").final
    control = 3.0
    with pytest.raises(UsageError, match="'control' of the field was changed"):
        torch.autograd.grad(final.sum(), weight)
