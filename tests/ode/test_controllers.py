"""Step-size control: what is accepted, how far a step may grow or shrink, and that solves meet their tolerance."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from neuralode.errors import UsageError
from neuralode.ode import SolverConfig, solve
from neuralode.ode.controllers import CONTROLLERS, Controller, StepSize, controller
from tests.problems import PROBLEMS, Problem

NAMES = ["I", "PI", "PID"]
ORDER = 5


def fresh(name: str, size: float = 1.0) -> StepSize:
    return StepSize(CONTROLLERS[name], ORDER, size)


def test_a_step_that_barely_stood_is_followed_by_a_shorter_one_only_if_it_shrinks() -> None:
    for shrinks, wanted in ((False, 1.0), (True, 0.9 * 0.95 ** (-1 / ORDER))):
        state = StepSize(CONTROLLERS["I"], ORDER, 1.0, shrinks=shrinks)
        assert state.accepts(0.95)
        assert state.size == pytest.approx(wanted)


def growth(state: StepSize, ratio: float) -> float:
    before = state.size
    state.accepts(ratio)
    return state.size / before


def stiffening(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Slow, then fast, so that steps of many sizes are taken."""
    return -(1 + 20 * t**2) * (y - t.cos())


def test_these_are_all_controllers() -> None:
    assert set(CONTROLLERS) == set(NAMES)
    assert controller(None) == controller("I") == Controller()


@pytest.mark.parametrize("name", NAMES)
def test_a_step_stands_up_to_a_ratio_of_one(name: str) -> None:
    for ratio in (0.0, 1e-300, 0.5, 1.0):
        assert fresh(name).accepts(ratio)
    for ratio in (math.nextafter(1, 2), 2.0, 1e300, math.inf, math.nan):
        assert not fresh(name).accepts(ratio)


@pytest.mark.parametrize("name", NAMES)
def test_changes_stay_within_the_limits(name: str) -> None:
    control = CONTROLLERS[name]
    chance = random.Random(0)
    state = fresh(name)
    for _ in range(500):
        ratio, rejected = math.exp(chance.uniform(-40, 40)), state.rejected
        factor = growth(state, ratio)
        assert control.min_factor * (1 - 1e-12) <= factor <= control.max_factor * (1 + 1e-12)
        if ratio > 1 or rejected:
            assert factor <= 1
        state.size = 1.0


@pytest.mark.parametrize("name", NAMES)
def test_no_growth_right_after_a_rejection(name: str) -> None:
    state = fresh(name)
    assert growth(state, 50.0) < 1
    assert growth(state, 1e-4) == 1.0
    assert growth(state, 1e-4) > 1.3, "and again from the step after it on"


@pytest.mark.parametrize("ratio", [math.inf, math.nan])
@pytest.mark.parametrize("name", NAMES)
def test_ratio_that_is_not_finite_shrinks_the_most(name: str, ratio: float) -> None:
    state = fresh(name)
    assert growth(state, ratio) == CONTROLLERS[name].min_factor
    # and is not remembered: the next steps are as if it had not been, but for the growth
    other = fresh(name)
    other.rejected = True
    assert growth(state, 0.3) == pytest.approx(growth(other, 0.3))
    assert growth(state, 0.2) == pytest.approx(growth(other, 0.2))


@pytest.mark.parametrize("name", NAMES)
def test_error_of_zero_grows_the_most(name: str) -> None:
    assert growth(fresh(name), 0.0) == CONTROLLERS[name].max_factor


@pytest.mark.parametrize("name", NAMES)
def test_factor_is_the_published_formula(name: str) -> None:
    """Söderlind 2003: h' / h = s · r₀^-(kI+kP+kD)/p · r₁^(kP+2kD)/p · r₂^-kD/p."""
    integral, proportional, derivative = {"I": (1, 0, 0), "PI": (0.3, 0.4, 0), "PID": (0.3, 0.3, 0.0625)}[name]
    state = fresh(name)
    before, last, now = 0.31, 0.42, 0.23
    state.accepts(before)
    state.accepts(last)
    wanted = 0.9 * now ** (-(integral + proportional + derivative) / ORDER)
    wanted *= last ** ((proportional + 2 * derivative) / ORDER) * before ** (-derivative / ORDER)
    assert growth(state, now) == pytest.approx(wanted, rel=1e-12)


def test_the_i_controller_does_not_shrink_after_an_accepted_step() -> None:
    state = fresh("I")
    assert growth(state, 0.99) == 1.0
    assert growth(state, 1.0) == 1.0
    assert growth(fresh("PI"), 0.99) < 1


@pytest.mark.parametrize("start", [1e-3, 1e3])
@pytest.mark.parametrize("name", NAMES)
def test_steps_settle_below_the_tolerance(name: str, start: float) -> None:
    """Where the error is h^p, steps come to rest at a ratio between 0.1 and 1, with no rejection from then on."""
    state = fresh(name, start)
    for _ in range(200):
        state.accepts(state.size**ORDER)
    sizes = []
    for _ in range(20):
        ratio = state.size**ORDER
        assert state.accepts(ratio)
        assert 0.1 < ratio <= 1
        sizes.append(state.size)
    assert max(sizes) == pytest.approx(min(sizes), rel=1e-6)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.parametrize("name", NAMES)
def test_solves_meet_the_tolerance(name: str, problem: Problem, per_sample: bool) -> None:
    times, errors = problem.times(5), []
    for tolerance in (1e-4, 1e-7):
        ys = solve(
            problem.field, problem.y0, times, method="tsit5", rtol=tolerance, atol=tolerance, controller=name,
            per_sample=per_sample,
        ).ys  # fmt: skip
        errors.append(float((ys - problem.exact(times)).abs().max()) / tolerance)
    assert max(errors) < 40


@pytest.mark.parametrize("name", NAMES)
def test_host_and_row_loop_take_the_same_steps(name: str) -> None:
    y0, times = torch.tensor([[1.3]], dtype=torch.float64), [0.0, 2.0]
    settings: dict[str, Any] = {"controller": name, "rtol": 1e-5, "atol": 1e-5, "options": {"first_step": 0.7}}
    host = solve(stiffening, y0, times, **settings)
    rows = solve(stiffening, y0, times, per_sample=True, **settings)
    assert host.stats.rejected > 1
    assert (host.stats.accepted, host.stats.rejected) == (rows.stats.accepted, rows.stats.rejected)
    torch.testing.assert_close(rows.final, host.final, rtol=1e-12, atol=1e-13)


def test_controllers_differ() -> None:
    y0 = torch.tensor([1.3], dtype=torch.float64)
    steps = {name: solve(stiffening, y0, [0.0, 3.0], controller=name).stats.step_sizes for name in NAMES}
    assert len({tuple(sizes) for sizes in steps.values()}) == len(NAMES)


def test_a_controller_of_ones_own_is_used() -> None:
    y0 = torch.tensor([1.3], dtype=torch.float64)
    own = Controller(safety=0.45)
    default, careful = (solve(stiffening, y0, [0.0, 3.0], controller=c).stats for c in ("I", own))
    assert careful.accepted > default.accepted
    assert solve(stiffening, y0, [0.0, 3.0], controller=Controller()).stats.step_sizes == default.step_sizes


@pytest.mark.parametrize("per_sample", [False, True])
def test_ifactor_is_the_greatest_growth(per_sample: bool) -> None:
    """A field of zeros has no error, so that each step is `ifactor` times the last."""
    y0 = torch.ones(1, 1, dtype=torch.float64)
    stats = solve(
        lambda t, y: 0 * y, y0, [0.0, 15.0], per_sample=per_sample, options={"first_step": 1.0, "ifactor": 2.0}
    ).stats
    assert (stats.accepted, stats.rejected) == (4, 0)
    if not per_sample:
        assert stats.step_sizes == pytest.approx([1, 2, 4, 8])


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("factor", [0.5, 0.1])
def test_dfactor_is_the_greatest_shrinking(factor: float, per_sample: bool) -> None:
    """The error is vast in any step that reaches beyond 1e-3, so that the first steps shrink by `dfactor` each."""
    y0 = torch.ones(1, 1, dtype=torch.float64)
    stats = solve(
        lambda t, y: torch.where(t > 1e-3, 1e9 * (t - 1e-3), 0 * t) * y, y0, [0.0, 1.0], per_sample=per_sample,
        options={"first_step": 1.0, "dfactor": factor}, throw=False, max_steps=12,
    ).stats  # fmt: skip
    # every step from the start is too long until it ends before 1e-3
    needed = math.ceil(math.log(1e-3) / math.log(factor) - 1e-9)
    assert needed - 1 <= stats.rejected
    assert stats.accepted + stats.rejected <= 12
    if not per_sample:
        assert stats.step_sizes[0] == pytest.approx(factor**needed)


def test_safety_scales_the_next_step() -> None:
    y0 = torch.tensor([1.3], dtype=torch.float64)
    second = {}
    for safety in (0.9, 0.45):
        options = {"first_step": 1e-3, "safety": safety, "ifactor": 1e3}
        sizes = solve(stiffening, y0, [0.0, 3.0], rtol=1e-6, atol=1e-6, options=options).stats.step_sizes
        assert sizes[0] == 1e-3
        second[safety] = sizes[1]
    assert second[0.9] / second[0.45] == pytest.approx(2)
    assert 1e-3 < second[0.45] < 0.5


@pytest.mark.parametrize(
    "options", [{}, {"safety": 0.7}, {"ifactor": 1.3}, {"dfactor": 0.6}, {"safety": 0.5, "ifactor": 3.0}], ids=str
)
def test_options_of_torchdiffeq_give_its_steps(options: dict[str, float]) -> None:
    problem = PROBLEMS[0]
    settings: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6, "options": {"first_step": 1e-3, **options}}
    ours, theirs = (
        solve(problem.field, problem.y0, [0.0, 0.7], engine=engine, **settings).stats
        for engine in ("stepper", "torchdiffeq")
    )
    assert ours.accepted == theirs.accepted > 3
    assert ours.step_sizes[:-1] == pytest.approx(theirs.step_sizes[:-1], rel=1e-9)  # which oversteps the end


def test_options_reach_the_controller_of_a_config() -> None:
    config = SolverConfig(controller="PI", options={"safety": 0.8, "ifactor": 4, "dfactor": 0.3})
    wanted = Controller(integral=0.3, proportional=0.4, safety=0.8, min_factor=0.3, max_factor=4.0)
    assert config.controller_object() == wanted


@pytest.mark.parametrize("name", ["pi", "P", "", 3])
def test_unknown_controllers_are_refused(name: Any) -> None:
    with pytest.raises(UsageError, match=r"^unknown controller .* Allowed: I, PI, PID\.$"):
        solve(stiffening, torch.ones(1), [0.0, 1.0], controller=name)


@pytest.mark.parametrize(
    "limits",
    [
        {"safety": 0.0}, {"safety": 1.1}, {"safety": -0.5}, {"safety": math.nan},
        {"min_factor": 0.0}, {"min_factor": 1.0}, {"max_factor": 1.0}, {"max_factor": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_limits_that_cannot_be_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"safety has to lie in \(0, 1\].*above 1\.$"):
        Controller(**limits)


@pytest.mark.parametrize("options", [{"safety": 2.0}, {"ifactor": 0.9}, {"dfactor": 1.5}], ids=str)
def test_options_that_cannot_be_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="safety has to lie in"):
        solve(stiffening, torch.ones(1), [0.0, 1.0], options=options)


def test_torchdiffeq_takes_no_choice_of_controller() -> None:
    with pytest.raises(UsageError, match="no choice of controller"):
        solve(stiffening, torch.ones(1), [0.0, 1.0], controller="PI", engine="torchdiffeq")
