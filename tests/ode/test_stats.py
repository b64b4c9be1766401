"""What a solve says it cost is what it cost."""

from __future__ import annotations

import pytest
import torch

from neuralode.nn import MLPField
from neuralode.ode import methods, solve
from neuralode.ode.methods import METHODS, takes_fixed_steps
from tests.problems import Counting

FIXED = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}  # evaluations in a step
Y0 = torch.tensor([[1.0, 2.0], [0.5, -1.0]])


def counting() -> Counting:
    torch.manual_seed(0)
    return Counting(MLPField(2, [8]))


def step(method: str) -> float | None:
    return 0.125 if takes_fixed_steps(method) else None


@pytest.mark.parametrize("outputs", [2, 5])
@pytest.mark.parametrize("gradient", ["exact", "adjoint"])
@pytest.mark.parametrize("method", methods())
def test_nfe_is_the_number_of_calls(method: str, gradient: str, outputs: int) -> None:
    field = counting().requires_grad_(method != "scipy_solver")  # which has no exact gradient
    stats = solve(
        field, Y0, torch.linspace(0, 1, outputs), method=method, step_size=step(method), gradient=gradient
    ).stats
    assert stats.nfe == field.calls > 0
    assert (stats.method, stats.gradient) == (method, gradient)
    assert stats.engine == ("stepper" if method in METHODS else "torchdiffeq")
    assert stats.reason


@pytest.mark.parametrize(("method", "stages"), FIXED.items())
def test_fixed_steps_are_counted(method: str, stages: int) -> None:
    stats = solve(counting(), Y0, [0.0, 1.0], method=method, step_size=0.125).stats
    assert (stats.accepted, stats.rejected) == (8, 0)
    assert stats.step_sizes == pytest.approx([0.125] * 8)
    assert stats.nfe == 8 * stages


def test_last_fixed_step_is_cut_to_the_span() -> None:
    stats = solve(counting(), Y0, [0.0, 1.0], method="euler", step_size=0.3).stats
    assert stats.step_sizes == pytest.approx([0.3, 0.3, 0.3, 0.1], rel=1e-5)


@pytest.mark.parametrize("span", [(0.0, 2.0), (2.0, 0.0)], ids=str)
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2"])
def test_adaptive_steps_cover_the_span(method: str, span: tuple[float, float]) -> None:
    stats = solve(lambda t, y: (20 * t).sin() * y, Y0, span, method=method).stats
    assert len(stats.step_sizes) == stats.accepted > 1
    assert sum(stats.step_sizes) == pytest.approx(2.0, rel=1e-9)
    # torchdiffeq steps beyond the last time
    beyond = solve(lambda t, y: (20 * t).sin() * y, Y0, span, method=method, engine="torchdiffeq").stats
    assert sum(beyond.step_sizes[:-1]) < 2.0 <= sum(beyond.step_sizes) + 1e-9


def test_rejected_steps_are_counted_and_not_listed() -> None:
    stats = solve(lambda t, y: (50 * t).sin() * y, Y0, [0.0, 1.0], options={"first_step": 1.0}).stats
    assert stats.rejected >= 1
    assert len(stats.step_sizes) == stats.accepted
    # two evaluations at most to begin, six in every attempted step
    assert 0 <= stats.nfe - 6 * (stats.accepted + stats.rejected) <= 2


def test_counters_that_the_engine_cannot_fill_are_none() -> None:
    stats = solve(counting().requires_grad_(False), Y0, [0.0, 1.0], method="scipy_solver").stats
    assert (stats.accepted, stats.rejected, stats.step_sizes) == (None, None, [])
    assert stats.error_estimate is None


@pytest.mark.parametrize(("method", "stages"), FIXED.items())
def test_exact_backward_is_one_product_for_every_evaluation(method: str, stages: int) -> None:
    field = counting()
    solution = solve(field, Y0, [0.0, 1.0], method=method, step_size=0.125)
    assert solution.stats.nfe_backward == 0
    solution.final.sum().backward()
    assert solution.stats.nfe_backward == field.vjps == 8 * stages


@pytest.mark.parametrize("gradient", ["exact", "adjoint"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_nfe_backward_is_the_number_of_products(method: str, gradient: str) -> None:
    field = counting()
    t = torch.linspace(0, 1, 3)
    solution = solve(field, Y0.clone().requires_grad_(), t, method=method, step_size=step(method), gradient=gradient)
    assert solution.stats.nfe_backward == 0
    forward = solution.stats.nfe
    solution.final.sum().backward()
    assert solution.stats.nfe_backward == field.vjps > 0
    assert solution.stats.nfe == forward, "the backward pass changed the forward count"


def test_without_gradients_nothing_is_counted_backwards() -> None:
    with torch.no_grad():
        stats = solve(counting(), Y0, [0.0, 1.0], gradient="adjoint").stats
    assert stats.nfe_backward == 0
    assert stats.nfe > 0


def test_each_solve_has_statistics_of_its_own() -> None:
    field = counting()
    first, second = (solve(field, Y0, [0.0, 1.0], method="euler", step_size=0.5) for _ in range(2))
    second.final.sum().backward()
    assert (first.stats.nfe, first.stats.nfe_backward) == (2, 0)
    assert (second.stats.nfe, second.stats.nfe_backward) == (2, 2)


def test_products_count_where_the_first_part_of_a_tuple_needs_no_gradient() -> None:
    rate = torch.ones(2, requires_grad=True)
    start = (torch.zeros(2), torch.ones(2))
    solution = solve(lambda t, y: (torch.ones(2), -rate * y[1]), start, [0.0, 1.0], method="euler", step_size=0.5)
    solution.final[1].sum().backward()
    assert solution.stats.nfe_backward == 2


def test_field_that_returns_a_leaf_keeps_no_hooks() -> None:
    y0 = torch.ones(2, requires_grad=True)
    first, second = (solve(lambda t, y: y, y0, [0.0, 1.0], method="euler", step_size=0.5) for _ in range(2))
    second.final.sum().backward()
    assert first.stats.nfe_backward == 0
