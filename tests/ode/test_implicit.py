"""ESDIRK4: its order, stiff problems against scipy's Radau, and gradients exact through the implicit stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

from neuralode.errors import UsageError
from neuralode.ode import SolveError, implicit, solve
from neuralode.ode.explicit import Step, moment
from neuralode.ode.implicit import ESDIRK4
from neuralode.ode.methods import METHODS
from tests.problems import PROBLEMS, Counting, Problem

METHOD = ESDIRK4()
STEPS = [16, 32, 64]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "esdirk4", METHOD)


def tensor(*values: Any, **kwargs: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, **kwargs)


def esdirk4(field: Any, y0: torch.Tensor, t: torch.Tensor, tolerance: float = 1e-6, **kwargs: Any) -> Any:
    return solve(field, y0, t, method="esdirk4", rtol=tolerance, atol=kwargs.pop("atol", tolerance), **kwargs)


def march(field: Any, y: torch.Tensor, t: Any, h: Any, steps: int) -> list[Step]:
    """Equal steps from (t, y)."""
    path: list[Step] = []
    for i in range(steps):
        y = path[-1].y1 if path else y
        path.append(METHOD.step(field, t + i * h, h, y, field(moment(t + i * h, y), y)))
    return path


def slope(steps: list[int], errors: list[float]) -> float:
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


# ---- the tableau ----


def conditions(a: np.ndarray, c: np.ndarray) -> Iterator[tuple[int, np.ndarray, float]]:
    """Order, vector v and value of each condition b·v = value (Hairer, Nørsett, Wanner, I, table II.2.1)."""
    yield 1, np.ones_like(c), 1
    yield 2, c, 1 / 2
    yield 3, c * c, 1 / 3
    yield 3, a @ c, 1 / 6
    yield 4, c**3, 1 / 4
    yield 4, c * (a @ c), 1 / 8
    yield 4, a @ (c * c), 1 / 12
    yield 4, a @ (a @ c), 1 / 24


def matrix() -> np.ndarray:
    a = np.zeros((6, 6))
    for i, row in enumerate(implicit.A):
        a[i, : len(row)] = row
        a[i, i] = implicit.GAMMA if i else 0.0
    return a


def test_order_conditions() -> None:
    a, c = matrix(), np.array(implicit.C)
    np.testing.assert_allclose(a.sum(1), c, atol=1e-14)
    np.testing.assert_allclose((a @ c)[2:], c[2:] ** 2 / 2, atol=1e-14)  # stage order two
    np.testing.assert_allclose(a[-1], implicit.B)  # stiffly accurate
    misses = dict.fromkeys((1, 2, 3, 4), 0.0)
    for order, vector, value in conditions(a, c):
        assert abs(np.dot(implicit.B, vector) - value) < 1e-14
        misses[order] = max(misses[order], abs(np.dot(implicit.B_LOW, vector) - value))
    assert max(misses[1], misses[2], misses[3]) < 1e-14
    assert misses[4] > 1e-4


@pytest.mark.parametrize("theta", [0.0, 0.3, 0.8, 1.0])
def test_order_conditions_between_the_steps(theta: float) -> None:
    a, c, powers = matrix(), np.array(implicit.C), np.arange(1, 5)
    weights, slopes = implicit.DENSE @ theta**powers, implicit.DENSE @ (powers * theta ** (powers - 1))
    for order, vector, value in conditions(a, c):
        assert abs(weights @ vector - value * theta**order) < 1e-13
    if theta in (0.0, 1.0):
        np.testing.assert_allclose(weights, theta * np.array(implicit.B), atol=1e-13)
        np.testing.assert_allclose(slopes, np.eye(6)[-1 if theta else 0], atol=1e-12)


def test_stability_at_infinity() -> None:
    s = np.linalg.solve(np.eye(6) + 1e9 * matrix(), np.ones(6))
    assert abs(1 - 1e9 * np.dot(implicit.B, s)) < 1e-6
    assert abs(1 - 1e9 * np.dot(implicit.B_LOW, s)) < 0.2


# ---- order and error ----


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_order_of_steps_dense_output_and_error_estimate(problem: Problem) -> None:
    start, end = problem.span
    at_steps, between, estimated = [], [], []
    for n in STEPS:
        h = (end - start) / n
        path = march(problem.field, problem.y0, start, h, n)
        inner = torch.stack([METHOD.interpolant(step, problem.field)(0.4) for step in path])
        for errors, found, theta in ((at_steps, torch.stack([step.y1 for step in path]), 1.0), (between, inner, 0.4)):
            times = start + h * (torch.arange(n, dtype=torch.float64) + theta)
            errors.append(float((found - problem.exact(times)).abs().max()))
        estimated.append(float(torch.stack([METHOD.error(step, problem.field).abs() for step in path]).max()))
    assert 3.7 < slope(STEPS, at_steps) < 4.6
    assert 3.7 < slope(STEPS, between) < 4.9
    assert 3.7 < slope(STEPS, estimated) < 4.6


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_tolerance_is_met_at_all_outputs_and_backwards(problem: Problem) -> None:
    times = problem.times(21)
    ys = esdirk4(problem.field, problem.y0, times, 1e-8).ys
    torch.testing.assert_close(ys, problem.exact(times), rtol=0, atol=1e-6)
    times = times.flip(0)
    ys = esdirk4(problem.field, problem.exact(times)[0], times, 1e-8).ys
    torch.testing.assert_close(ys, problem.exact(times), rtol=0, atol=1e-5)


def test_single_precision_and_scalar_and_tuple_states() -> None:
    t = torch.tensor([0.0, 1.0])
    ys = solve(lambda t, y: -50 * (y - t.cos()), torch.tensor(0.0), t, method="esdirk4", rtol=1e-4, atol=1e-5).ys
    assert float(ys[-1]) == pytest.approx((2500 * math.cos(1) + 50 * math.sin(1)) / 2501, abs=1e-4)
    x, v = esdirk4(lambda t, y: (y[1], -y[0]), (tensor(1.0), tensor(0.0)), tensor(0.0, math.pi), 1e-8).ys
    assert float(x[-1]) == pytest.approx(-1, abs=1e-6)
    assert float(v[-1]) == pytest.approx(0, abs=1e-6)


# ---- stiff problems ----


def van_der_pol(mu: float) -> Callable[[Any, Any], list[Any]]:
    return lambda t, y: [y[1], mu * (1 - y[0] * y[0]) * y[1] - y[0]]


def robertson(t: Any, y: Any) -> list[Any]:
    slow, back, fast = 0.04 * y[0], 1e4 * y[1] * y[2], 3e7 * y[1] * y[1]
    return [back - slow, slow - back - fast, fast]


STIFF = [
    ("van der Pol", van_der_pol(1e3), [2.0, 0.0], [0.0, 200.0, 700.0, 820.0, 1500.0, 2000.0], 400, 1e-4),
    ("Robertson", robertson, [1.0, 0.0, 0.0], [0.0, 0.4, 40.0, 4e3, 1e5], 100, 1e-4),
]


@pytest.mark.parametrize(("name", "field", "start", "times", "steps", "allowed"), STIFF, ids=lambda x: str(x)[:12])
def test_stiff_problem_against_radau(
    name: str, field: Any, start: list[float], times: list[float], steps: int, allowed: float
) -> None:
    oracle = solve_ivp(field, (0, times[-1]), start, "Radau", times, rtol=1e-10, atol=1e-13).y.T
    with torch.no_grad():
        solution = esdirk4(lambda t, y: torch.stack(field(t, y)), tensor(*start), tensor(*times), 1e-6, atol=1e-10)
    np.testing.assert_allclose(solution.ys.numpy(), oracle, rtol=allowed, atol=1e-9)
    assert solution.stats.accepted < 2 * steps


def test_far_fewer_steps_than_an_explicit_method() -> None:
    field = van_der_pol(1e3)
    y0, t = tensor(2.0, 0.0), tensor(0.0, 100.0)

    def stats(method: str) -> Any:
        with torch.no_grad():
            return solve(lambda t, y: torch.stack(field(t, y)), y0, t, method=method, rtol=1e-5, atol=1e-8,
                         max_steps=3000, throw=False).stats  # fmt: skip

    ours, explicit = stats("esdirk4"), stats("dopri5")
    assert ours.accepted < 60
    assert explicit.accepted > 20 * ours.accepted
    assert explicit.nfe > 5 * ours.nfe


# ---- batches ----


class Springs(nn.Module):
    """Van der Pol oscillators, one a sample, with a learned damping and a drive that `gain` scales."""

    def __init__(self, damping: float = 30.0):
        super().__init__()
        self.damping = nn.Parameter(tensor(damping)[0])

    def forward(self, t: torch.Tensor, y: torch.Tensor, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
        x, v = y.unbind(-1)
        return torch.stack([v, self.damping * (1 - x * x) * v - x + gain * t.sin()], -1)


def test_a_batch_equals_its_samples() -> None:
    y0 = tensor([2.0, 0.0], [1.2, -0.5], [-0.3, 0.8])
    field = Springs()
    step = METHOD.step(field, 0.0, 0.02, y0, field(tensor(0.0)[0], y0))
    for i, y in enumerate(y0):
        one = METHOD.step(field, 0.0, 0.02, y, field(tensor(0.0)[0], y))
        torch.testing.assert_close(step.y1[i], one.y1, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(METHOD.error(step, field)[i], METHOD.error(one, field), rtol=1e-9, atol=1e-14)


def test_samples_of_any_shape() -> None:
    field = Springs()
    y0 = tensor([[2.0, 0.0], [1.2, -0.5]], [[-0.3, 0.8], [0.1, 0.1]])
    as_pairs = esdirk4(field, y0, tensor(0.0, 1.0)).ys
    as_one = esdirk4(field, y0.reshape(4, 2), tensor(0.0, 1.0)).ys
    torch.testing.assert_close(as_pairs.reshape(as_one.shape), as_one, rtol=0, atol=1e-12)


def test_samples_that_depend_on_each_other_are_refused() -> None:
    with pytest.raises(UsageError, match="depend on each other"):
        esdirk4(lambda t, y: y.mean(0) - y, torch.rand(4, 2, dtype=torch.float64), tensor(0.0, 1.0))


def test_field_that_cannot_be_mapped() -> None:
    class Stubborn(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(y)
            return -(y**3)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            (y,) = ctx.saved_tensors
            assert math.isfinite(gradient.sum().item())
            return -3 * y * y * gradient

    y0 = tensor([2.0, 1.0], [0.5, 3.0], requires_grad=True)
    ys = esdirk4(lambda t, y: Stubborn.apply(y), y0, tensor(0.0, 1.0), 1e-9).ys
    torch.testing.assert_close(ys[-1], y0 / (1 + 2 * y0 * y0).sqrt(), rtol=0, atol=1e-7)
    (gradient,) = torch.autograd.grad(ys[-1].sum(), y0)
    torch.testing.assert_close(gradient, (1 + 2 * y0 * y0) ** -1.5, rtol=0, atol=1e-6)


def test_mapped_solve() -> None:
    y0 = tensor([2.0, 0.0], [1.2, -0.5])
    field = Springs().requires_grad_(False)
    mapped = torch.func.vmap(lambda y: esdirk4(field, y, tensor(0.0, 1.0), 1e-8).ys)(y0)
    plain = esdirk4(field, y0, tensor(0.0, 1.0), 1e-8).ys
    torch.testing.assert_close(mapped.transpose(0, 1), plain, rtol=0, atol=1e-6)


# ---- failure ----


def test_newton_that_finds_nothing_shrinks_the_step() -> None:
    # the stage z = z0 + hγ z² has no real solution for a large h
    step = METHOD.step(lambda t, y: y * y, 0.0, 5.0, tensor(1.0), tensor(1.0))
    assert METHOD.error(step, lambda t, y: y).isinf().all()
    solution = esdirk4(lambda t, y: y * y, tensor(1.0), tensor(0.0, 0.9), options={"first_step": 0.9})
    assert solution.stats.rejected >= 1
    assert float(solution.ys[-1]) == pytest.approx(10, rel=1e-3)


def test_only_the_samples_without_solution_are_rejected() -> None:
    y, h = tensor([1.0], [0.01], [1.0]), tensor([5.0], [5.0], [0.1])
    step = METHOD.step(lambda t, y: y * y, torch.zeros_like(h), h, y, y * y)
    error = METHOD.error(step, lambda t, y: y)
    assert error.isinf().flatten().tolist() == [True, False, False]
    for i in (1, 2):
        alone = METHOD.step(lambda t, y: y * y, 0.0, float(h[i]), y[i], y[i] * y[i])
        torch.testing.assert_close(step.y1[i], alone.y1, rtol=1e-13, atol=0)


def test_field_that_blows_up_ends_in_a_diagnosis() -> None:
    with pytest.raises(SolveError, match="esdirk4 stopped"):
        esdirk4(lambda t, y: y * y, tensor(1.0), tensor(0.0, 2.0))


def test_complex_state_is_refused() -> None:
    with pytest.raises(UsageError, match="real states"):
        esdirk4(lambda t, y: 1j * y, torch.ones(2, dtype=torch.complex128), tensor(0.0, 1.0))


# ---- gradients ----


def test_gradients_of_the_steps_against_finite_differences() -> None:
    def final(y: torch.Tensor, damping: torch.Tensor, gain: torch.Tensor, t: torch.Tensor, h: torch.Tensor) -> Any:
        def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            x, v = y.unbind(-1)
            return torch.stack([v, damping * (1 - x * x) * v - x + gain * t.sin()], -1)

        return march(field, y, t, h, 3)[-1].y1

    y = tensor([2.0, 0.3], [1.2, -0.5], requires_grad=True)
    numbers = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (20.0, 0.7, 0.3, 0.05)]
    assert torch.autograd.gradcheck(final, (y, *numbers), eps=1e-6, atol=1e-7, rtol=1e-6)


def gradients(checkpoint: Any, y0: torch.Tensor, t: torch.Tensor, tolerance: float, **kwargs: Any) -> list[Any]:
    field, gain = Springs(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y0, t = y0.clone().requires_grad_(), t.clone().requires_grad_()
    ys = esdirk4(field, y0, t, tolerance, args=(gain,), checkpoint=checkpoint, **kwargs).ys
    loss = (ys * torch.linspace(1, 2, ys.numel(), dtype=ys.dtype).view_as(ys)).sum()
    return [loss, *torch.autograd.grad(loss, (y0, t, field.damping, gain))]


@pytest.mark.parametrize("checkpoint", ["always", 3, "auto"])
def test_recomputed_gradients_equal_kept_ones(checkpoint: Any) -> None:
    y0, t = tensor([2.0, 0.0], [1.2, -0.5]), tensor(0.0, 0.4, 1.1, 1.5)
    kept, recomputed = (gradients(c, y0, t, 1e-5, memory_budget=20_000) for c in ("never", checkpoint))
    for a, b in zip(kept, recomputed, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-11)


def test_gradients_of_an_adaptive_solve_against_finite_differences() -> None:
    y0, t, eps = tensor([2.0, 0.0], [1.2, -0.5]), tensor(0.0, 0.4, 1.0), 1e-4
    _, by_y0, by_t, by_damping, by_gain = gradients("auto", y0, t, 1e-9)

    def loss(dy0: Any = 0.0, dt: Any = 0.0, damping: float = 30.0, gain: float = 0.7) -> float:
        with torch.no_grad():
            ys = esdirk4(Springs(damping), y0 + dy0, t + dt, 1e-9, args=(gain,)).ys
        return float((ys * torch.linspace(1, 2, ys.numel(), dtype=ys.dtype).view_as(ys)).sum())

    def difference(move: Callable[[float], dict[str, Any]]) -> float:
        return (loss(**move(eps)) - loss(**move(-eps))) / (2 * eps)

    one = torch.zeros_like(y0)
    one[1, 0] = 1
    assert difference(lambda e: {"dy0": e * one}) == pytest.approx(float(by_y0[1, 0]), rel=1e-5)
    for i in range(3):
        unit = torch.eye(3, dtype=torch.float64)[i]
        assert difference(lambda e, unit=unit: {"dt": e * unit}) == pytest.approx(float(by_t[i]), rel=1e-4, abs=1e-5)
    assert difference(lambda e: {"damping": 30 + e}) == pytest.approx(float(by_damping), rel=1e-5)
    assert difference(lambda e: {"gain": 0.7 + e}) == pytest.approx(float(by_gain), rel=1e-5)


def test_gradient_through_a_stiff_solve() -> None:
    # y follows cos t; the transient has died out, so that y(t) = (λ² cos t + λ sin t)/(λ² + 1)
    rate = torch.tensor(1e4, dtype=torch.float64, requires_grad=True)
    y0 = tensor(0.0, requires_grad=True)
    solution = esdirk4(lambda t, y: -rate * (y - t.cos()), y0, tensor(0.0, 1.0), 1e-9)
    by_rate, by_y0 = torch.autograd.grad(solution.ys[-1, 0], (rate, y0))
    expected = torch.func.grad(lambda r: (r * r * math.cos(1) + r * math.sin(1)) / (r * r + 1))(rate.detach())
    assert float(by_rate) == pytest.approx(float(expected), rel=1e-2)
    assert abs(float(by_y0)) < 1e-9


def test_nothing_wants_a_gradient_nothing_carries_one() -> None:
    field = Counting(lambda t, y: -y)
    ys = esdirk4(field, tensor([1.0, 2.0]), tensor(0.0, 1.0)).ys
    assert not ys.requires_grad


def test_second_derivatives_are_refused() -> None:
    y0 = tensor([1.0, 2.0], requires_grad=True)
    ys = esdirk4(lambda t, y: -(y**3), y0, tensor(0.0, 1.0), checkpoint="never").ys
    with pytest.raises(UsageError, match="second derivatives through esdirk4"):
        torch.autograd.grad(ys.sum(), y0, create_graph=True)
    with pytest.raises(UsageError, match="second derivatives through esdirk4"):
        torch.func.grad(lambda y: esdirk4(lambda t, x: -(x**3), y, tensor(0.0, 1.0)).ys.sum())(y0.detach())


def test_a_field_that_autograd_does_not_see_is_refused() -> None:
    stiff = torch.no_grad()(lambda t, y: -1e4 * (y - t.cos()))
    with pytest.raises(UsageError, match=r"esdirk4 differentiates the field.*no_grad"):
        esdirk4(stiff, tensor([1.0, 2.0]), tensor(0.0, 1.0))
    steady = esdirk4(torch.no_grad()(lambda t, y: t.cos().expand(1, 2)), tensor([1.0, 2.0]), tensor(0.0, 1.0), 1e-9)
    assert float(steady.ys[-1, 0, 0]) == pytest.approx(1 + math.sin(1), rel=1e-6)
    jumping = esdirk4(lambda t, y: torch.where(y > 0, 1.0, -1.0), tensor([0.0, 2.0]), tensor(0.0, 1.0))
    torch.testing.assert_close(jumping.ys[-1], tensor([-1.0, 3.0]))


def test_methods_say_whether_they_differentiate_the_field() -> None:
    assert [name for name, method in METHODS.items() if method.differentiates] == ["esdirk4"]
    with torch.inference_mode():
        esdirk4(lambda t, y: -y, tensor([1.0, 2.0]), tensor(0.0, 1.0))


def test_rounding_under_autocast_is_no_coupling_of_samples() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3))
    y0 = torch.randn(3, 3)
    exact = solve(lambda t, y: net(y), y0, [0.0, 1.0], method="esdirk4", rtol=1e-6, atol=1e-6).final
    with torch.autocast("cpu", torch.bfloat16):
        found = solve(lambda t, y: net(y), y0, [0.0, 1.0], method="esdirk4", rtol=1e-2, atol=1e-2).final
    torch.testing.assert_close(found, exact, rtol=0, atol=0.05)
