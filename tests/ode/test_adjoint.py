"""The stepper's continuous adjoint: close to the exact gradient, closer with a smaller tolerance, in every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from neuralode.errors import UsageError
from neuralode.nn import MLPField
from neuralode.ode import SolveError, SolverConfig, Status, solve, solve_configured
from tests.problems import Counting

TIGHT = {"rtol": 1e-11, "atol": 1e-11}
OPTIONS = {
    "plain": {}, "seminorm": {"adjoint_seminorm": True}, "interpolated": {"adjoint_interpolated": True},
    "both": {"adjoint_seminorm": True, "adjoint_interpolated": True},
}  # fmt: skip
TIMES = [(0.0, 1.0), (0.0, 0.3, 0.35, 1.1), (1.0, 0.2, -0.3)]


def mlp() -> MLPField:
    torch.manual_seed(0)
    return MLPField(2, [6], time=True).double()


def start() -> torch.Tensor:
    return torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def leaf(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def loss(ys: torch.Tensor) -> torch.Tensor:
    return (ys.square() * torch.linspace(0.5, 1.5, ys.numel(), dtype=torch.float64).view_as(ys)).sum()


def gradients(times: tuple[float, ...] = TIMES[1], method: str = "dopri5", **kwargs: Any) -> list[torch.Tensor]:
    """By y0, t, an argument and the parameters of a module that a closure calls."""
    net, y0, t, gain = mlp(), start(), leaf(*times), leaf(1.3)
    config = SolverConfig(method=method, **kwargs)
    ys = solve_configured(lambda t, y, gain: gain * net(t, y), y0, t, config, args=(gain,)).ys
    return list(torch.autograd.grad(loss(ys), [y0, t, gain, *net.parameters()]))


def distance(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("times", TIMES, ids=["two", "several", "reversed"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_close_to_exact_at_tight_tolerances(options: dict[str, Any], times: tuple[float, ...]) -> None:
    found = gradients(times, "dop853", gradient="adjoint", **options, **TIGHT)
    assert distance(found, gradients(times, "dop853", **TIGHT)) < 1e-7


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_closes_in_as_the_tolerance_falls(options: dict[str, Any]) -> None:
    times = (0.0, 2.0, 5.0)
    exact = gradients(times, **TIGHT)
    errors = [
        distance(gradients(times, gradient="adjoint", rtol=x, atol=x, **options), exact) for x in (1e-4, 1e-6, 1e-8)
    ]
    assert errors[0] > 8 * errors[1] > 64 * errors[2] > 0


def test_its_own_tolerance_is_taken() -> None:
    exact = gradients(**TIGHT)
    crude = gradients(gradient="adjoint", adjoint_rtol=1e-2, adjoint_atol=1e-2, **TIGHT)
    fine = gradients(gradient="adjoint", adjoint_rtol=1e-10, adjoint_atol=1e-10, **TIGHT)
    assert distance(crude, exact) > 100 * distance(fine, exact)


@pytest.mark.parametrize("method", ["tsit5", "bosh3", "dopri8", "esdirk4", "rkc2"])
def test_methods_with_error_control(method: str) -> None:
    tolerance = 1e-7 if method in ("rkc2", "bosh3") else 1e-9
    found = gradients(method=method, gradient="adjoint", rtol=tolerance, atol=tolerance)
    assert distance(found, gradients(method="dop853", **TIGHT)) < 1e-4


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun3", 3), ("rk4", 4)])
def test_fixed_steps_converge_with_the_order_of_the_method(method: str, order: int) -> None:
    exact, times = gradients((0.0, 1.0), **TIGHT), (0.0, 1.0)
    coarse, fine = (
        distance(gradients(times, method, step_size=h, gradient="adjoint"), exact) for h in (1 / 16, 1 / 64)
    )
    assert 4 ** (order - 0.5) < coarse / fine < 4 ** (order + 0.7)


@pytest.mark.parametrize("method", ["rk4", "heun3"])
def test_fixed_steps_with_outputs_between_them(method: str) -> None:
    found = gradients(method=method, step_size=0.01, gradient="adjoint")
    assert distance(found, gradients(**TIGHT)) < 1e-5


def test_frozen_field_passes_the_gradient_to_the_start_and_the_times() -> None:
    found = []
    for gradient in ("exact", "adjoint"):
        net, y0, t = mlp().requires_grad_(False), start(), leaf(0.0, 0.6, 1.0)
        found.append(torch.autograd.grad(loss(solve(net, y0, t, gradient=gradient, **TIGHT).ys), [y0, t]))
    assert distance(list(found[1]), list(found[0])) < 1e-6


def test_partly_frozen_field() -> None:
    found = []
    for gradient in ("exact", "adjoint"):
        net = mlp()
        first, *rest = net.parameters()
        first.requires_grad_(False)
        loss(solve(net, start(), [0.0, 1.0], gradient=gradient, **TIGHT).ys).backward()
        assert first.grad is None
        found.append([p.grad for p in rest])
    assert distance(found[1], found[0]) < 1e-6


def test_field_that_depends_on_nothing_has_no_gradient_but_that_of_the_start() -> None:
    y0, t = start(), leaf(0.0, 2.0)
    final = solve(lambda t, y: torch.ones_like(y), y0, t, gradient="adjoint").final
    by_start, by_times = torch.autograd.grad(final.sum(), [y0, t])
    torch.testing.assert_close(by_start, torch.ones_like(y0))
    torch.testing.assert_close(by_times, torch.tensor([-6.0, 6.0], dtype=torch.float64))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tuple_states(options: dict[str, Any]) -> None:
    found = []
    for gradient in ("exact", "adjoint"):
        net, x, v = mlp(), start(), leaf(0.5)
        config = SolverConfig(gradient=gradient, **TIGHT, **(options if gradient == "adjoint" else {}))
        field = lambda t, y, net=net: (net(t, y[0]) * y[1], -y[1] * y[0].mean())  # noqa: E731
        one, two = solve_configured(field, (x, v), [0.0, 0.4, 1.0], config).ys
        found.append(list(torch.autograd.grad(loss(one) + loss(two), [x, v, *net.parameters()])))
    assert distance(found[1], found[0]) < 1e-6


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_complex_states_with_real_and_complex_parameters(options: dict[str, Any]) -> None:
    found = []
    for gradient in ("exact", "adjoint"):
        z = torch.tensor([[0.5 + 0.2j, 1.0 - 0.3j]], dtype=torch.complex128, requires_grad=True)
        rate, t = torch.tensor([0.3 - 1.1j], dtype=torch.complex128, requires_grad=True), leaf(0.0, 0.4, 1.0)
        real = leaf(0.4)
        config = SolverConfig(gradient=gradient, **TIGHT, **(options if gradient == "adjoint" else {}))
        field = lambda t, z, rate=rate, real=real: rate * z * (real * t).cos() - 0.1 * z * z.abs()  # noqa: E731
        ys = torch.view_as_real(solve_configured(field, z, t, config).ys)
        found.append(list(torch.autograd.grad(loss(ys), [z, rate, real, t])))
    assert [g.dtype for g in found[1]] == [g.dtype for g in found[0]]
    assert distance(found[1], found[0]) < 1e-6


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_real_states_with_real_and_complex_parameters(options: dict[str, Any]) -> None:
    found = []
    for gradient in ("exact", "adjoint"):
        rate = torch.tensor([0.3 - 1.1j, -0.2 + 0.7j], dtype=torch.complex128, requires_grad=True)
        force = torch.tensor(0.1 + 0.4j, dtype=torch.complex64, requires_grad=True)
        y0, real, t = leaf(0.5, 0.2, 1.0, -0.3), leaf(0.4), leaf(0.0, 0.4, 1.0)

        def field(t: torch.Tensor, y: torch.Tensor, real=real, rate=rate, force=force) -> torch.Tensor:
            return real * torch.view_as_real(rate * torch.view_as_complex(y.view(2, 2)) + force).flatten()

        config = SolverConfig(gradient=gradient, **TIGHT, **(options if gradient == "adjoint" else {}))
        ys = solve_configured(field, y0, t, config).ys
        found.append(list(torch.autograd.grad(loss(ys), [y0, t, real, rate, force])))
    assert [g.dtype for g in found[1]] == [g.dtype for g in found[0]]
    assert distance(found[1], found[0]) < 1e-6


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_nfe_backward_counts_the_products(method: str, options: dict[str, Any]) -> None:
    if method == "rk4" and options.get("adjoint_interpolated"):
        pytest.skip("dense output of fixed steps has its own test")
    field = Counting(mlp())
    step = 0.1 if method == "rk4" else None
    config = SolverConfig(method=method, gradient="adjoint", step_size=step, **options)
    solution = solve_configured(field, start(), [0.0, 0.5, 1.0], config)
    forward = solution.stats.nfe
    assert (solution.stats.nfe_backward, field.vjps) == (0, 0)
    loss(solution.ys).backward()
    assert solution.stats.nfe_backward == field.vjps > 0
    assert solution.stats.nfe == forward
    if method == "rk4":
        assert field.vjps == 2 * 5 * 4


def test_seminorm_takes_fewer_evaluations() -> None:
    # a field whose parameters' adjoint varies much faster than its state
    class Kick(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return -y + self.weight * (40 * t).sin() * 50

    products = []
    for options in ({}, {"adjoint_seminorm": True}):
        solution = solve_configured(
            Kick(), leaf(1.0), [0.0, 2.0], SolverConfig(gradient="adjoint", rtol=1e-6, atol=1e-6, **options)
        )
        solution.final.sum().backward()
        products.append(solution.stats.nfe_backward)
    assert products[1] < 0.6 * products[0]


def test_a_leaf_that_the_field_uses_only_later_is_refused() -> None:
    early, late = leaf(0.4), leaf(-0.9)
    final = solve(
        lambda t, y: early * y if t < 0.5 else late * y, start(), [0.0, 1.0], method="rk4", step_size=0.1,
        gradient="adjoint",
    ).final  # fmt: skip
    with pytest.raises(UsageError, match="without a gradient"):
        final.sum().backward()


def test_two_losses_of_one_solve() -> None:
    net, y0 = mlp(), start()
    ys = solve(net, y0, [0.0, 0.5, 1.0], gradient="adjoint").ys
    first, second = (torch.autograd.grad(loss(ys), [y0, *net.parameters()], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_solves_that_the_adjoint_cannot_serve_are_refused() -> None:
    field = mlp()
    for kwargs in ({"per_sample": True}, {"events": lambda t, y: y[:, 0]}):
        with pytest.raises(UsageError, match=r"(?s)adjoint.*gradient='exact'|no (steps|events)"):
            solve(field, start(), [0.0, 1.0], gradient="adjoint", **kwargs)


SOURCES = ["y0", "t", "gain", "weight", "cotangent"]


@pytest.mark.parametrize("second", SOURCES)
@pytest.mark.parametrize("first", SOURCES[:-1])
def test_gradients_that_keep_their_graph_refuse_a_second_one(first: str, second: str) -> None:
    net, scale = mlp(), leaf(0.7)
    sources = {"y0": start(), "t": leaf(*TIMES[1]), "gain": leaf(1.3), "cotangent": scale,
               "weight": next(net.parameters())}  # fmt: skip

    def total() -> torch.Tensor:
        ys = solve(
            lambda t, y, gain: gain * net(t, y), sources["y0"], sources["t"], args=(sources["gain"],),
            gradient="adjoint",
        ).ys  # fmt: skip
        return scale * loss(ys)

    (wanted,) = torch.autograd.grad(total(), sources[first])
    (found,) = torch.autograd.grad(total(), sources[first], create_graph=True)
    assert torch.equal(found, wanted)
    with pytest.raises(UsageError, match=r"second derivatives.*gradient='exact'"):
        torch.autograd.grad(found.sum(), sources[second], allow_unused=True)


def test_a_second_gradient_is_refused_where_the_loss_is_linear() -> None:
    y0, net = start(), mlp()
    final = solve(net, y0, [0.0, 1.0], gradient="adjoint").final
    (found,) = torch.autograd.grad(final.sum(), y0, create_graph=True)
    with pytest.raises(UsageError, match="second derivatives"):
        found.square().sum().backward()


def test_a_backward_solve_that_fails_says_why() -> None:
    y0 = leaf(1.0, -0.5)
    config = SolverConfig(gradient="adjoint", max_steps=40, adjoint_rtol=1e-13, adjoint_atol=1e-13)
    final = solve_configured(lambda t, y: (9 * t).sin() * y, y0, [0.0, 3.0], config).final
    with pytest.raises(SolveError, match=r"adjoint") as caught:
        final.sum().backward()
    assert caught.value.status is Status.MAX_STEPS
    assert "max_steps" in str(caught.value)
