"""Events that count in one direction of crossing only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from neuralode.errors import UsageError
from neuralode.ode import solve
from tests.ode.test_events import BY_SAMPLE, SPAN, ball, ground

SMALL: dict[str, Any] = {"method": "rk4", "step_size": 0.1}
"""Steps so small that no two crossings fall into one, and that are exact for balls."""


def counting(event: Callable[..., torch.Tensor], direction: Any) -> Callable[..., torch.Tensor]:
    """The event with a direction; a new function, for others use the old one."""

    def directed(t: torch.Tensor, y: torch.Tensor, *args: Any) -> torch.Tensor:
        return event(t, y, *args)

    directed.direction = direction  # type: ignore[attr-defined]
    return directed


def below_ground() -> torch.Tensor:
    """Balls that pass the ground on their way up, and again on their way down; the last one never."""
    return torch.tensor([[-0.75, 2.0], [-0.2, 1.8], [-2.0, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("direction", [-1, -0.5, 0, 1, 7])
@pytest.mark.parametrize("per_sample", BY_SAMPLE)
def test_only_crossings_in_the_direction_count(per_sample: bool, direction: float, back: bool) -> None:
    """h + vt - t² is zero at (v ± √(v² + 4h)) / 2. Backwards in time what was falling rises."""
    y0 = below_ground()
    if back:
        y0[:, 1] *= -1
    y0.requires_grad_()
    span = [0.0, -3.0] if back else SPAN
    found = solve(ball, y0, span, events=counting(ground, direction), per_sample=per_sample, **SMALL).events
    assert found is not None
    assert found.happened.tolist() == [True, True, False]
    height, speed = y0[:2].unbind(-1)
    way = -1.0 if back else 1.0
    apart = (speed**2 + 4 * height).sqrt()
    times = (speed + way * (apart if direction < 0 else -apart)) / 2
    torch.testing.assert_close(found.ts[:2], times, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.ys[:2, 1], speed - 2 * times, rtol=0, atol=1e-10)
    weights = torch.tensor([1.0, -0.7], dtype=torch.float64)
    for ours, closed in ((found.ts[:2], times), (found.ys[:2, 1], speed - 2 * times)):
        got, wanted = (torch.autograd.grad((weights * x).sum(), y0, retain_graph=True)[0] for x in (ours, closed))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("per_sample", BY_SAMPLE)
def test_each_of_several_events_has_a_direction_of_its_own(per_sample: bool) -> None:
    """The apex comes before the impact, and passing the ground upwards is none; the last ball has no apex."""

    def climb(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y[:, 1]

    y0 = torch.cat([below_ground(), torch.tensor([[0.25, -1.0]], dtype=torch.float64)])
    events = [counting(ground, -1), counting(climb, -1)]
    found = solve(ball, y0, SPAN, events=events, per_sample=per_sample, **SMALL).events
    assert found is not None
    assert found.index.tolist() == [1, 1, 1, 0]
    wanted = torch.tensor([1.0, 0.9, 1.0, (2**0.5 - 1) / 2], dtype=torch.float64)
    torch.testing.assert_close(found.ts, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("direction", [-1, 1])
def test_scalars_and_bools_have_directions_too(direction: int) -> None:
    y0 = below_ground()[:1]
    for event in (lambda t, y: y[:, 0].sum(), lambda t, y: y[:, 0] > 0):
        found = solve(ball, y0, SPAN, events=counting(event, direction), **SMALL).events
        assert found is not None
        assert float(found.ts) == pytest.approx(0.5 if direction > 0 else 1.5, abs=1e-10)


def test_a_direction_is_a_number() -> None:
    with pytest.raises(UsageError, match=r"an event has the direction 'up'; give a number"):
        solve(ball, below_ground(), SPAN, events=counting(ground, "up"))
