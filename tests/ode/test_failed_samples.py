"""Without throw, a sample with steps of its own that fails is NaN, and the others are as if it were not there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from neuralode import solve
from neuralode.ode import Status

METHODS: list[dict[str, Any]] = [
    {}, {"engine": "stepper"}, {"engine": "stepper", "checkpoint": "always"}, {"engine": "stepper", "checkpoint": 3},
    {"method": "dop853"}, {"method": "bosh3", "controller": "PI"}, {"method": "esdirk4"},
    {"method": "rk4", "step_size": 0.01}, {"method": "euler", "step_size": 0.01, "checkpoint": "always"},
]  # fmt: skip
GROWTH = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)


def explosion(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """1 / (1 / y0 - t): from 2 on infinite before t = 1/2."""
    return GROWTH * y * y


def starts(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None].repeat(1, 2).requires_grad_()


@pytest.mark.parametrize("times", [[0.0, 1.0], [0.0, 0.3, 0.7, 1.0]], ids=str)
@pytest.mark.parametrize("how", METHODS, ids=str)
def test_the_others_and_their_gradients_are_as_without_it(how: dict[str, Any], times: list[float]) -> None:
    if how.get("method") == "bosh3":
        how = {**how, "rtol": 1e-3, "atol": 1e-4}
    y0, alone = starts(0.1, 30.0, 0.2, 5.0), starts(0.1, 0.2)
    solution = solve(explosion, y0, times, per_sample=True, throw=False, max_steps=1000, **how)
    stats = solution.stats
    assert solution.status is not Status.SUCCESS
    assert "sample 1" in stats.diagnosis
    assert stats.engine == "stepper"
    assert stats.failed_per_sample is not None
    assert stats.failed_per_sample.tolist() == [False, True, False, True]
    assert solution.ys[:, [1, 3]].isnan().all()
    wanted = solve(explosion, alone, times, per_sample=True, max_steps=1000, **how)
    kept = solution.ys[:, ~stats.failed_per_sample]
    torch.testing.assert_close(kept, wanted.ys, rtol=1e-12, atol=0)
    assert stats.accepted_per_sample is not None
    assert wanted.stats.accepted_per_sample is not None
    assert stats.accepted_per_sample[[0, 2]].tolist() == wanted.stats.accepted_per_sample.tolist()
    found = torch.autograd.grad(kept.square().sum(), (y0, GROWTH))
    expected = torch.autograd.grad(wanted.ys.square().sum(), (alone, GROWTH))
    torch.testing.assert_close(found[0][[0, 2]], expected[0], rtol=1e-10, atol=0)
    assert found[0][[1, 3]].abs().sum() == 0
    torch.testing.assert_close(found[1], expected[1], rtol=1e-10, atol=0)


def test_each_of_the_steps_that_a_failed_sample_tried_counts() -> None:
    stats = solve(explosion, starts(0.1, 5.0), [0.0, 1.0], per_sample=True, throw=False, max_steps=20).stats
    assert stats.accepted_per_sample is not None
    assert stats.rejected_per_sample is not None
    assert int((stats.accepted_per_sample + stats.rejected_per_sample)[1]) == 20
    assert int(stats.accepted_per_sample[0]) < 5


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 2, 3)], ids=str)
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_damaged_sample_leaves_the_others_and_their_gradients_whole(method: str, shape: tuple[int, ...]) -> None:
    y0 = torch.ones(shape)
    y0[2] = math.nan
    rate = torch.ones((), requires_grad=True)
    solution = solve(lambda t, y: -rate * y, y0, [0.0, 1.0], method=method, step_size=0.1, per_sample=True, throw=False)
    assert solution.status is Status.NON_FINITE
    assert "sample 2" in solution.stats.diagnosis
    kept = solution.final[[0, 1, 3]]
    torch.testing.assert_close(kept, torch.full_like(kept, math.exp(-1)), rtol=1e-3, atol=0)
    (gradient,) = torch.autograd.grad(kept.mean(), rate)
    torch.testing.assert_close(gradient, torch.tensor(-math.exp(-1)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("checkpoint", ["auto", "always", 3])
@pytest.mark.parametrize("method", ["dop853", "dopri5"])
def test_a_tank_that_runs_dry_on_the_way(method: str, checkpoint: str | int) -> None:
    """sqrt(y0) - t / 2 squared: the second is empty at t = 1/2, where its slope ends."""
    y0 = torch.tensor([[4.0], [0.0625], [9.0]], dtype=torch.float64, requires_grad=True)
    rate = torch.ones((), dtype=torch.float64, requires_grad=True)
    solution = solve(lambda t, y: -rate * y.sqrt(), y0, [0.0, 1.0], method=method, checkpoint=checkpoint, rtol=1e-8,
                     atol=1e-10, per_sample=True, throw=False)  # fmt: skip
    kept = solution.final[[0, 2]]
    torch.testing.assert_close(kept.flatten().tolist(), [2.25, 6.25])
    found = torch.autograd.grad(kept.sum(), (y0, rate))
    torch.testing.assert_close(found[0].flatten().tolist(), [0.75, 0.0, 2.5 / 3], rtol=1e-6, atol=0)
    assert float(found[1]) == pytest.approx(-4, rel=1e-6)


@pytest.mark.parametrize("start", [math.nan, 1e30])
@pytest.mark.parametrize("how", [{}, {"checkpoint": "always"}, {"method": "rk4", "step_size": 0.05}], ids=str)
def test_a_sample_that_cannot_begin_where_zero_is_no_place_either(how: dict[str, Any], start: float) -> None:
    """The field is infinite at zero, and overflows at 1e30."""
    y0 = torch.tensor([[1.0, 2.0], [start, 1.0], [2.0, 2.0]])
    rate = torch.ones((), requires_grad=True)

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return -rate * y / y.square().sum(1, keepdim=True) + 1e-9 * y * y * y

    def event(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y[:, 0] / y.norm(dim=1) - 0.9

    solution = solve(field, y0, [0.0, 1.0], per_sample=True, throw=False, **how)
    assert solution.stats.failed_per_sample is not None
    assert solution.stats.failed_per_sample.tolist() == [False, True, False]
    alone = solve(field, y0[[0, 2]], [0.0, 1.0], per_sample=True, **how)
    torch.testing.assert_close(solution.final[[0, 2]], alone.final)
    (found,), (wanted,) = (torch.autograd.grad(x.sum(), rate) for x in (solution.final[[0, 2]], alone.final))
    torch.testing.assert_close(found, wanted)
    if "checkpoint" not in how:
        events = solve(field, y0, [0.0, 1.0], per_sample=True, throw=False, events=event, **how).events
        assert events is not None
        assert not events.happened.any()


def test_fixed_steps_need_no_slope_at_the_end() -> None:
    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y * y + 1 / (1 - t).sqrt()

    def final(*values: float) -> torch.Tensor:
        y0 = torch.tensor(values)[:, None]
        return solve(field, y0, [0.0, 1.0], method="euler", step_size=0.125, per_sample=True, throw=False).final

    torch.testing.assert_close(final(0.1, 1e30, 0.2)[[0, 2]], final(0.1, 0.2))


@pytest.mark.parametrize("checkpoint", ["auto", "always"])
def test_estimates_are_those_of_the_others(checkpoint: str) -> None:
    found = []
    for y0 in (starts(0.1, 5.0, 0.2), starts(0.1, 0.2)):
        stats = solve(explosion, y0, [0.0, 1.0], per_sample=True, throw=False, estimates=True, checkpoint=checkpoint,
                      max_steps=200).stats  # fmt: skip
        assert stats.error_estimate is not None
        found.append([stats.error_estimate, *torch.autograd.grad(stats.error_estimate, GROWTH)])
        assert stats.stiffness_estimate is not None
        found[-1].append(stats.stiffness_estimate.detach())
    torch.testing.assert_close(found[0], found[1])


def test_a_solve_that_succeeds_when_done_again_has_succeeded() -> None:
    calls = 0

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return y * (math.nan if calls == 3 else 1)

    solution = solve(field, torch.ones(2, 1), [0.0, 1.0], method="euler", step_size=0.25, per_sample=True, throw=False)
    assert solution.status is Status.SUCCESS
    assert solution.final.flatten().tolist() == [1.25**4] * 2
    assert solution.stats.nfe == calls


def test_where_all_fail_all_are_nan() -> None:
    damaged = solve(explosion, starts(math.nan, math.nan), [0.0, 1.0], per_sample=True, throw=False, dense=True)
    assert damaged.ys.isnan().all()
    assert damaged.dense is None
    solution = solve(explosion, starts(5.0, 6.0), [0.0, 1.0], per_sample=True, throw=False)
    assert solution.ys.isnan().all()
    solution = solve(explosion, starts(0.1, 0.2), [0.0, 1.0], per_sample=True, throw=False, max_steps=1)
    assert solution.ys.isnan().all()
    assert solution.status is Status.MAX_STEPS


def test_times_of_each_sample_and_tuples() -> None:
    y0 = (starts(0.1, 5.0).detach(), torch.ones(2, 1, dtype=torch.float64))
    times = torch.tensor([[0.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    solution = solve(lambda t, y: (y[0] ** 2, -y[1]), y0, times, throw=False, rtol=1e-8, atol=1e-9)
    assert all(part[:, 1].isnan().all() for part in solution.ys)
    torch.testing.assert_close(solution.final[0][0], torch.full((2,), 1 / 9, dtype=torch.float64))
    torch.testing.assert_close(solution.final[1][0], torch.tensor([math.exp(-1)], dtype=torch.float64))


def test_dense_output_and_events_of_the_others() -> None:
    def event(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y[:, 0] - 0.5

    y0 = starts(0.4, 5.0, 0.1)  # to one half at t = 1/2, and never
    how: dict[str, Any] = {"per_sample": True, "throw": False, "rtol": 1e-9, "atol": 1e-11}
    solution = solve(explosion, y0, [0.0, 1.0], dense=True, events=event, **how)
    assert solution.events is not None
    assert solution.events.happened.tolist() == [True, False, False]
    assert float(solution.events.ts[0].detach()) == pytest.approx(0.5, abs=1e-6)
    assert solution.events.ys[1].isnan().all()
    assert solution.final[:, 0].detach().nan_to_num(-1).tolist() == pytest.approx([0.5, -1, 1 / 9], rel=1e-6)
    assert solution.dense is not None
    assert solution.dense(0.25)[:, 0].detach().nan_to_num(-1).tolist() == pytest.approx(
        [1 / 2.25, -1, 1 / 9.75], rel=1e-6
    )
    assert solution.dense(0.0)[:, 0].detach().nan_to_num(-1).tolist() == pytest.approx([0.4, -1, 0.1])
    assert solution.dense(0.9)[:, 0].detach().nan_to_num(-1).tolist() == pytest.approx([0.5, -1, 1 / 9.1], rel=1e-6)


def test_without_a_failure_nothing_is_said_of_it() -> None:
    solution = solve(explosion, starts(0.1, 0.2), [0.0, 1.0], per_sample=True, throw=False)
    assert solution.status is Status.SUCCESS
    assert solution.stats.failed_per_sample is None
