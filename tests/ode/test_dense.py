"""`solve(..., dense=True).dense` is the solution as a function of time, and has the solution's gradients."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
import torch
from torch import nn

from neuralode.errors import UsageError
from neuralode.ode import solve
from neuralode.ode.methods import METHODS, takes_fixed_steps
from tests.problems import PROBLEMS

METHOD_NAMES = sorted(METHODS)
PROBLEM = PROBLEMS[0]
TIGHT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
ACCURACY = {"euler": 2e-2, "fehlberg2": 1e-2, "rkc2": 1e-2}
ROUNDING = {"rtol": 1e-12, "atol": 1e-13}


def settings(method: str) -> dict[str, Any]:
    if takes_fixed_steps(method):
        return {"method": method, "step_size": 0.004 if method == "euler" else 0.02}
    loose = 1e-5 if METHODS[method].order < 4 else 1e-8
    return {"method": method, "rtol": loose, "atol": loose}


def leaf(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def decay(t: torch.Tensor, y: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    return -rate * y


@pytest.mark.parametrize("span", [(0.0, 3.0), (3.0, 0.0)], ids=str)
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_it_is_the_solution_between_the_steps(method: str, span: tuple[float, float]) -> None:
    y0 = PROBLEM.exact(torch.tensor(span[:1], dtype=torch.float64))[0]
    solution = solve(PROBLEM.field, y0, span, dense=True, **settings(method))
    times = torch.linspace(*span, 23, dtype=torch.float64)
    torch.testing.assert_close(solution.dense(times), PROBLEM.exact(times), rtol=0, atol=ACCURACY.get(method, 2e-3))


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_its_ends_are_the_states(method: str) -> None:
    solution = solve(PROBLEM.field, PROBLEM.y0, PROBLEM.times(), dense=True, **settings(method))
    torch.testing.assert_close(solution.dense(0.0), PROBLEM.y0, rtol=0, atol=0)
    torch.testing.assert_close(solution.dense(3.0), solution.final, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("method", [name for name in METHOD_NAMES if METHODS[name].interpolates])
def test_it_passes_through_the_output_states(method: str) -> None:
    times = torch.tensor([0.0, 0.71, 0.72, 1.9, 3.0], dtype=torch.float64)
    solution = solve(PROBLEM.field, PROBLEM.y0, times, dense=True, **settings(method))
    torch.testing.assert_close(solution.dense(times), solution.ys, **ROUNDING)


@pytest.mark.parametrize("method", [name for name in METHOD_NAMES if not METHODS[name].interpolates])
def test_steps_that_end_at_the_outputs_agree_with_it_there(method: str) -> None:
    times = torch.tensor([0.0, 0.71, 0.72, 1.9, 3.0], dtype=torch.float64)
    solution = solve(PROBLEM.field, PROBLEM.y0, times, dense=True, **settings(method))
    if takes_fixed_steps(method):  # whose outputs lie within the steps
        torch.testing.assert_close(solution.dense(times), solution.ys, rtol=0, atol=1e-6)
    else:
        torch.testing.assert_close(solution.dense(times), solution.ys, **ROUNDING)


def test_times_may_be_numbers_scalars_or_a_row() -> None:
    at = solve(PROBLEM.field, PROBLEM.y0, PROBLEM.times(), dense=True, **TIGHT).dense
    number = at(1.25)
    assert number.shape == PROBLEM.y0.shape
    assert number.dtype == torch.float64
    torch.testing.assert_close(at(torch.tensor(1.25, dtype=torch.float64)), number, **ROUNDING)
    row = at(torch.tensor([2.5, 1.25, 1.25], dtype=torch.float64))  # in any order, and more than once
    assert row.shape == (3, *PROBLEM.y0.shape)
    torch.testing.assert_close(row[1], number, **ROUNDING)
    torch.testing.assert_close(row[0], at(2.5), **ROUNDING)
    torch.testing.assert_close(row[2], row[1])
    torch.testing.assert_close(at([2.5, 1.25, 1.25]), row, **ROUNDING)


@pytest.mark.parametrize("t", [torch.ones(2, 3), torch.tensor([]), [], [[0.1, 0.2]], None, "a"], ids=repr)
@pytest.mark.parametrize("per_sample", [False, True])
def test_times_of_other_shapes_are_refused_in_a_sentence(t: Any, per_sample: bool) -> None:
    at = solve(lambda t, y: -y, torch.ones(3, 2), [0.0, 1.0], dense=True, per_sample=per_sample).dense
    assert at is not None
    shape = re.escape(str(tuple(t.shape))) if isinstance(t, torch.Tensor) else "t is"
    with pytest.raises(UsageError, match=rf"{shape}.*; .*of shape \[{3 if per_sample else 'T'}\]\.$"):
        at(t)


def test_samples_with_times_of_their_own_take_one_each() -> None:
    at = solve(lambda t, y: -y, torch.ones(3, 2), torch.tensor([[0.0, 1.0]] * 3), dense=True).dense
    assert at is not None
    assert at([0.1, 0.2, 0.3]).shape == (3, 2)
    with pytest.raises(UsageError, match=r"\(3, 2\).*a time for each of them, of shape \[3\]"):
        at(torch.rand(3, 2))


def test_it_says_over_what_it_is_known() -> None:
    solution = solve(lambda t, y: -y, torch.ones(3), [0.5, 2.0], dense=True)
    assert repr(solution.dense) == f"DenseOutput(t from 0.5 to 2, {solution.stats.accepted} steps)"
    rows = solve(lambda t, y: -y, torch.ones(3, 2), [0.5, 2.0], dense=True, per_sample=True)
    assert "3 samples" in repr(rows.dense)


def test_it_is_there_only_when_asked_for() -> None:
    assert solve(PROBLEM.field, PROBLEM.y0, PROBLEM.times()).dense is None


def test_asking_for_it_changes_nothing_else() -> None:
    times = PROBLEM.times(5)
    plain, dense = (solve(PROBLEM.field, PROBLEM.y0, times, dense=dense) for dense in (False, True))
    torch.testing.assert_close(dense.ys, plain.ys, rtol=0, atol=1e-14)  # two engines may have done it
    assert dense.stats.step_sizes == pytest.approx(plain.stats.step_sizes, rel=1e-9)
    assert dense.stats.nfe == plain.stats.nfe, "dopri5's interpolant is free"


@pytest.mark.parametrize("span", [(0.0, 3.0), (3.0, 0.0)], ids=str)
@pytest.mark.parametrize("time", [-0.01, 3.01, float("nan")])
def test_times_outside_the_solve_are_refused(time: float, span: tuple[float, float]) -> None:
    at = solve(PROBLEM.field, PROBLEM.y0, span, dense=True).dense
    sentence = r"^t = .* lies outside the solve, which went from [03] to [03]\.$"
    for given in (time, torch.tensor(time), torch.tensor([1.0, time])):
        with pytest.raises(UsageError, match=sentence):
            at(given)


@pytest.mark.parametrize("checkpoint", ["auto", "never"])
@pytest.mark.parametrize("method", ["dopri5", "dop853", "rk4", "bosh3", "esdirk4"])
def test_gradients_are_those_of_the_closed_form(method: str, checkpoint: str) -> None:
    """y = y0 exp(-rate t), from t0 on."""
    y0, rate, begin, time = leaf(1.3, -0.4), leaf(0.7, 1.1), leaf(0.2, 2.0), leaf(1.1, 0.9)
    steps: dict[str, Any] = {"step_size": 0.02} if method == "rk4" else {"rtol": 1e-8, "atol": 1e-8}
    ys = solve(
        decay, y0, begin, args=(rate,), method=method, dense=True, checkpoint=checkpoint, **steps
    ).dense(time)  # fmt: skip
    exact = y0 * (-rate * (time[:, None] - begin[0])).exp()
    torch.testing.assert_close(ys, exact, rtol=0, atol=1e-6)
    weights = torch.tensor([[1.0, 2.0], [-1.5, 0.4]], dtype=torch.float64)
    ours = torch.autograd.grad((weights * ys).sum(), (y0, rate, begin, time))
    wanted = torch.autograd.grad((weights * exact).sum(), (y0, rate, begin, time))
    for gradient, closed in zip(ours, wanted, strict=True):
        torch.testing.assert_close(gradient, closed, rtol=0, atol=2e-5)


def test_gradient_to_the_time_is_the_slope() -> None:
    time = leaf(0.3, 1.7, 2.6)
    ys = solve(PROBLEM.field, PROBLEM.y0, PROBLEM.times(), dense=True, **TIGHT).dense(time)
    (gradient,) = torch.autograd.grad(ys.sum(), time)
    slopes = torch.stack([PROBLEM.field(t, y).sum() for t, y in zip(time.detach(), ys.detach(), strict=True)])
    torch.testing.assert_close(gradient, slopes, rtol=0, atol=1e-5)


@pytest.mark.parametrize("per_sample", [False, True])
def test_gradients_are_those_of_finite_differences_to_parameters_of_a_module(per_sample: bool) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    y0 = torch.tensor([[0.3, -0.2], [0.5, 0.8]], dtype=torch.float64)

    def read() -> torch.Tensor:
        at = solve(lambda t, y: module(y), y0, [0.0, 1.0], dense=True, per_sample=per_sample, **TIGHT).dense
        return at(0.37).square().sum()

    gradients = torch.autograd.grad(read(), list(module.parameters()))
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        with torch.no_grad():
            direction = torch.ones_like(parameter)
            parameter += 1e-5 * direction
            above = float(read())
            parameter -= 2e-5 * direction
            below = float(read())
            parameter += 1e-5 * direction
        assert float((gradient * direction).sum()) == pytest.approx((above - below) / 2e-5, abs=1e-6)


def closed_gradients(**policy: Any) -> None:
    """Compares the gradients through dense output between the steps with those of y0 exp(-rate t)."""
    y0, rate = leaf(1.3, -0.4), leaf(0.7, 1.1)
    solution = solve(decay, y0, [0.0, 2.0], args=(rate,), dense=True, **policy, **TIGHT)
    ours = torch.autograd.grad(solution.dense(1.9).sum(), (y0, rate))
    wanted = torch.autograd.grad((y0 * (-1.9 * rate).exp()).sum(), (y0, rate))
    for gradient, closed in zip(ours, wanted, strict=True):
        torch.testing.assert_close(gradient, closed, rtol=0, atol=1e-6)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("budget", [1, 4000])
def test_gradients_do_not_depend_on_the_memory_budget(budget: int, per_sample: bool) -> None:
    closed_gradients(memory_budget=budget, per_sample=per_sample)


@pytest.mark.parametrize("checkpoint", ["always", 3])
def test_recomputed_steps_have_the_gradients_or_are_refused(checkpoint: str | int) -> None:
    with contextlib.suppress(UsageError):
        closed_gradients(checkpoint=checkpoint)


@pytest.mark.parametrize("per_sample", [False, True])
def test_tuple_states_come_back_as_tuples(per_sample: bool) -> None:
    start = (torch.tensor([[0.2], [0.9]]).double(), torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double())
    at = solve(
        lambda t, y: (y[0] * (1 - y[0]), -y[1]), start, [0.0, 2.0], dense=True, per_sample=per_sample, **TIGHT
    ).dense
    one, two = at(1.5)
    torch.testing.assert_close(one, PROBLEMS[2].exact(torch.tensor([1.5]).double())[0][:, :0].new_tensor(
        [[0.2 / (0.2 + 0.8 * 0.22313016014842982)], [0.9 / (0.9 + 0.1 * 0.22313016014842982)]]
    ), rtol=0, atol=1e-6)  # fmt: skip
    torch.testing.assert_close(two, start[1] * 0.22313016014842982, rtol=0, atol=1e-6)
    if not per_sample:
        one, two = at(torch.tensor([0.0, 1.5]).double())
        assert (one.shape, two.shape) == ((2, 2, 1), (2, 2, 2))
        torch.testing.assert_close(two[0], start[1])


def test_complex_states_have_it() -> None:
    at = solve(lambda t, y: 1j * y, torch.ones(2, dtype=torch.complex128), [0.0, 2.0], dense=True, **TIGHT).dense
    torch.testing.assert_close(
        at(1.3), torch.exp(torch.tensor(1.3j, dtype=torch.complex128)).expand(2), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("span", [(0.0, 3.0), (3.0, 0.0)], ids=str)
@pytest.mark.parametrize("method", [name for name in METHOD_NAMES if METHODS[name].by_sample])
def test_each_sample_reads_at_a_time_of_its_own(method: str, span: tuple[float, float]) -> None:
    y0 = PROBLEM.exact(torch.tensor(span[:1], dtype=torch.float64))[0]
    at = solve(PROBLEM.field, y0, span, dense=True, per_sample=True, **settings(method)).dense
    for times in ((0.4, 2.2), (span[0], span[1]), (1.0, 1.0)):
        each = torch.tensor(times, dtype=torch.float64)
        exact = PROBLEM.exact(each).diagonal().T
        torch.testing.assert_close(at(each), exact, rtol=0, atol=ACCURACY.get(method, 2e-3))
    exact = PROBLEM.exact(torch.tensor([1.7], dtype=torch.float64))[0]
    torch.testing.assert_close(at(1.7), exact, rtol=0, atol=ACCURACY.get(method, 2e-3))


@pytest.mark.parametrize("span", [((0.0, 3.0), (1.0, 1.5)), ((3.0, 0.0), (0.5, 2.0))], ids=str)
def test_each_sample_has_a_span_of_its_own(span: tuple[tuple[float, float], ...]) -> None:
    spans = torch.tensor(span, dtype=torch.float64)
    start, end = (PROBLEM.exact(spans[:, i]).diagonal().T for i in (0, 1))
    at = solve(PROBLEM.field, start, spans, dense=True, **TIGHT).dense
    torch.testing.assert_close(at(spans[:, 0]), start, **ROUNDING)
    torch.testing.assert_close(at(spans[:, 1]), end, rtol=0, atol=1e-7)
    middle = spans.mean(1)
    torch.testing.assert_close(at(middle), PROBLEM.exact(middle).diagonal().T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("time", [-0.1, 3.1, float("nan")])
def test_times_outside_the_solve_of_a_sample_are_refused(time: float) -> None:
    at = solve(PROBLEM.field, PROBLEM.y0, PROBLEM.times(), dense=True, per_sample=True).dense
    with pytest.raises(UsageError, match=r"^t = .* lies outside the solve of sample 1\.$"):
        at(torch.tensor([1.0, time], dtype=torch.float64))


def test_gradients_where_each_sample_has_steps_of_its_own() -> None:
    y0, rate, time = leaf(1.3, -0.4).detach()[:, None].requires_grad_(), leaf(0.7, 5.0), leaf(0.6, 1.7)
    begin = torch.tensor([[0.1, 2.0], [0.2, 1.9]], dtype=torch.float64, requires_grad=True)
    ys = solve(decay, y0, begin, args=(rate[:, None],), dense=True, **TIGHT).dense(time)
    exact = y0 * (-rate * (time - begin[:, 0])).exp()[:, None]
    torch.testing.assert_close(ys, exact, rtol=0, atol=1e-7)
    weights = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    ours = torch.autograd.grad((weights * ys).sum(), (y0, rate, begin, time))
    wanted = torch.autograd.grad((weights * exact).sum(), (y0, rate, begin, time))
    for gradient, closed in zip(ours, wanted, strict=True):
        torch.testing.assert_close(gradient, closed, rtol=0, atol=1e-5)


def test_torchdiffeq_has_none() -> None:
    with pytest.raises(UsageError, match="no dense output"):
        solve(PROBLEM.field, PROBLEM.y0, PROBLEM.times(), dense=True, engine="torchdiffeq")


def turning(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Turns by 50 a unit of time."""
    return torch.stack([50 * y[..., 1], -50 * y[..., 0]], -1)


@pytest.mark.parametrize("start", [0.0, 1000.0])
@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "dop853"])
def test_single_precision_is_as_good_as_double(method: str, per_sample: bool, moving: bool, start: float) -> None:
    """To the tolerance: late times have few digits in single precision, and so have the terms of a high order."""
    y0 = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    found = []
    for dtype in (torch.float64, torch.float32):
        times = (start + torch.arange(9, dtype=dtype) / 8).requires_grad_(moving)
        solution = solve(
            turning, y0.to(dtype), times, method=method, per_sample=per_sample, dense=True, rtol=1e-5, atol=1e-5
        )
        between = [solution.dense(start + 0.3), solution.dense(torch.tensor(start + 0.75, dtype=dtype))]
        found.append(torch.stack([*solution.ys, *between]).double())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=4e-5)


def test_a_number_is_as_exact_a_time_as_a_tensor() -> None:
    y0 = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    at = solve(lambda t, y: -y, y0, [0.0, 2.0], per_sample=True, dense=True, rtol=1e-11, atol=1e-11).dense
    torch.testing.assert_close(at(0.1), at(torch.tensor(0.1, dtype=torch.float64)), rtol=0, atol=0)
    torch.testing.assert_close(at([0.1, 0.2])[1], at(0.2)[1], rtol=0, atol=0)


@pytest.mark.parametrize("method", ["dopri5", "dop853", "esdirk4", "rkc2"])
def test_times_may_be_more_precise_than_the_state(method: str) -> None:
    times = leaf(0.0, 1.0, 2.5)
    y0 = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    solution = solve(lambda t, y: -y, y0, times, method=method, dense=True)
    assert solution.ys.dtype == solution.dense(times.detach()[1]).dtype == torch.float32
    (gradient,) = torch.autograd.grad(solution.final.sum(), times)
    torch.testing.assert_close(gradient[2].float(), -y0.sum() * torch.tensor(-2.5).exp(), rtol=2e-2, atol=0)
