"""Terminal events: when, where and which, for each sample."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from neuralode.errors import UsageError
from neuralode.ode import solve
from neuralode.ode.methods import METHODS, takes_fixed_steps

METHOD_NAMES = ["dopri5", "tsit5", "rk4", "bosh3", "esdirk4", "dop853", "dopri8", "euler"]
BY_SAMPLE = [False, True]
TIGHT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
HEIGHTS = torch.tensor([4.0, 0.25, 1.0], dtype=torch.float64)
SPAN = [0.0, 3.0]


def ball(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A height of h - t² after a start at rest."""
    return torch.stack([y[:, 1], torch.full_like(y[:, 0], -2.0)], -1)


def thrown(t: torch.Tensor, y: torch.Tensor, gravity: torch.Tensor) -> torch.Tensor:
    return torch.stack([y[:, 1], -gravity.expand(len(y))], -1)


def ground(t: torch.Tensor, y: torch.Tensor, *args: Any) -> torch.Tensor:
    return y[:, 0]


def at_rest(heights: torch.Tensor = HEIGHTS) -> torch.Tensor:
    return torch.stack([heights, torch.zeros_like(heights)], -1)


def settings(method: str) -> dict[str, Any]:
    return {"method": method, **({"step_size": 0.13} if takes_fixed_steps(method) else {"rtol": 1e-7, "atol": 1e-7})}


@pytest.mark.parametrize("per_sample", BY_SAMPLE)
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_ball_falls_until_it_meets_the_ground(method: str, per_sample: bool) -> None:
    given = {**settings(method), **({"step_size": 1e-3} if method == "euler" else {})}
    solution = solve(ball, at_rest(), SPAN, events=ground, per_sample=per_sample, **given)
    found, times = solution.events, HEIGHTS.sqrt()
    tolerance = 2e-3 if method == "euler" else 1e-6
    torch.testing.assert_close(found.ts, times, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.ys, torch.stack([0 * times, -2 * times], -1), rtol=0, atol=2 * tolerance)
    torch.testing.assert_close(found.ys[:, 0], 0 * times, rtol=0, atol=1e-12)
    assert found.happened.tolist() == [True] * 3
    assert found.index.tolist() == [0] * 3
    torch.testing.assert_close(solution.final, found.ys, rtol=0, atol=0)


@pytest.mark.parametrize("per_sample", BY_SAMPLE)
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_time_runs_backwards_too(method: str, per_sample: bool) -> None:
    found = solve(ball, at_rest(), [0.0, -3.0], events=ground, per_sample=per_sample, **settings(method)).events
    torch.testing.assert_close(found.ts, -HEIGHTS.sqrt(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.ys[:, 1], 2 * HEIGHTS.sqrt(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("per_sample", BY_SAMPLE)
def test_states_stay_where_the_event_was(per_sample: bool) -> None:
    times = torch.tensor([0.0, 0.3, 0.6, 0.9, 1.2, 2.5, 3.0], dtype=torch.float64)
    solution = solve(ball, at_rest(), times, events=ground, per_sample=per_sample, **TIGHT)
    stopped = torch.minimum(times[:, None], HEIGHTS.sqrt())
    exact = torch.stack([HEIGHTS - stopped**2, -2 * stopped], -1)
    torch.testing.assert_close(solution.ys, exact, rtol=0, atol=1e-7)
    assert torch.equal(solution.ys[3:, 1], solution.ys[2, 1].expand(4, -1))


def test_each_sample_has_times_of_its_own() -> None:
    spans = torch.tensor([[0.0, 1.0, 4.0], [2.0, 2.2, 4.0], [1.0, 0.5, -3.0]], dtype=torch.float64)
    solution = solve(ball, at_rest(), spans, events=ground, **TIGHT)
    ways = torch.tensor([1.0, 1.0, -1.0]) * HEIGHTS.sqrt()
    torch.testing.assert_close(solution.events.ts, spans[:, 0] + ways, rtol=0, atol=1e-7)
    passed = spans[:, 1] - spans[:, 0]
    torch.testing.assert_close(solution.ys[1], torch.stack([HEIGHTS - passed**2, -2 * passed], -1), rtol=0, atol=1e-7)
    torch.testing.assert_close(solution.final, torch.stack([0 * ways, -2 * ways], -1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("per_sample", BY_SAMPLE)
def test_where_nothing_happens_the_solve_goes_to_its_end(per_sample: bool) -> None:
    plain = solve(ball, at_rest(), [0.0, 0.7, 1.5], per_sample=per_sample, **TIGHT)
    solution = solve(ball, at_rest(), [0.0, 0.7, 1.5], events=ground, per_sample=per_sample, **TIGHT)
    found = solution.events
    assert found.happened.tolist() == [False, True, True]
    assert found.index.tolist() == [-1, 0, 0]
    assert float(found.ts[0]) == 1.5
    torch.testing.assert_close(found.ys[0], plain.final[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(solution.ys[:, 0], plain.ys[:, 0], rtol=1e-9, atol=1e-12)
    never = solve(ball, at_rest(), [0.0, 0.4], events=ground, per_sample=per_sample).events
    assert not never.happened.any()
    assert never.ts.tolist() == pytest.approx([0.4] * 3)


@pytest.mark.parametrize("per_sample", BY_SAMPLE)
def test_the_solve_ends_with_the_last_event(per_sample: bool) -> None:
    nfe = [
        solve(ball, at_rest(), [0.0, 100.0], events=events, per_sample=per_sample, options={"ifactor": 1.5}).stats.nfe
        for events in (ground, None)
    ]
    assert nfe[0] < nfe[1]


def test_a_sample_takes_no_steps_after_its_event() -> None:
    y0 = at_rest(torch.tensor([0.01, 100.0], dtype=torch.float64))
    options = {"first_step": 0.05, "ifactor": 1.01}
    stats = solve(ball, y0, [0.0, 20.0], events=ground, per_sample=True, options=options).stats
    few, many = stats.accepted_per_sample.tolist()
    assert few <= 4
    assert many > 50


def test_no_events_asked_for_none_given() -> None:
    assert solve(ball, at_rest(), SPAN).events is None


@pytest.mark.parametrize("per_sample", BY_SAMPLE)
def test_the_first_of_several_events_counts(per_sample: bool) -> None:
    """Small steps, so that no two events fall into one."""

    def fast(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y[:, 1] + 1.5  # from t = 0.75 on

    found = solve(
        ball, at_rest(), SPAN, events=[ground, fast], per_sample=per_sample, method="rk4", step_size=0.1
    ).events
    assert found.index.tolist() == [1, 0, 1]
    torch.testing.assert_close(found.ts, torch.tensor([0.75, 0.5, 0.75], dtype=torch.float64), rtol=0, atol=1e-10)
    swapped = solve(
        ball, at_rest(), SPAN, events=(fast, ground), per_sample=per_sample, method="rk4", step_size=0.1
    ).events
    assert swapped.index.tolist() == [0, 1, 0]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("per_sample", BY_SAMPLE)
def test_the_earlier_of_two_events_in_one_step_counts(per_sample: bool, order: int) -> None:
    """However they are listed, and however large the step."""

    def fast(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y[:, 1] + 1.5  # from t = 0.75 on

    found = solve(
        ball, at_rest(), SPAN, events=[ground, fast][::order], per_sample=per_sample, method="rk4", step_size=3.0
    ).events
    torch.testing.assert_close(found.ts, torch.tensor([0.75, 0.5, 0.75], dtype=torch.float64), rtol=0, atol=1e-10)
    assert found.index.tolist() == ([1, 0, 1] if order == 1 else [0, 1, 0])


@pytest.mark.parametrize("method", ["dopri5", "rk4", "rkc2"])
def test_a_scalar_is_an_event_of_the_whole_state(method: str) -> None:
    times = torch.tensor([0.0, 0.2, 1.0, 3.0], dtype=torch.float64)
    solution = solve(ball, at_rest(), times, events=lambda t, y: y[:, 0].sum() - 3.0, **settings(method))
    found, time = solution.events, 0.75**0.5  # 5.25 - 3t² = 3
    tolerance = 1e-4 if method == "rkc2" else 1e-6
    assert found.ts.shape == found.happened.shape == found.index.shape == ()
    assert float(found.ts) == pytest.approx(time, abs=tolerance)
    assert bool(found.happened)
    assert int(found.index) == 0
    state = torch.stack([HEIGHTS - 0.75, torch.full_like(HEIGHTS, -2 * time)], -1)
    torch.testing.assert_close(found.ys, state, rtol=0, atol=4 * tolerance)
    torch.testing.assert_close(solution.ys[2:], found.ys.expand(2, -1, -1), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(), (2,), (2, 2, 3)], ids=str)
def test_the_whole_state_may_have_any_shape(shape: tuple[int, ...]) -> None:
    y0 = torch.full(shape, 2.0, dtype=torch.float64)
    found = solve(lambda t, y: -y, y0, SPAN, events=lambda t, y: y.mean() - 0.5, **TIGHT).events
    assert float(found.ts) == pytest.approx(math.log(4), abs=1e-6)
    torch.testing.assert_close(found.ys, torch.full(shape, 0.5, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("per_sample", BY_SAMPLE)
def test_a_row_of_numbers_has_an_event_each(per_sample: bool) -> None:
    y0 = torch.tensor([2.0, 4.0, 0.4], dtype=torch.float64)
    found = solve(lambda t, y: -y, y0, SPAN, events=lambda t, y: y - 1.0, per_sample=per_sample, **TIGHT).events
    assert found.happened.tolist() == [True, True, False]
    torch.testing.assert_close(found.ts[:2], y0[:2].log(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("per_sample", BY_SAMPLE)
def test_an_event_at_the_start_waits_for_the_next_change_of_sign(per_sample: bool) -> None:
    """Balls thrown up from the ground, at 2t - t² and 3t - t²: only their return counts."""
    y0 = torch.tensor([[0.0, 2.0], [0.0, 2.6]], dtype=torch.float64)
    found = solve(ball, y0, SPAN, events=ground, per_sample=per_sample, **TIGHT).events
    torch.testing.assert_close(found.ts, torch.tensor([2.0, 2.6], dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("per_sample", BY_SAMPLE)
def test_rising_and_falling_signs_both_count(per_sample: bool) -> None:
    y0 = torch.tensor([[-0.75, 2.0], [0.75, 0.0]], dtype=torch.float64)
    found = solve(ball, y0, SPAN, events=ground, per_sample=per_sample, method="rk4", step_size=0.1).events
    torch.testing.assert_close(found.ts, torch.tensor([0.5, 0.75**0.5], dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("per_sample", BY_SAMPLE)
def test_events_see_one_shape_of_time_and_the_arguments(per_sample: bool) -> None:
    seen: set[tuple[int, ...]] = set()
    gravity = torch.tensor(2.0, dtype=torch.float64)

    def event(t: torch.Tensor, y: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        seen.add(tuple(t.shape))
        assert g is gravity
        return (y + 0 * t)[:, 0]

    solve(thrown, at_rest(), SPAN, args=(gravity,), events=event, per_sample=per_sample)
    assert seen == {(3, 1)}


@pytest.mark.parametrize("per_sample", BY_SAMPLE)
def test_tuple_states(per_sample: bool) -> None:
    height = HEIGHTS[:, None].clone().requires_grad_()
    start = (height, torch.zeros(3, 1, dtype=torch.float64), torch.ones(3, 2, 2, dtype=torch.float64))
    times = torch.tensor([0.0, 0.8, 3.0], dtype=torch.float64)
    solution = solve(
        lambda t, y: (y[1], torch.full_like(y[1], -2.0), -y[2]), start, times,
        events=lambda t, y: y[0].squeeze(1), per_sample=per_sample, **TIGHT,
    )  # fmt: skip
    found, landed = solution.events, HEIGHTS.sqrt()
    torch.testing.assert_close(found.ts, landed, rtol=0, atol=1e-7)
    torch.testing.assert_close(found.ys[1], -2 * landed[:, None], rtol=0, atol=1e-6)
    decayed = (-landed).exp()[:, None, None].expand(3, 2, 2)
    torch.testing.assert_close(found.ys[2], decayed, rtol=0, atol=1e-6)
    assert [tuple(part.shape) for part in solution.ys] == [(3, 3, 1), (3, 3, 1), (3, 3, 2, 2)]
    torch.testing.assert_close(solution.final[2], decayed, rtol=0, atol=1e-6)
    torch.testing.assert_close(solution.ys[1][1, :, 0], -2 * landed.clamp(max=0.8), rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(found.ts.sum(), height)
    torch.testing.assert_close(gradient[:, 0], 0.5 / landed, rtol=0, atol=1e-6)


def test_tuple_states_without_samples_have_events_of_the_whole() -> None:
    start = (torch.tensor([1.0, 2.0], dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    found = solve(lambda t, y: (-y[0], y[1]), start, SPAN, events=lambda t, y: y[1].sum() - 6.0, **TIGHT).events
    assert float(found.ts) == pytest.approx(math.log(2), abs=1e-6)
    torch.testing.assert_close(found.ys[0], start[0] / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("per_sample", BY_SAMPLE)
def test_single_precision(per_sample: bool) -> None:
    found = solve(ball, at_rest(HEIGHTS.float()), SPAN, events=ground, per_sample=per_sample).events
    assert found.ts.dtype == found.ys.dtype == torch.float32
    torch.testing.assert_close(found.ts, HEIGHTS.sqrt().float(), rtol=0, atol=1e-5)


def test_dense_output_holds_the_event() -> None:
    solution = solve(ball, at_rest(), SPAN, events=ground, per_sample=True, dense=True, **TIGHT)
    torch.testing.assert_close(solution.dense(solution.events.ts.detach()), solution.events.ys, rtol=0, atol=1e-9)


def test_the_field_need_not_exist_beyond_an_event() -> None:
    """√(y₀² - t) ends where the field does; with steps of its own a sample is left in peace after its event."""

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return -0.5 / y

    y0 = torch.tensor([[1.0], [2.0]], dtype=torch.float64, requires_grad=True)
    found = solve(field, y0, [0.0, 5.0], events=lambda t, y: y[:, 0] - 0.1, per_sample=True, **TIGHT).events
    torch.testing.assert_close(found.ts, (y0**2 - 0.01)[:, 0], rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(found.ts.sum(), y0)
    torch.testing.assert_close(gradient, 2 * y0, rtol=0, atol=1e-4)


FLAT = {
    "detached": lambda t, y: y.detach() - 1,
    "bool": lambda t, y: y > 1,
    "integer": lambda t, y: (y < 1).long() - (y > 1).long(),
    "sign": lambda t, y: (y - 1).sign(),
    "jump": lambda t, y: torch.where(y < 1, 1.0, -1.0),
}


@pytest.mark.parametrize("per_sample", BY_SAMPLE)
@pytest.mark.parametrize("name", FLAT)
def test_an_event_without_a_gradient_has_its_time(name: str, per_sample: bool) -> None:
    y0 = torch.tensor([2.0, 4.0, 0.4], dtype=torch.float64, requires_grad=True)
    found = solve(lambda t, y: -y, y0, SPAN, events=FLAT[name], per_sample=per_sample, **TIGHT).events
    times = y0.detach()[:2].log()
    assert found.happened.tolist() == [True, True, False]
    torch.testing.assert_close(found.ts[:2], times, rtol=0, atol=1e-7)
    assert not found.ts.requires_grad or torch.autograd.grad(found.ts.sum(), y0, retain_graph=True)[0].eq(0).all()
    (gradient,) = torch.autograd.grad(found.ys[:2].sum(), y0)  # at a time that is a constant
    torch.testing.assert_close(gradient[:2], (-times).exp(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"checkpoint": "always"}, "a solve with events keeps its graphs"),
        ({"checkpoint": 3}, "a solve with events keeps its graphs"),
        ({"gradient": "adjoint"}, "the adjoint does not pass through events"),
        ({"engine": "torchdiffeq"}, "no events"),
        ({"method": "implicit_adams", "step_size": 0.1}, "no events"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_a_sentence(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        solve(ball, at_rest(), SPAN, events=ground, **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("per_sample", BY_SAMPLE)
@pytest.mark.parametrize(
    "events",
    [
        lambda t, y: y,
        lambda t, y: y[:2, 0],
        lambda t, y: 1.0,
        lambda t, y: None,
        lambda t, y: y[:, 0] + 0j,
        [ground, lambda t, y: y],
        [ground, lambda t, y: y.sum()],
        [ground, lambda t, y: 1.0],
        [lambda t, y: y.sum(), ground],
    ],
    ids=[
        "matrix",
        "too few",
        "float",
        "none",
        "complex",
        "then matrix",
        "then scalar",
        "then float",
        "scalar then rows",
    ],
)
def test_events_of_a_wrong_shape_are_refused(events: Any, per_sample: bool) -> None:
    with pytest.raises(UsageError, match=r"one real number a sample, \(3,\)|a scalar"):
        solve(ball, at_rest(), SPAN, events=events, per_sample=per_sample)


def test_an_event_of_the_whole_does_not_go_with_steps_of_each_sample() -> None:
    with pytest.raises(UsageError, match=r"per_sample|each sample|one real number a sample"):
        solve(ball, at_rest(), SPAN, events=lambda t, y: y[:, 0].sum(), per_sample=True)


def test_an_empty_list_of_events_is_refused() -> None:
    with pytest.raises(UsageError, match="event"):
        solve(ball, at_rest(), SPAN, events=[])


def test_methods_here_exist() -> None:
    assert set(METHOD_NAMES) <= set(METHODS)


def test_a_batch_in_which_nothing_happens_has_gradients_of_zero() -> None:
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    y0 = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    solution = solve(lambda t, y: -rate * y, y0, [0.0, 1.0], events=lambda t, y: y[:, 0] - 0.5)
    assert solution.events is not None
    assert not solution.events.happened.any()
    (gradient,) = torch.autograd.grad(solution.events.ts.sum(), rate)
    assert gradient == 0


@pytest.mark.parametrize("per_sample", [False, True])
def test_an_event_that_is_nan_is_named(per_sample: bool) -> None:
    y0 = torch.tensor([[9.0], [2.0]])
    with pytest.raises(UsageError, match="event of sample 1 is NaN at t = "):
        solve(lambda t, y: -y, y0, [0.0, 1.0], events=lambda t, y: (y[:, 0] - 1.5).log(), per_sample=per_sample)


def test_an_event_is_a_function() -> None:
    with pytest.raises(UsageError, match=r"events holds 3; an event is a function"):
        solve(lambda t, y: -y, torch.ones(2, 1), [0.0, 1.0], events=[3])


@pytest.mark.parametrize("per_sample", [False, True])
def test_dense_output_after_an_event_is_its_state(per_sample: bool) -> None:
    y0 = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)
    solution = solve(lambda t, y: -y, y0, [0.0, 2.0], events=lambda t, y: y[:, 0] - 1.5, dense=True,
                     per_sample=per_sample, rtol=1e-9, atol=1e-9)  # fmt: skip
    assert solution.dense is not None
    found = solution.events
    assert found is not None
    soon_after = float(found.ts[1].detach()) + 1e-3  # within the same step
    for time in (soon_after, 1.9):
        wanted = torch.maximum(y0 * math.exp(-time), torch.tensor([[0.0], [1.5], [1.5]]))
        torch.testing.assert_close(solution.dense(time), wanted, rtol=1e-6, atol=0)
    for outside in (-0.5, 2.5):
        with pytest.raises(UsageError, match="outside the solve"):
            solution.dense(outside)


@pytest.mark.parametrize("per_sample", [False, True])
def test_dense_output_goes_to_the_end_where_events_stop_all_before(per_sample: bool) -> None:
    y0 = torch.tensor([[2.0], [4.0]], dtype=torch.float64)
    solution = solve(lambda t, y: -y, y0, [0.0, 20.0], events=lambda t, y: y[:, 0] - 1.5, dense=True,
                     per_sample=per_sample, rtol=1e-9, atol=1e-9)  # fmt: skip
    assert solution.dense is not None
    torch.testing.assert_close(solution.dense(19.0), torch.full_like(y0, 1.5), rtol=1e-6, atol=0)
