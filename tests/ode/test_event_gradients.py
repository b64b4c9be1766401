"""Gradients through events: of their times and states, to the start, the arguments and the times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from neuralode.errors import UsageError
from neuralode.ode import solve
from tests.ode.test_events import BY_SAMPLE, SPAN, TIGHT, at_rest, ball, ground, settings, thrown


def dragged(t: torch.Tensor, y: torch.Tensor, drag: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Falls with quadratic drag through air that thins out; no closed form is needed of it."""
    return torch.stack(
        [y[:, 1], -2.0 - drag * y[:, 1] * y[:, 1].abs() * (-y[:, 0] - 0.1 * t.sum() / t.numel()).exp()], -1
    )


def above(t: torch.Tensor, y: torch.Tensor, drag: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    return y[:, 0] - level * (1 + 0.1 * t.reshape(-1)) * y[:, 1].cos()


@pytest.mark.parametrize("per_sample", BY_SAMPLE)
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "rk4", "bosh3", "esdirk4"])
def test_gradients_of_a_thrown_ball_are_those_of_its_formula(method: str, per_sample: bool) -> None:
    """It lands at (v + √(v² + 2gh)) / g after the start."""
    y0 = torch.tensor([[1.0, 0.5], [0.3, 1.2], [2.0, -0.4]], dtype=torch.float64, requires_grad=True)
    gravity = torch.tensor(2.1, dtype=torch.float64, requires_grad=True)
    times = torch.tensor([0.2, 4.0], dtype=torch.float64, requires_grad=True)
    found = solve(
        thrown, y0, times, args=(gravity,), events=ground, per_sample=per_sample, **settings(method)
    ).events  # fmt: skip
    height, speed = y0.unbind(-1)
    flight = (speed + (speed**2 + 2 * gravity * height).sqrt()) / gravity
    exact = (times[0] + flight, torch.stack([0 * flight, speed - gravity * flight], -1))
    weights = torch.tensor([1.0, -2.0, 0.7], dtype=torch.float64)
    for ours, closed in zip((found.ts, found.ys), exact, strict=True):
        torch.testing.assert_close(ours, closed, rtol=0, atol=1e-6)
        by = weights if ours.dim() == 1 else weights[:, None]
        got = torch.autograd.grad((by * ours).sum(), (y0, gravity, times), retain_graph=True, materialize_grads=True)
        wanted = torch.autograd.grad(
            (by * closed).sum(), (y0, gravity, times), retain_graph=True, materialize_grads=True
        )
        for gradient, reference in zip(got, wanted, strict=True):
            torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-6)


def difference(value: Callable[..., torch.Tensor], point: list[torch.Tensor], step: float = 1e-5) -> None:
    """Compares the gradient of `value` with central differences along a random direction, input by input."""
    generator = torch.Generator().manual_seed(5)
    inputs = [x.clone().requires_grad_() for x in point]
    gradients = torch.autograd.grad(value(*inputs), inputs)
    for which, gradient in enumerate(gradients):
        direction = torch.randn(point[which].shape, dtype=torch.float64, generator=generator)
        ends = [
            float(value(*(x + sign * step * direction if i == which else x for i, x in enumerate(point))))
            for sign in (1, -1)
        ]
        assert float((gradient * direction).sum()) == pytest.approx(
            (ends[0] - ends[1]) / (2 * step), rel=2e-6, abs=1e-8
        )


@pytest.mark.parametrize("what", ["time", "state", "outputs"])
@pytest.mark.parametrize("per_sample", BY_SAMPLE)
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "rk4", "bosh3", "esdirk4"])
def test_gradients_are_those_of_finite_differences(method: str, per_sample: bool, what: str) -> None:
    """On steps that do not depend on the state, to the start, to arguments of field and event, and to the times."""
    given: dict[str, Any] = {"rtol": 1e8, "atol": 1e8, "options": {"first_step": 0.11, "ifactor": 1.2}}
    given = {"step_size": 0.13} if method == "rk4" else given
    y0 = torch.tensor([[1.0, 0.5], [0.6, 0.2], [2.0, -0.4]], dtype=torch.float64)
    level, drag = torch.tensor(0.2, dtype=torch.float64), torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
    times = torch.tensor([0.05, 0.62, 2.1, 4.0], dtype=torch.float64)
    weights = torch.tensor([1.0, -2.0, 0.7], dtype=torch.float64)

    def value(
        y0: torch.Tensor, drag: torch.Tensor, level: torch.Tensor, times: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        solution = solve(
            dragged, y0, times, args=(drag, level), events=above, per_sample=per_sample, method=method, **given
        )
        assert solution.events.happened.all()
        if what == "time":
            return (weights * solution.events.ts).sum()
        if what == "state":
            return (weights[:, None] * solution.events.ys).sum()
        return (weights[:, None] * solution.ys * torch.arange(1.0, 5.0)[:, None, None]).sum()

    difference(value, [y0, drag, level, times])


def test_gradients_of_an_event_of_the_whole_state() -> None:
    """Σ yᵢ e^(-rt) = c at log(Σ yᵢ / c) / r."""
    y0 = torch.tensor([1.0, 2.5], dtype=torch.float64, requires_grad=True)
    rate = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    level = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    found = solve(
        lambda t, y, r, c: -r * y, y0, SPAN, args=(rate, level), events=lambda t, y, r, c: y.sum() - c, **TIGHT
    ).events
    time = (y0.sum() / level).log() / rate
    torch.testing.assert_close(found.ts, time, rtol=0, atol=1e-7)
    for ours, closed in ((found.ts, time), (found.ys[0], level * y0[0] / y0.sum())):
        got = torch.autograd.grad(ours, (y0, rate, level), retain_graph=True)
        wanted = torch.autograd.grad(closed, (y0, rate, level), retain_graph=True, materialize_grads=True)
        for gradient, reference in zip(got, wanted, strict=True):
            torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-6)


@pytest.mark.parametrize("per_sample", BY_SAMPLE)
def test_without_an_event_the_gradient_is_that_of_the_end(per_sample: bool) -> None:
    """The first ball has not landed by the end, which is then its time; its state has the usual gradient."""
    y0 = at_rest().requires_grad_()
    end = torch.tensor([0.0, 1.5], dtype=torch.float64, requires_grad=True)
    found = solve(ball, y0, end, events=ground, per_sample=per_sample, **TIGHT).events
    time_by_start, time_by_end = torch.autograd.grad(found.ts[0], (y0, end), retain_graph=True, materialize_grads=True)
    torch.testing.assert_close(time_by_start, torch.zeros_like(y0))
    assert time_by_end.tolist() == pytest.approx([0.0, 1.0])
    (by_start,) = torch.autograd.grad(found.ys[0, 0], y0)
    torch.testing.assert_close(
        by_start, torch.tensor([[1.0, 1.5], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("per_sample", BY_SAMPLE)
def test_gradients_do_not_depend_on_the_memory_budget(per_sample: bool) -> None:
    gradients = []
    for budget in (2**31, 1):
        y0 = at_rest().requires_grad_()
        found = solve(ball, y0, SPAN, events=ground, per_sample=per_sample, memory_budget=budget).events
        gradients.append(torch.autograd.grad(found.ts.sum(), y0)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize("per_sample", BY_SAMPLE)
def test_derivatives_to_third_order_are_those_of_the_formula(per_sample: bool) -> None:
    """y₀e^(-rt) has fallen to c, squared or not, at T = log(y₀/c) / r; there y₀t e^(-rt) is cT."""
    y0 = torch.tensor([2.0, 4.0], dtype=torch.float64, requires_grad=True)
    rate = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

    def field(t: torch.Tensor, y: tuple[torch.Tensor, ...], r: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (-r * y[0], y[0] - r * y[1])

    def below(t: torch.Tensor, y: tuple[torch.Tensor, ...], r: torch.Tensor) -> torch.Tensor:
        return y[0][:, 0] ** 2 - 1.44

    start = (y0[:, None], 0 * y0[:, None])
    found = solve(
        field, start, SPAN, args=(rate,), events=below, per_sample=per_sample, rtol=1e-11, atol=1e-11
    ).events  # fmt: skip
    times = (y0 / 1.2).log() / rate
    weights = torch.tensor([1.0, -0.7], dtype=torch.float64)
    for ours, closed in ((found.ts, times), (found.ys[1][:, 0], 1.2 * times)):
        derivatives = []
        for value in (ours, closed):
            total, orders = (weights * value).sum(), []
            for _ in range(3):
                orders += torch.autograd.grad(total, (y0, rate), create_graph=True)
                total = orders[-2].sum() + 3 * orders[-1]
            derivatives.append(orders)
        # each derivative takes an order of the dense output's accuracy
        for rtol, got, wanted in zip((1e-8, 1e-8, 1e-5, 1e-5, 1e-3, 1e-3), *derivatives, strict=True):
            torch.testing.assert_close(got, wanted, rtol=rtol, atol=0)


def too_fast(t: torch.Tensor, y: torch.Tensor, gravity: torch.Tensor) -> torch.Tensor:
    return y[:, 1] < -2.5


def landing(y0: torch.Tensor, gravity: torch.Tensor, **how: Any) -> torch.Tensor:
    """A sum of when, and how fast, the balls land or are too fast."""
    solution = solve(thrown, y0, SPAN, args=(gravity,), events=[ground, too_fast], rtol=1e-10, atol=1e-10, **how)
    weights = torch.tensor([1.0, -2.0, 0.7], dtype=torch.float64)
    assert solution.events.index.tolist() == [1, 0, 0]
    return (weights * (solution.events.ts + solution.events.ys[:, 1] + solution.final[:, 1])).sum()


@pytest.mark.parametrize("how", [{}, {"dense": True}, {"method": "tsit5"}], ids=str)
@pytest.mark.parametrize("transform", [grad, jacrev, jacfwd], ids=lambda f: f.__name__)
def test_derivatives_by_torch_func(transform: Callable[..., Any], how: dict[str, Any]) -> None:
    y0, gravity = at_rest().requires_grad_(), torch.tensor(2.1, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(landing(y0, gravity, **how), (y0, gravity))
    found = transform(lambda y0, gravity: landing(y0, gravity, **how), argnums=(0, 1))(y0.detach(), gravity.detach())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    _, tangent = jvp(lambda y0: landing(y0, gravity.detach(), **how), (at_rest(),), (torch.ones_like(y0),))
    torch.testing.assert_close(tangent, wanted[0].sum(), rtol=1e-9, atol=1e-10)


def test_second_derivatives_by_torch_func() -> None:
    gravity = torch.tensor(2.1, dtype=torch.float64)
    found = hessian(lambda gravity: landing(at_rest(), gravity))(gravity)
    gravity.requires_grad_()
    (first,) = torch.autograd.grad(landing(at_rest(), gravity), gravity, create_graph=True)
    torch.testing.assert_close(found, *torch.autograd.grad(first, gravity), rtol=1e-6, atol=1e-8)


def test_events_of_mapped_states_are_refused() -> None:
    def when(y: torch.Tensor) -> torch.Tensor:
        return solve(ball, y[None], SPAN, events=ground).events.ts.sum()

    for mapped in (when, grad(when)):
        with pytest.raises(UsageError, match=r"events.*torch\.func\.vmap"):
            vmap(mapped)(at_rest())
