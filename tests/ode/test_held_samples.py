"""Samples that share their steps and have met their event: they stay where they are and leave the others alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from neuralode.ode import solve
from tests.ode.test_event_gradients import difference
from tests.ode.test_events import TIGHT

SINGULAR = [("dopri5", {}), ("dop853", {}), ("esdirk4", {}), ("rkc2", {}), ("rk4", {"step_size": 0.01})]


@pytest.mark.parametrize(("method", "given"), SINGULAR)
def test_a_sample_that_met_its_event_does_not_fail_the_others(method: str, given: dict[str, Any]) -> None:
    """y₀/(1 - y₀t) reaches 10 at 1/y₀ - 0.1 and infinity at 1/y₀: for the first sample before the second ends."""
    y0 = torch.tensor([[1.0], [0.5]], dtype=torch.float64, requires_grad=True)
    times = torch.tensor([0.0, 0.95, 1.2, 3.0], dtype=torch.float64)
    solution = solve(
        lambda t, y: y**2, y0, times, events=lambda t, y: y[:, 0] - 10, method=method, rtol=1e-8, atol=1e-8, **given
    )
    found, start = solution.events, y0.detach()
    torch.testing.assert_close(found.ts, (1 / start - 0.1)[:, 0], rtol=0, atol=1e-5)
    exact = torch.stack([torch.full((4,), 10.0, dtype=torch.float64), 0.5 / (1 - 0.5 * times)])
    exact[0, 0], exact[1, 3] = 1.0, 10.0
    torch.testing.assert_close(solution.ys[..., 0], exact.T, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(found.ts.sum(), y0)
    torch.testing.assert_close(gradient, -1 / start**2, rtol=1e-4, atol=0)


def test_a_sample_that_met_its_event_has_no_say_in_the_steps() -> None:
    """Stiff as the first sample is, its decay would hold the steps down long after its event."""
    rates = torch.tensor([[2000.0], [1.0]], dtype=torch.float64)

    def steps(rates: torch.Tensor) -> int:
        y0 = torch.ones_like(rates)
        return solve(
            lambda t, y: -rates * y, y0, [0.0, 20.0], events=lambda t, y: y[:, 0] - 1e-8, **TIGHT
        ).stats.accepted

    assert steps(rates) < steps(rates[:1]) + steps(rates[1:])


def test_the_tolerance_of_the_others_is_theirs_alone() -> None:
    """However many samples have met their event: an error shared out among them would be waved through."""
    y0 = torch.tensor([[1.0]] + [[0.11]] * 999, dtype=torch.float64)
    errors = [
        abs(float(solve(lambda t, y: -y, start, [0.0, 2.0], events=lambda t, y: y[:, 0] - 0.1).final[0]) - math.exp(-2))
        for start in (y0, y0[:1])
    ]
    assert errors[0] < 3 * errors[1]


@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_what_depends_on_a_sample_depends_on_its_event(method: str) -> None:
    """Sample 0 falls to 1 and stays there; sample 1 adds up what sample 0 is."""
    given: dict[str, Any] = {"rtol": 1e8, "atol": 1e8, "options": {"first_step": 0.11, "ifactor": 1.2}}

    def value(y0: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
        return solve(
            lambda t, y: torch.stack([-rate * y[0], y[0]]), y0, [0.0, 2.0], method=method,
            events=lambda t, y: torch.stack([y[0] - 1, 1 + 0 * y[1]]), **given,
        ).final[1]  # fmt: skip

    difference(value, [torch.tensor([3.0, 0.0], dtype=torch.float64), torch.tensor(1.1, dtype=torch.float64)])
