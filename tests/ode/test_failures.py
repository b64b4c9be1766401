"""A solve that fails says how and where, or returns NaN states with a status."""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest
import torch

from neuralode.ode import SolveError, Status, solve


def decay(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -y


def explosion(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Reaches infinity at t = 1 from y = 1."""
    return y**2


def broken(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """NaN from the sample and the time on where y passes 1.5."""
    return torch.where(y > 1.5, torch.nan, y)


def damaged() -> torch.Tensor:
    y0 = torch.ones(4, 2)
    y0[2, 1] = torch.nan
    return y0


def failure(*args: Any, **kwargs: Any) -> SolveError:
    with pytest.raises(SolveError) as caught:
        solve(*args, **kwargs)
    return caught.value


def time_of(error: SolveError) -> float:
    return float(re.findall(r"at t = ([-\d.e]+):", str(error))[0])


def test_a_failure_goes_to_another_process() -> None:
    error = failure(explosion, torch.ones(3, 2), [0.0, 2.0])
    error.stats.error_estimate = 2 * torch.ones(3, requires_grad=True)  # in a graph, which cannot go along
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is SolveError
    assert (str(found), found.status) == (str(error), error.status)
    assert found.stats.nfe == error.stats.nfe
    torch.testing.assert_close(found.stats.error_estimate, error.stats.error_estimate.detach())


def test_programs_that_catch_assertions_catch_it() -> None:
    assert issubclass(SolveError, AssertionError)
    with pytest.raises(AssertionError):
        solve(decay, torch.ones(2), [0.0, 100.0], max_steps=2)


def test_too_many_steps() -> None:
    error = failure(decay, torch.ones(2), [0.0, 100.0], max_steps=3)
    assert error.status is Status.MAX_STEPS
    assert error.stats.accepted + error.stats.rejected == 3
    assert error.stats.nfe > 0
    for word in ("dopri5", "too many steps", "max_steps", f"{error.stats.step_sizes[-1]:.3g}"):
        assert word in str(error)


def test_enough_steps_are_enough() -> None:
    stats = solve(decay, torch.ones(2), [0.0, 1.0]).stats
    needed = stats.accepted + stats.rejected
    assert solve(decay, torch.ones(2), [0.0, 1.0], max_steps=needed).status is Status.SUCCESS
    assert failure(decay, torch.ones(2), [0.0, 1.0], max_steps=needed - 1).status is Status.MAX_STEPS


def test_max_steps_bounds_the_whole_solve() -> None:
    solution = solve(decay, torch.ones(2), torch.linspace(0, 10, 60), max_steps=8, throw=False)
    assert solution.stats.accepted + solution.stats.rejected <= 8


def test_step_size_underflow() -> None:
    error = failure(explosion, torch.ones(1), [0.0, 2.0])
    assert error.status is Status.STEP_UNDERFLOW
    assert time_of(error) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_nan_in_one_sample_is_named(method: str) -> None:
    error = failure(decay, damaged(), [0.0, 1.0], method=method, step_size=0.5 if method == "rk4" else None)
    assert re.search(r"not finite in sample 2[.;]", str(error))


def test_nan_state_has_the_status_non_finite() -> None:
    assert failure(decay, damaged(), [0.0, 1.0], method="rk4", step_size=0.5).status is Status.NON_FINITE


@pytest.mark.parametrize(
    ("field", "y0"), [(decay, damaged()), (broken, torch.tensor([[-1.0], [1.0]]))], ids=["state", "field"]
)
def test_nan_has_the_status_non_finite_with_error_control(field: Any, y0: torch.Tensor) -> None:
    assert failure(field, y0, [0.0, 1.0]).status is Status.NON_FINITE


def test_sample_that_breaks_on_the_way_is_named() -> None:
    assert "sample 1" in str(failure(broken, torch.tensor([[-1.0], [1.0]]), [0.0, 1.0]))


def test_overflow_with_fixed_steps() -> None:
    error = failure(explosion, torch.tensor([[-1.0], [1.0]]), [0.0, 4.0], method="euler", step_size=0.25)
    assert error.status is Status.NON_FINITE
    assert "not finite in sample 1;" in str(error)


def test_time_of_failure_in_a_reversed_solve() -> None:
    error = failure(decay, torch.ones(2), [0.0, -100.0], max_steps=2)
    assert time_of(error) == pytest.approx(-sum(error.stats.step_sizes), rel=1e-4)


def test_time_of_failure() -> None:
    error = failure(decay, torch.ones(2), [0.0, 100.0], max_steps=2)
    assert time_of(error) == pytest.approx(sum(error.stats.step_sizes), rel=1e-4)


@pytest.mark.parametrize("kwargs", [{"max_steps": 1}, {"gradient": "adjoint", "max_steps": 1}], ids=str)
def test_without_throw_states_are_nan(kwargs: dict[str, Any]) -> None:
    solution = solve(decay, torch.ones(3, 2), torch.linspace(0, 100, 4), throw=False, **kwargs)
    assert solution.status is Status.MAX_STEPS
    assert solution.ys.shape == (4, 3, 2)
    assert solution.ys.isnan().all()
    assert solution.stats.accepted + solution.stats.rejected == 1


def test_without_throw_every_part_of_a_tuple_is_nan() -> None:
    y0 = (torch.ones(3, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64))
    solution = solve(lambda t, y: (y[0], -y[1]), y0, [0.0, 50.0], max_steps=1, throw=False)
    assert [(part.shape, part.dtype) for part in solution.ys] == [((2, 3), torch.float64), ((2, 2, 1), torch.float64)]
    assert all(part.isnan().all() for part in solution.ys)


def test_errors_of_the_field_itself_get_through() -> None:
    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the field's own")

    for throw in (True, False):
        with pytest.raises(AssertionError, match="the field's own"):
            solve(field, torch.ones(1), [0.0, 1.0], throw=throw)


def test_a_sample_whose_field_ends_on_its_way_is_named() -> None:
    """Not finite below 0.5: sample 1 gets there at ln 2, by ever shorter steps."""

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.where(y < 0.5, torch.nan, -y)

    y0 = torch.tensor([[20.0], [1.0], [30.0]])
    with pytest.raises(SolveError, match="in sample 1: non-finite state") as caught:
        solve(field, y0, [0.0, 3.0], per_sample=True)
    assert caught.value.status is Status.NON_FINITE
    assert caught.value.stats.nfe < 2000


@pytest.mark.parametrize("shape", [(0, 2), (3, 0)], ids=str)
@pytest.mark.parametrize("how", [{}, {"engine": "stepper"}, {"per_sample": True}, {"gradient": "adjoint"}], ids=str)
def test_an_empty_state_fails_and_succeeds_as_others_do(how: dict[str, Any], shape: tuple[int, ...]) -> None:
    y0 = torch.zeros(shape, requires_grad=True)
    solution = solve(decay, y0, [0.0, 1.0], throw=False, max_steps=1, **how)
    assert solution.status is Status.MAX_STEPS
    assert solve(decay, y0, [0.0, 1.0], **how).ys.shape == (2, *shape)


@pytest.mark.parametrize("outputs", [2, 4])
@pytest.mark.parametrize("how", [{}, {"checkpoint": "always"}, {"method": "rk4", "step_size": 0.1}], ids=str)
def test_an_empty_batch_with_times_of_each_sample(how: dict[str, Any], outputs: int) -> None:
    y0 = torch.zeros(0, 2, requires_grad=True)
    ys = solve(decay, y0, torch.zeros(0, outputs), **how).ys
    assert ys.shape == (outputs, 0, 2)
    ys.sum().backward()
