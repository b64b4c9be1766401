"""What `solve` returns, and what it refuses."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from neuralode.errors import UsageError
from neuralode.ode import Solution, SolverConfig, Status, odeint, solve, solve_configured

Y0 = torch.tensor([1.0, 2.0])


def decay(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -y


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 2), (2, 3, 4, 4)], ids=str)
def test_states_have_the_shape_of_y0_at_every_time(shape: tuple[int, ...]) -> None:
    t = torch.linspace(0, 1, 4)
    solution = solve(decay, torch.ones(shape), t)
    assert isinstance(solution, Solution)
    assert solution.ys.shape == (4, *shape)
    torch.testing.assert_close(solution.ys[:, *[0] * len(shape)], torch.exp(-t), rtol=1e-3, atol=1e-4)
    assert torch.equal(solution.ts, t)
    assert torch.equal(solution.final, solution.ys[-1])
    assert solution.status is Status.SUCCESS


def test_tuple_state() -> None:
    position, velocity = torch.ones(2, 3), torch.zeros(2, 3)
    solution = solve(lambda t, y: (y[1], -y[0]), (position, velocity), torch.linspace(0, math.pi, 3), rtol=1e-6)
    assert [part.shape for part in solution.ys] == [(3, 2, 3)] * 2
    torch.testing.assert_close(solution.final[0], -position, rtol=0, atol=1e-3)
    torch.testing.assert_close(solution.ys[1][1], -position, rtol=0, atol=1e-3)


def test_parts_of_a_tuple_may_differ_in_shape() -> None:
    solution = solve(lambda t, y: (-y[0], y[0].sum().reshape(1)), (Y0, torch.zeros(1)), [0.0, 1.0])
    assert [part.shape for part in solution.final] == [(2,), (1,)]
    torch.testing.assert_close(solution.final[1], (Y0 - solution.final[0]).sum()[None], rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_type_of_the_state_is_kept(dtype: torch.dtype) -> None:
    assert solve(decay, Y0.to(dtype), [0, 1]).ys.dtype == dtype


@pytest.mark.parametrize("how", [{}, {"per_sample": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_times_of_a_state_in_half_precision(dtype: torch.dtype, how: dict[str, Any]) -> None:
    times = [i / 300 for i in range(301)]
    y0 = torch.ones(3, 2, dtype=dtype, requires_grad=True)
    solution = solve(decay, y0, times, rtol=0.1, atol=0.1, **how)
    assert solution.ys.dtype == dtype
    torch.testing.assert_close(solution.ts, torch.tensor(times))
    torch.testing.assert_close(solution.ys[:, 0, 0].float(), (-solution.ts).exp(), rtol=0, atol=0.05)
    (gradient,) = torch.autograd.grad(solution.final.sum(), y0)
    torch.testing.assert_close(gradient.float(), torch.full((3, 2), math.exp(-1)), rtol=0, atol=0.05)


def test_args_reach_the_field() -> None:
    final = solve(lambda t, y, a, b: a * y + b, Y0, [0.0, 1.0], args=(torch.tensor(0.0), 3.0)).final
    torch.testing.assert_close(final, Y0 + 3)


def test_time_is_a_scalar_tensor_that_runs_over_the_span() -> None:
    seen = []

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(t)
        return -y

    solve(field, Y0, [2.0, 3.0], method="rk4", step_size=0.25)
    assert all(t.shape == () for t in seen)
    assert {round(float(t), 6) for t in seen} >= {2.0, 2.25, 2.5, 2.75, 3.0}


def test_same_solve_twice_is_the_same_to_the_bit() -> None:
    one, other = (solve(decay, Y0, [0.0, 1.0]) for _ in range(2))
    assert torch.equal(one.ys, other.ys)
    assert one.stats.step_sizes == other.stats.step_sizes


def test_configured_solve_is_the_same() -> None:
    config = SolverConfig(method="heun3", step_size=0.1)
    one = solve_configured(decay, Y0, [0.0, 1.0], config)
    other = solve(decay, Y0, [0.0, 1.0], method="heun3", step_size=0.1)
    assert torch.equal(one.ys, other.ys)
    assert one.stats.method == "heun3"


def test_options_reach_the_method() -> None:
    steps = solve(decay, Y0, [0.0, 1.0], options={"first_step": 0.125}).stats.step_sizes
    assert steps[0] == 0.125


@pytest.mark.parametrize("times", [["a", 1], [[0.0, 1.0], [0.0]], None, "now"], ids=repr)
def test_times_that_are_no_numbers_are_refused(times: Any) -> None:
    with pytest.raises(UsageError, match=rf"t is {re.escape(repr(times))}; give the times as numbers"):
        solve(decay, Y0, times)


@pytest.mark.parametrize("times", [[0.0], [], 1.0])
def test_fewer_than_two_times_are_refused(times: Any) -> None:
    with pytest.raises(UsageError, match="at least two times"):
        solve(decay, Y0, torch.tensor(times))


@pytest.mark.parametrize("times", [[0.0, 2.0, 1.0], [0.0, 0.0], [0.0, math.nan], [0, 1]], ids=str)
def test_times_that_cannot_be_used_are_refused(times: list[float]) -> None:
    with pytest.raises(UsageError):
        solve(decay, Y0, torch.tensor(times))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"method": "dopr5"}, ["unknown method 'dopr5'", "did you mean 'dopri5'", "rk4"]),
        ({"gradient": "ajoint"}, ["unknown gradient 'ajoint'", "did you mean 'adjoint'"]),
        ({"engine": "torchdifeq"}, ["unknown engine", "did you mean 'torchdiffeq'"]),
        ({"method": "rk4"}, ["rk4", "step_size"]),
        ({"rtol": -1.0}, ["rtol", "-1.0"]),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_with_a_remedy(asked: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        solve(decay, Y0, [0.0, 1.0], **asked)
    for word in words:
        assert word in str(caught.value)


def test_integer_state_is_refused() -> None:
    with pytest.raises(UsageError, match=r"int64.*floating-point"):
        solve(decay, torch.tensor([1, 2]), [0.0, 1.0])


@pytest.mark.parametrize("gradient", ["exact", "adjoint"])
@pytest.mark.parametrize(
    ("field", "y0", "words"),
    [
        (lambda t, y: y[:1], torch.ones(2, 3), ["(1, 3)", "(2, 3)"]),
        (lambda t, y: y.sum(), torch.ones(2), ["()", "(2,)"]),
        (lambda t, y: y[0], (torch.ones(2), torch.ones(3)), ["(2,)", "(3,)"]),
    ],
    ids=["narrower", "scalar", "part of a tuple"],
)
def test_field_of_wrong_shape_is_refused_with_both_shapes(field: Any, y0: Any, words: list[str], gradient: str) -> None:
    with pytest.raises(UsageError) as caught:
        solve(field, y0, [0.0, 1.0], gradient=gradient)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("how", [{}, {"gradient": "adjoint"}, {"engine": "torchdiffeq"}], ids=str)
@pytest.mark.parametrize("returned", [None, [1.0, 1.0], 1.0, (None,)], ids=lambda returned: type(returned).__name__)
def test_field_that_returns_no_tensor_is_refused(returned: Any, how: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"returned a {type(returned).__name__} for a state of shape \(2,\)"):
        solve(lambda t, y: returned, Y0, [0.0, 1.0], **how)


def test_event_that_returns_no_tensor_is_refused() -> None:
    with pytest.raises(UsageError, match="an event returned a float; it has to return"):
        solve(decay, Y0, [0.0, 1.0], events=lambda t, y: 1.0)


@pytest.mark.parametrize("y0", [[Y0, Y0], [1.0, 2.0], 1.0, (), (Y0, 1.0), decay], ids=lambda y0: type(y0).__name__)
def test_states_that_are_no_tensors_are_refused(y0: Any) -> None:
    with pytest.raises(UsageError, match=rf"y0 is a {type(y0).__name__}; give .* a tensor or a tuple of tensors"):
        solve(decay, y0, [0.0, 1.0])


class OfTheStateAlone(torch.nn.Module):
    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return -y


@pytest.mark.parametrize(
    ("field", "args", "sentence"),
    [
        (lambda: 1.0, (), "takes (), and a solve calls it as f(t, y)"),
        (lambda t, y, a: y, (), "takes (t, y, a), and a solve calls it as f(t, y)"),
        (lambda t, y: y, (2.0,), "takes (t, y), and a solve calls it as f(t, y, a1)"),
        (OfTheStateAlone(), (), "takes (y), and a solve calls it as f(t, y)"),
        (3.0, (), "the field is a float"),
    ],
)
@pytest.mark.parametrize("error", [UsageError, TypeError])
def test_a_field_of_other_arguments_is_refused(field: Any, args: tuple, sentence: str, error: type) -> None:
    with pytest.raises(error, match=re.escape(sentence)):
        solve(field, torch.ones(2), [0.0, 1.0], args=args)
    if not args and callable(field):
        with pytest.raises(error, match=re.escape(sentence)):
            odeint(field, torch.ones(2), torch.tensor([0.0, 1.0]))


def test_a_type_error_of_the_field_itself_stays_what_it_is() -> None:
    for solver in (solve, odeint):
        with pytest.raises(TypeError, match="has no len") as caught:
            solver(lambda t, y: y * len(3), torch.ones(2), torch.tensor([0.0, 1.0]))  # type: ignore[arg-type]
        assert type(caught.value) is TypeError


def test_a_lone_argument_is_refused() -> None:
    """Its entries would become the arguments."""
    with pytest.raises(UsageError, match=r"args is a Tensor; .*args=\(a,\)"):
        solve(lambda t, y, a: a * y, Y0, [0.0, 1.0], args=torch.ones(1))


@pytest.mark.parametrize(
    "how", [{}, {"per_sample": True}, {"method": "rk4", "step_size": 0.1}, {"method": "rkc2"}], ids=str
)
@pytest.mark.parametrize("parts", [1, 2])
def test_a_field_that_writes_into_its_state_is_refused(how: dict[str, Any], parts: int) -> None:
    def writes(t: torch.Tensor, y: Any) -> Any:
        for part in y if isinstance(y, tuple) else (y,):
            part *= -1
        return y

    y0 = torch.ones(3, 2) if parts == 1 else (torch.ones(3, 2), torch.ones(3, 1))
    with pytest.raises(UsageError, match="writes into the state"):
        solve(writes, y0, [0.0, 1.0], **how)


@pytest.mark.parametrize(
    "how",
    [
        {}, {"per_sample": True}, {"method": "rk4", "step_size": 0.1}, {"method": "esdirk4"}, {"checkpoint": "always"},
        {"gradient": "adjoint"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_field_that_writes_into_its_time_is_refused(how: dict[str, Any], dtype: torch.dtype) -> None:
    y0 = torch.zeros(3, 2, dtype=dtype, requires_grad=True)
    with pytest.raises(UsageError, match="writes into the time"):
        solve(lambda t, y: t.mul_(2.0).cos() - y, y0, [0.5, 2.0], **how)
