"""The Runge-Kutta-Chebyshev method: order, error estimate, stages, spectral radius, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from neuralode.errors import UsageError
from neuralode.nn import MLPField
from neuralode.ode import solve
from neuralode.ode.chebyshev import RKC2, coefficients, most_stages, power_iteration
from neuralode.ode.methods import METHODS
from tests.problems import PROBLEMS, Counting, Problem

Field = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "rkc2", RKC2())


def march(problem: Problem, steps: int, stages: int) -> torch.Tensor:
    """The state at the end after equal steps of so many stages, no error control."""
    method, (t, end), y = RKC2(), problem.span, problem.y0
    h = (end - t) / steps
    for i in range(steps):
        now = t + i * h
        y = method.step(problem.field, now, h, y, problem.field(torch.tensor(now), y), stages, complete=False).y1
    return y


def slope(sizes: list[float], errors: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


def heat(points: int = 80) -> tuple[Field, torch.Tensor, float]:
    """Diffusion on (0, 1) with cold ends: the field, a start with every frequency in it, the spectral radius."""
    gap = 1 / (points + 1)

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        wide = nn.functional.pad(y, (1, 1))
        return (wide[2:] - 2 * y + wide[:-2]) / gap**2

    x = torch.linspace(gap, 1 - gap, points, dtype=torch.float64)
    return field, torch.sin(torch.pi * x) + 0.1 * (900 * x * x).cos(), 4 / gap**2


@pytest.mark.parametrize("stages", [2, 3, 5, 12])
def test_order_is_two_for_any_number_of_stages(stages: int) -> None:
    for problem in PROBLEMS:
        steps = [32, 64, 128]
        wanted = problem.exact(problem.times())[-1]
        errors = [float((march(problem, n, stages) - wanted).abs().max()) for n in steps]
        found = slope([1 / n for n in steps], errors)
        # where the leading error vanishes by chance at the end, the slope is steeper
        assert found > 1.7, problem.name
        assert found < 2.3 or problem.name != "rotation"


def test_error_estimate_is_of_third_order_and_near_the_error() -> None:
    problem, method = PROBLEMS[0], RKC2()
    sizes, estimates, errors = [0.1, 0.05, 0.025], [], []
    for h in sizes:
        t = torch.tensor(0.7, dtype=torch.float64)
        y = problem.exact(t[None])[0]
        step = method.step(problem.field, 0.7, h, y, problem.field(t, y), 8)
        estimates.append(float(method.error(step, problem.field).abs().max()))
        errors.append(float((step.y1 - problem.exact(t[None] + h)[0]).abs().max()))
    assert slope(sizes, estimates) == pytest.approx(3, abs=0.2)
    assert all(0.3 < estimate / error < 3 for estimate, error in zip(estimates, errors, strict=True))


@pytest.mark.parametrize("stages", [2, 5, 20, 500])
def test_stable_for_every_step_that_the_stages_are_planned_for(stages: int) -> None:
    """The stability polynomial, at all hλ down to the end of the interval, is damped below 1."""
    z = -torch.linspace(0.05, (stages**2 - 1) / 1.54, 4001, dtype=torch.float64)
    step = RKC2().step(lambda t, y: z * y, 0.0, 1.0, torch.ones_like(z), z, stages, complete=False)
    assert float(step.y1.abs().max()) < 1


def test_stages_grow_with_the_root_and_are_capped() -> None:
    y = torch.zeros(3, dtype=torch.float64)
    method = RKC2(1e4)
    assert method.plan(lambda t, y: y, 0.0, y, -0.0109, y) == (-0.0109, 13)
    h, stages = method.plan(lambda t, y: y, 0.5, y, -1e9, y)
    assert stages == most_stages(torch.float64)
    assert h == pytest.approx(-(stages**2 - 1) / 1.54e4)
    assert method.plan(lambda t, y: y, 0.6, y.float(), 1e9, y.float())[1] == most_stages(torch.float32) < 100
    assert RKC2(0.0).plan(lambda t, y: y, 0.0, y, 1.0, y) == (1.0, 2)
    assert coefficients(13) is coefficients(13)


@pytest.mark.parametrize("radius", [0.0, 3.0, 700.0, 1e5])
@pytest.mark.parametrize("cut", [False, True])
def test_planned_pair_is_stable_and_the_cheapest(radius: float, cut: bool) -> None:
    y, direction = torch.zeros(2, dtype=torch.float64), -1.0
    for size in np.geomspace(1e-5, 3, 200):
        h, stages = RKC2(radius).plan(lambda t, y: y, 0.0, y, direction * float(size), y, cut)
        assert 0 < h * direction <= size
        assert h * direction * radius <= (stages**2 - 1) / 1.54 * (1 + 1e-9)
        if cut and stages < most_stages(y.dtype):
            assert h * direction == size
        if not cut:
            others = ((s, min(size, (s**2 - 1) / (1.54 * max(radius, 1e-9)))) for s in range(2, most_stages(y.dtype)))
            assert stages / abs(h) <= min(s / longest for s, longest in others) * (1 + 1e-9)


def test_a_step_that_ends_at_an_output_is_not_cut_in_two() -> None:
    """The whole solve in one step, though a stage less would be cheaper a unit of time."""
    y0, times = torch.ones(1, dtype=torch.float64), [0.0, 0.0068]
    options = {"spectral_radius": 300.0, "first_step": 1.0}
    stats = solve(lambda t, y: -y, y0, times, method="rkc2", options=options).stats
    assert stats.accepted == 1
    assert RKC2(300.0).plan(lambda t, y: y, 0.0, y0, 0.0068, y0) == (pytest.approx(3 / 1.54 / 300), 2)


def test_a_growing_radius_is_foreseen() -> None:
    """Once two answers tell the growth, each step is stable to its end, and a bound that stops growing is noticed."""
    y, asked, t = torch.zeros(2, dtype=torch.float64), list[float](), 0.0

    def bound(t: float, y: torch.Tensor) -> float:
        asked.append(t)
        return min(100 + 40 * t, 500.0)

    method = RKC2(bound)
    for _ in range(200):
        h, stages = method.plan(lambda t, y: y, t, y, 0.1, y)
        if len(asked) > 1:
            assert h * min(100 + 40 * (t + h), 500.0) <= (stages**2 - 1) / 1.54 * (1 + 1e-9)
        t += h
    assert len(asked) <= 1 + 200 / 25
    assert (h, stages) == RKC2(500.0).plan(lambda t, y: y, t, y, 0.1, y)


def test_an_estimate_of_its_own_is_not_taken_to_grow() -> None:
    """It errs by more than a spectrum grows; the second one of a diffusion is above the first."""
    field, y0, _ = heat()
    method, planned = RKC2(), set()
    for k in range(60):
        planned.add(method.plan(lambda t, y: field(t, y), 0.01 * k, y0, 1e-4, field(torch.tensor(0.0), y0)))
    assert len(planned) <= 3  # one for each estimate, or fewer


def test_radius_that_jumps_is_asked_more_often_until_it_is_steady() -> None:
    y, asked = torch.zeros(2, dtype=torch.float64), list[float]()

    def bound(t: float, y: torch.Tensor) -> float:
        asked.append(t)
        return 1.3 ** min(t, 200.0)

    method = RKC2(bound)
    for k in range(600):
        method.plan(lambda t, y: y, float(k), y, 1e-12, y)
    gaps = np.diff(asked)
    assert gaps[0] == 25
    assert min(gaps) == 3
    assert gaps[-1] == 25


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.parametrize("backwards", [False, True])
def test_solves_to_the_tolerance_in_both_directions(problem: Problem, backwards: bool) -> None:
    times = problem.times(7).flip(0) if backwards else problem.times(7)
    exact = problem.exact(times)
    ys = solve(problem.field, exact[0], times, method="rkc2", rtol=1e-7, atol=1e-7).ys
    torch.testing.assert_close(ys, exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("given", [True, False])
def test_heat_takes_far_fewer_evaluations_than_dopri5(given: bool) -> None:
    field, y0, radius = heat()
    options = {"spectral_radius": radius} if given else {}
    tolerances: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}
    ours = solve(field, y0, [0.0, 0.3], method="rkc2", options=options, **tolerances)
    theirs = solve(field, y0, [0.0, 0.3], method="dopri5", max_steps=10**5, **tolerances)
    assert 10 * ours.stats.nfe < theirs.stats.nfe
    torch.testing.assert_close(ours.final, theirs.final, rtol=0, atol=1e-4)


def test_spectral_radius_is_asked_at_the_start_then_seldom() -> None:
    field, y0, radius = heat()
    asked: list[float] = []

    def bound(t: float, y: torch.Tensor) -> float:
        assert isinstance(t, float)
        assert y.shape == y0.shape
        asked.append(t)
        return radius

    counting = Counting(field)
    stats = solve(counting, y0, [0.0, 0.3], method="rkc2", rtol=1e-4, atol=1e-6,
                  options={"spectral_radius": bound}).stats  # fmt: skip
    assert asked[0] == 0.0
    assert 1 < len(asked) <= 2 + stats.accepted // 25 + stats.rejected
    assert stats.nfe == counting.calls


def test_a_radius_that_is_too_small_is_asked_again_after_a_rejection() -> None:
    field, y0, radius = heat()
    answers = iter([radius, radius / 50])
    tolerances: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}
    wrong = {"spectral_radius": lambda t, y: next(answers, radius)}
    solution = solve(field, y0, [0.0, 0.3], method="rkc2", options=wrong, **tolerances)
    right = solve(field, y0, [0.0, 0.3], method="rkc2", options={"spectral_radius": radius}, **tolerances)
    assert next(answers, None) is None
    assert 1 <= solution.stats.rejected <= 5
    torch.testing.assert_close(solution.final, right.final, rtol=0, atol=1e-4)


def test_power_iteration_finds_the_radius_even_from_a_smooth_state() -> None:
    field, _, radius = heat()
    smooth = torch.sin(torch.pi * torch.linspace(0, 1, 82, dtype=torch.float64)[1:-1])
    time = torch.tensor(0.0)
    found, direction = power_iteration(lambda y: field(time, y), smooth, field(time, smooth), None)
    assert 0.8 * radius < found <= radius * 1.001
    again = Counting(field)
    power_iteration(lambda y: again(time, y), smooth, field(time, smooth), direction)
    assert again.calls == 2


def test_global_random_state_is_untouched() -> None:
    field, y0, _ = heat()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = solve(field, y0, [0.0, 0.1], method="rkc2").final
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, solve(field, y0, [0.0, 0.1], method="rkc2").final)


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), "large"])
def test_radius_of_the_wrong_kind_is_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match="spectral_radius"):
        solve(lambda t, y: -y, torch.ones(1), [0.0, 1.0], method="rkc2", options={"spectral_radius": wrong})


def _gradients(checkpoint: str, times: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(0)
    field = MLPField(2, [8], time=True).double()
    y0 = torch.tensor([[0.3, -0.2], [1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    times = times.clone().requires_grad_()
    ys = solve(field, y0, times, method="rkc2", rtol=1e-4, atol=1e-4, checkpoint=checkpoint,
               options={"spectral_radius": 30.0}).ys  # fmt: skip
    return list(torch.autograd.grad(ys[1:].pow(2).sum(), [y0, times, *field.parameters()]))


@pytest.mark.parametrize("times", [[0.0, 0.4, 1.1], [1.0, 0.7, 0.1]], ids=["forward", "backward"])
def test_recomputed_steps_give_the_same_gradient(times: list[float]) -> None:
    ts = torch.tensor(times, dtype=torch.float64)
    for kept, recomputed in zip(_gradients("never", ts), _gradients("always", ts), strict=True):
        torch.testing.assert_close(kept, recomputed, rtol=1e-10, atol=1e-12)


def test_gradient_against_finite_differences() -> None:
    """One step of fixed stages: the gradient of the discrete step, by state, slope, time, size and parameter."""
    double: dict[str, Any] = {"dtype": torch.float64, "requires_grad": True}

    def step(y: torch.Tensor, f0: torch.Tensor, t: torch.Tensor, h: torch.Tensor, gain: torch.Tensor) -> Any:
        def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return gain * torch.tanh(y).flip(0) * (1 + t) - y

        method = RKC2()
        made = method.step(field, t, h, y, f0, 5)
        return made.y1, made.f1, method.error(made, field), method.interpolant(made, field)(0.3)

    y, f0 = torch.tensor([0.4, -0.9], **double), torch.tensor([0.7, 0.2], **double)
    t, h, gain = (torch.tensor(value, **double) for value in (0.3, 0.6, 1.4))
    assert torch.autograd.gradcheck(step, (y, f0, t, h, gain))


def test_gradient_of_a_whole_solve_against_finite_differences() -> None:
    torch.manual_seed(0)
    field = MLPField(2, [8], time=True).double()
    y0 = torch.tensor([[0.3, -0.2]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 0.9], dtype=torch.float64, requires_grad=True)

    def final(y0: torch.Tensor, t: torch.Tensor) -> Any:
        return solve(field, y0, t, method="rkc2", rtol=1e-8, atol=1e-8, options={"spectral_radius": 5.0}).final

    assert torch.autograd.gradcheck(final, (y0, t), atol=1e-5)


def test_stiff_gradient_is_finite_and_meets_the_closed_form() -> None:
    rates = torch.tensor([1.0, 50.0, 400.0], dtype=torch.float64, requires_grad=True)
    y = solve(lambda t, y: rates * (1 - y), torch.zeros(3, dtype=torch.float64), [0.0, 1.0], method="rkc2", rtol=1e-6,
              atol=1e-6).final  # fmt: skip
    (found,) = torch.autograd.grad(y.sum(), rates)
    torch.testing.assert_close(found, (-rates.detach()).exp(), rtol=0, atol=1e-3)


def test_complex_state_and_single_precision() -> None:
    turning = solve(lambda t, y: (-1 + 0.3j) * y, torch.ones(2, dtype=torch.complex128), [0.0, 1.0], method="rkc2",
                    rtol=1e-6, atol=1e-6).final  # fmt: skip
    torch.testing.assert_close(turning, torch.exp(torch.tensor([-1 + 0.3j] * 2, dtype=torch.complex128)), rtol=0,
                               atol=1e-4)  # fmt: skip
    field, y0, _ = heat()
    single = solve(field, y0.float(), [0.0, 0.1], method="rkc2", rtol=1e-3, atol=1e-4)
    double = solve(field, y0, [0.0, 0.1], method="rkc2", rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(single.final.double(), double.final, rtol=0, atol=2e-3)
