"""The explicit methods are what their names say: coefficients, orders, error estimates and dense output."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torchdiffeq import odeint

from neuralode.ode import solve
from neuralode.ode.explicit import RungeKutta
from neuralode.ode.methods import METHODS, in_torchdiffeq
from tests.problems import PROBLEMS, Counting, Problem

EXPLICIT = {name: method for name, method in METHODS.items() if isinstance(method, RungeKutta)}
ESTIMATING = [name for name, method in EXPLICIT.items() if method.adaptive]
REUSING = ["bosh3", "dopri5", "tsit5", "dopri8", "dop853"]  # the last stage is the first of the next step
ORDERS = {
    "euler": 1, "midpoint": 2, "heun2": 2, "ralston": 2, "adaptive_heun": 2, "fehlberg2": 2, "heun3": 3, "bosh3": 3,
    "rk4": 4, "rk4_classic": 4, "dopri5": 5, "tsit5": 5, "dopri8": 8, "dop853": 8,
}  # fmt: skip
ESTIMATES = {"adaptive_heun": 2, "fehlberg2": 2, "bosh3": 3, "dopri5": 5, "tsit5": 5, "dopri8": 8, "dop853": 8}
BETWEEN = {"dopri5": 4, "tsit5": 4, "dopri8": 5, "dop853": 7}  # order of the dense output; elsewhere a cubic

# weights of the rooted trees with up to four nodes, and what their sum has to be (Hairer, Nørsett, Wanner, I, II.2)
TREES: dict[int, list[tuple[Any, float]]] = {
    1: [(lambda a, c: np.ones_like(c), 1)],
    2: [(lambda a, c: c, 1 / 2)],
    3: [(lambda a, c: c**2, 1 / 3), (lambda a, c: a @ c, 1 / 6)],
    4: [
        (lambda a, c: c**3, 1 / 4), (lambda a, c: c * (a @ c), 1 / 8),
        (lambda a, c: a @ c**2, 1 / 12), (lambda a, c: a @ a @ c, 1 / 24),
    ],
}  # fmt: skip


def arrays(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tableau = EXPLICIT[name].tableau
    a = np.zeros((len(tableau.c), len(tableau.c)))
    for i, row in enumerate(tableau.a):
        a[i, : len(row)] = row
    return a, np.array(tableau.b), np.array(tableau.c, dtype=float)


def slope(sizes: list[float], errors: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


def one_step(name: str, problem: Problem, t: float, h: float) -> Any:
    """A step from the exact state at t."""
    y = problem.exact(torch.tensor([t], dtype=torch.float64))[0]
    return EXPLICIT[name].step(problem.field, t, h, y, problem.field(torch.tensor(t, dtype=torch.float64), y))


def walk(name: str, problem: Problem, steps: int) -> torch.Tensor:
    """The state at the end of the span after so many equal steps."""
    (start, end), y = problem.span, problem.y0
    h = (end - start) / steps
    for i in range(steps):
        t = start + i * h
        y = EXPLICIT[name].step(problem.field, t, h, y, problem.field(torch.tensor(t, dtype=torch.float64), y)).y1
    return y


def test_these_are_all_explicit_methods() -> None:
    assert set(EXPLICIT) == set(ORDERS)
    assert set(ESTIMATING) == set(ESTIMATES)
    assert {name: method.order for name, method in EXPLICIT.items()} == ORDERS
    assert {name: EXPLICIT[name].error_order for name in ESTIMATING} == ESTIMATES
    assert all(name == method.name for name, method in EXPLICIT.items())


@pytest.mark.parametrize("name", EXPLICIT)
def test_each_stage_is_evaluated_where_its_row_sums_to(name: str) -> None:
    a, b, c = arrays(name)
    assert len(b) == len(c) == len(EXPLICIT[name].tableau.a)
    np.testing.assert_allclose(a.sum(1), c, rtol=0, atol=2e-14)
    assert not np.triu(a).any()


@pytest.mark.parametrize("name", EXPLICIT)
def test_order_conditions_through_four(name: str) -> None:
    a, b, c = arrays(name)
    for order in range(1, min(ORDERS[name], 4) + 1):
        for tree, value in TREES[order]:
            assert b @ tree(a, c) == pytest.approx(value, rel=0, abs=1e-14)


@pytest.mark.parametrize("name", EXPLICIT)
def test_polynomials_below_the_order_are_integrated_exactly(name: str) -> None:
    _, b, c = arrays(name)
    for power in range(ORDERS[name]):
        assert b @ c**power == pytest.approx(1 / (power + 1), rel=0, abs=1e-14)


@pytest.mark.parametrize("name", ESTIMATING)
def test_embedded_weights_sum_to_one(name: str) -> None:
    tableau = EXPLICIT[name].tableau
    assert sum(tableau.error) == pytest.approx(0, abs=1e-14)
    assert sum(tableau.error_low) == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.parametrize("name", EXPLICIT)
def test_order_of_the_steps(name: str, problem: Problem) -> None:
    steps = [8, 12, 16] if ORDERS[name] == 8 else [16, 24, 32]
    errors = [float((walk(name, problem, n) - problem.exact(problem.times())[-1]).abs().max()) for n in steps]
    assert ORDERS[name] - 0.5 < slope([3 / n for n in steps], errors) < ORDERS[name] + 2.2


@pytest.mark.parametrize("name", ESTIMATING)
def test_order_of_the_error_estimate(name: str) -> None:
    problem = PROBLEMS[1]
    sizes = [0.4, 0.3, 0.2] if ESTIMATES[name] == 8 else [0.1, 0.07, 0.05]
    steps = [one_step(name, problem, 0.2, h) for h in sizes]
    estimates = [float(EXPLICIT[name].error(step, problem.field).abs().max()) for step in steps]
    assert slope(sizes, estimates) == pytest.approx(ESTIMATES[name], abs=0.5)


@pytest.mark.parametrize("name", ["adaptive_heun", "bosh3", "dopri5", "tsit5"])
def test_estimate_is_the_distance_to_a_solution_of_one_order_less(name: str) -> None:
    """y1 - error is an embedded solution: its error is that of the estimate."""
    problem, h = PROBLEMS[0], 0.05
    step = one_step(name, problem, 0.7, h)
    estimate = EXPLICIT[name].error(step, problem.field)
    exact = problem.exact(torch.tensor([0.7 + h], dtype=torch.float64))[0]
    torch.testing.assert_close(step.y1 - estimate, exact, rtol=0, atol=1.2 * float(estimate.abs().max()))
    assert (step.y1 - exact).abs().max() < 0.3 * (step.y1 - estimate - exact).abs().max()


@pytest.mark.parametrize("name", EXPLICIT)
def test_end_slope_is_that_of_the_new_state(name: str) -> None:
    problem = PROBLEMS[0]
    step = one_step(name, problem, 0.7, 0.25)
    assert (step.f1 is not None) == (name in REUSING)
    wanted = problem.field(torch.tensor(0.95, dtype=torch.float64), step.y1)
    torch.testing.assert_close(step.end_slope(problem.field), wanted, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", EXPLICIT)
def test_a_step_evaluates_each_stage_but_the_first(name: str) -> None:
    problem = PROBLEMS[0]
    field = Counting(problem.field)
    y = problem.y0
    EXPLICIT[name].step(field, 0.0, 0.1, y, problem.field(torch.zeros((), dtype=torch.float64), y))
    assert field.calls == len(EXPLICIT[name].tableau.c) - 1


@pytest.mark.parametrize("name", ESTIMATING)
def test_solves_take_no_more_evaluations_than_stages(name: str) -> None:
    problem = PROBLEMS[0]
    field = Counting(problem.field)
    stats = solve(field, problem.y0, problem.times(), method=name, rtol=1e-4, atol=1e-4).stats
    tried = stats.accepted + stats.rejected
    begin = 2  # the first slope, and one to choose the first step by
    slopes = 0 if name in REUSING else stats.accepted - 1
    assert field.calls == begin + tried * (len(EXPLICIT[name].tableau.c) - 1) + slopes


@pytest.mark.parametrize("problem", PROBLEMS[1:3], ids=lambda p: p.name)
@pytest.mark.parametrize("name", EXPLICIT)
def test_order_between_the_steps(name: str, problem: Problem) -> None:
    order = BETWEEN.get(name, min(ORDERS[name], 3))
    assert EXPLICIT[name].tableau.interpolant_order == BETWEEN.get(name, 3)
    sizes = [0.4, 0.3, 0.2] if order > 4 else [0.1, 0.07, 0.05]
    errors = []
    for h in sizes:
        at = EXPLICIT[name].interpolant(one_step(name, problem, 0.7, h), problem.field)
        fractions = [0.15, 0.35, 0.5, 0.8]
        exact = problem.exact(torch.tensor([0.7 + x * h for x in fractions], dtype=torch.float64))
        errors.append(max(float((at(x) - e).abs().max()) for x, e in zip(fractions, exact, strict=True)))
    # a global order p is a local error O(h^(p + 1))
    assert order + 0.45 < slope(sizes, errors) < order + 1.9


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", EXPLICIT)
def test_dense_output_joins_the_steps(name: str, tensor: bool) -> None:
    problem = PROBLEMS[0]
    step = one_step(name, problem, 0.7, 0.25)
    at = EXPLICIT[name].interpolant(step, problem.field)
    start, end = (torch.tensor(x, dtype=torch.float64) if tensor else x for x in (0.0, 1.0))
    torch.testing.assert_close(at(start), step.y0, rtol=0, atol=0)
    torch.testing.assert_close(at(end), step.y1, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", EXPLICIT)
def test_dense_output_leaves_and_arrives_with_the_slopes(name: str) -> None:
    problem, h = PROBLEMS[0], 0.25
    step = one_step(name, problem, 0.7, h)
    at = EXPLICIT[name].interpolant(step, problem.field)
    # tsit5's interpolant is continuous, but its slope at the end is that of the field only to its order
    for theta, wanted in ((0.0, step.f0), (1.0, step.end_slope(problem.field))):
        place = torch.tensor(theta, dtype=torch.float64)
        _, slopes = torch.func.jvp(at, (place,), (torch.ones_like(place),))
        torch.testing.assert_close(slopes / h, wanted, rtol=0, atol=1e-5 if name == "tsit5" else 1e-11)


def test_rk4_is_the_three_eighths_rule_and_rk4_classic_the_classical_one() -> None:
    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y * t.cos() + y**2

    y, t, h = torch.tensor([0.3, -0.8], dtype=torch.float64), 0.4, 0.5

    def f(at: float, state: torch.Tensor) -> torch.Tensor:
        return field(torch.tensor(at, dtype=torch.float64), state)

    k1 = f(t, y)
    k2 = f(t + h / 3, y + h * k1 / 3)
    k3 = f(t + 2 * h / 3, y + h * (k2 - k1 / 3))
    k4 = f(t + h, y + h * (k1 - k2 + k3))
    torch.testing.assert_close(
        EXPLICIT["rk4"].step(field, t, h, y, k1).y1, y + h * (k1 + 3 * k2 + 3 * k3 + k4) / 8, rtol=1e-14, atol=0
    )
    k2 = f(t + h / 2, y + h * k1 / 2)
    k3 = f(t + h / 2, y + h * k2 / 2)
    k4 = f(t + h, y + h * k3)
    torch.testing.assert_close(
        EXPLICIT["rk4_classic"].step(field, t, h, y, k1).y1, y + h * (k1 + 2 * k2 + 2 * k3 + k4) / 6, rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("name", sorted(filter(in_torchdiffeq, EXPLICIT)))
def test_one_step_is_that_of_torchdiffeq(name: str) -> None:
    h, y = 0.5, torch.tensor([0.3, -0.8], dtype=torch.float64)

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y * t.cos() + y**2

    times = torch.tensor([0.4, 0.4 + h], dtype=torch.float64)
    adaptive: dict[str, Any] = {"rtol": 1e6, "atol": 1e6, "options": {"first_step": torch.tensor(h).double()}}
    theirs = odeint(field, y, times, method=name, **(adaptive if name in ESTIMATING else {}))[-1]
    ours = EXPLICIT[name].step(field, 0.4, h, y, field(times[0], y)).y1
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", sorted(filter(in_torchdiffeq, ESTIMATING)))
def test_error_estimates_are_those_of_torchdiffeq(name: str) -> None:
    """A step that torchdiffeq just accepts at a tolerance is one whose error is that tolerance."""
    problem = PROBLEMS[0]
    step = one_step(name, problem, 0.0, 0.5)
    norm = float(torch.linalg.vector_norm(EXPLICIT[name].error(step, problem.field))) / step.y0.numel() ** 0.5
    times = torch.tensor([0.0, 0.5], dtype=torch.float64)
    options = {"first_step": torch.tensor(0.5).double(), "max_num_steps": 1}
    for factor, accepted in ((1 - 1e-6, False), (1 + 1e-6, True)):
        settings: dict[str, Any] = {"method": name, "rtol": 0.0, "atol": norm * factor, "options": options}
        if accepted:
            odeint(problem.field, problem.y0, times, **settings)
        else:
            with pytest.raises(AssertionError, match="max_num_steps"):
                odeint(problem.field, problem.y0, times, **settings)


def test_no_two_methods_are_the_same() -> None:
    for (_, one), (_, other) in itertools.combinations(EXPLICIT.items(), 2):
        assert (one.tableau.a, one.tableau.b, one.adaptive) != (other.tableau.a, other.tableau.b, other.adaptive)
