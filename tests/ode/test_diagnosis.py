"""What a failed solve has to say: how stiff, which sample, and what to try; and that every solve ends."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from neuralode.ode import SolveError, Status, solve
from tests.problems import Counting

STIFF = torch.diag(torch.tensor([-1.0, -50.0, -2000.0], dtype=torch.float64))
ONES = torch.ones(3, dtype=torch.float64)


def stiff(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A linear field whose Jacobian has the norm 2000."""
    return y @ STIFF


def failed(*args: Any, **kwargs: Any) -> SolveError:
    with pytest.raises(SolveError) as caught:
        solve(*args, **kwargs)
    assert caught.value.stats.diagnosis == str(caught.value)
    return caught.value


def stiffness(error: SolveError) -> float:
    found = re.search(r"h·‖J‖ is about ([\d.e+-]+?)[.,;] ", str(error))
    assert found is not None, str(error)
    return float(found[1])


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "dop853"])
def test_stiffness_of_a_linear_field_is_named_and_true(method: str) -> None:
    error = failed(stiff, ONES, [0.0, 10.0], method=method, max_steps=400)
    assert error.status is Status.MAX_STEPS
    # the step that was tried last is about as long as those before it
    typical = sorted(error.stats.step_sizes[-20:])[10] * 2000
    assert 1 < typical < 20
    assert typical / 2.5 < stiffness(error) < typical * 2.5


def test_stiffness_is_exactly_that_of_a_step_of_given_size() -> None:
    error = failed(stiff, ONES, [0.0, 10.0], max_steps=1, rtol=1e8, atol=1e8, options={"first_step": 0.003})
    size = error.stats.step_sizes[0]
    assert size == 0.003
    assert stiffness(error) == pytest.approx(2000 * size * 10, rel=0.02)  # the step that comes next is ten times longer


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_a_stiff_failure_names_the_methods_for_stiff_fields(method: str) -> None:
    error = failed(stiff, ONES, [0.0, 10.0], method=method, max_steps=400)
    remedy = str(error).split("What to try:")[1]
    assert "esdirk4" in remedy
    assert "rkc2" in remedy


def test_the_remedy_works() -> None:
    for method in ("esdirk4", "rkc2"):
        solution = solve(stiff, ONES, [0.0, 10.0], method=method, max_steps=400)
        assert solution.status is Status.SUCCESS
        assert solution.final[0] == pytest.approx(math.exp(-10), abs=1e-3)


def test_a_failure_that_is_not_stiff_does_not_send_one_to_stiff_methods() -> None:
    error = failed(lambda t, y: (100 * t).cos() + 0 * y, ONES, [0.0, 10.0], max_steps=5)
    assert "esdirk4" not in str(error)
    assert "max_steps" in str(error)


@pytest.mark.parametrize(("method", "others"), [("esdirk4", []), ("rkc2", ["esdirk4"])])
def test_a_stiff_method_that_fails_is_not_its_own_remedy(method: str, others: list[str]) -> None:
    error = failed(stiff, ONES, [0.0, 10.0], method=method, max_steps=1, options={"first_step": 0.1})
    assert stiffness(error) > 2
    assert re.findall("'(esdirk4|rkc2)'", str(error)) == others


def test_steps_of_each_sample_are_not_sent_to_a_method_without_them() -> None:
    error = failed(lambda t, y: -3000 * y, ONES, [0.0, 20.0], per_sample=True, max_steps=50)
    assert re.findall("'(esdirk4|rkc2)'", str(error)) == ["esdirk4"]


@pytest.mark.parametrize(
    "kwargs", [{}, {"per_sample": True}, {"dense": True}, {"gradient": "adjoint"}, {"checkpoint": "always"}], ids=str
)
def test_too_many_fixed_steps_say_how_many_there_are(kwargs: dict[str, Any]) -> None:
    y0 = ONES.clone().requires_grad_()
    error = failed(lambda t, y: -y, y0, [0.0, 10.0], method="rk4", step_size=0.1, max_steps=7, **kwargs)
    assert error.status is Status.MAX_STEPS
    assert str(error).startswith("rk4 needs 100 steps of the given size for these times, and max_steps is 7; ")
    solve(lambda t, y: -y, y0, [0.0, 10.0], method="rk4", step_size=0.1, max_steps=100, **kwargs)


def test_step_underflow_has_its_stiffness() -> None:
    # y = 1/(1 - t), so that the Jacobian 2y grows without bound
    error = failed(lambda t, y: y**2, ONES[:1], [0.0, 2.0])
    assert error.status is Status.STEP_UNDERFLOW
    assert stiffness(error) >= 0
    assert "at t = 1" in str(error) or "at t = 0.999" in str(error)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("bad", [[0], [3], [1, 4]])
def test_nan_names_the_samples(bad: list[int], per_sample: bool) -> None:
    y0 = torch.ones(5, 2)
    y0[bad, 1] = torch.nan
    error = failed(lambda t, y: -y, y0, [0.0, 1.0], per_sample=per_sample)
    assert error.status is Status.NON_FINITE
    assert f"not finite in sample {', '.join(map(str, bad))};" in str(error) or str(error).count(
        f"not finite in sample {', '.join(map(str, bad))}."
    )
    assert "NaN" in str(error).split("What to try:")[1]


@pytest.mark.parametrize("method", ["dopri5", "rk4", "rkc2", "esdirk4"])
def test_nan_of_the_field_on_the_way_names_time_and_sample(method: str) -> None:
    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.where((y > 1.5) & (t > 0), torch.nan, y)

    y0 = torch.tensor([[0.1], [1.0], [0.2]], dtype=torch.float64)  # sample 1 passes 1.5 at ln 1.5
    error = failed(field, y0, [0.0, 1.0], method=method, step_size=0.05 if method == "rk4" else None)
    assert error.status is Status.NON_FINITE
    assert "not finite in sample 1" in str(error)
    time = float(re.findall(r"at t = ([\d.e+-]+)[ :]", str(error))[0])
    if method != "rk4":  # which looks at the result alone
        assert time == pytest.approx(math.log(1.5), abs=0.06)


@pytest.mark.parametrize("per_sample", [False, True])
def test_too_many_steps_with_and_without_steps_of_ones_own(per_sample: bool) -> None:
    rates = torch.tensor([[1.0], [500.0], [2.0]], dtype=torch.float64)
    error = failed(lambda t, y: -rates * y, torch.ones(3, 1).double(), [0.0, 50.0], per_sample=per_sample, max_steps=60)
    assert error.status is Status.MAX_STEPS
    assert stiffness(error) > 1
    assert "esdirk4" in str(error)
    if per_sample:
        assert error.stats.accepted_per_sample[1] == error.stats.accepted
        assert error.stats.accepted_per_sample[0] < 60


def test_underflow_of_one_sample_is_found_while_others_end() -> None:
    y0 = torch.tensor([[-1.0], [1.0], [-2.0]])
    error = failed(lambda t, y: y**2, y0, [0.0, 2.0], per_sample=True)
    assert error.status is Status.STEP_UNDERFLOW
    assert float(re.findall(r"at t = ([\d.e+-]+) in sample 1:", str(error))[0]) == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("kwargs", [{}, {"per_sample": True}, {"checkpoint": "always"}, {"gradient": "adjoint"},
                                    {"method": "esdirk4"}, {"method": "rkc2"}], ids=str)  # fmt: skip
def test_without_throw_the_statistics_have_the_diagnosis(kwargs: dict[str, Any]) -> None:
    field = lambda t, y: (100 * t).cos() - y  # noqa: E731
    y0 = torch.ones(2, 3, requires_grad=True)
    error = failed(field, y0, [0.0, 9.0], max_steps=3, **kwargs)
    solution = solve(field, y0, [0.0, 9.0], max_steps=3, throw=False, **kwargs)
    assert solution.status is Status.MAX_STEPS
    assert solution.stats.diagnosis == str(error)
    again = "per_sample" in kwargs  # once more, for samples that do not fail
    assert solution.stats.nfe > error.stats.nfe > 0 if again else solution.stats.nfe == error.stats.nfe > 0
    assert solution.ys.isnan().all()
    assert solve(field, y0, [0.0, 0.1], **kwargs).stats.diagnosis == ""


def test_diagnosing_costs_no_evaluation_that_the_statistics_count() -> None:
    field = Counting(stiff)
    error = failed(field, ONES, [0.0, 10.0], max_steps=50)
    assert error.stats.nfe <= field.calls
    assert abs(error.stats.nfe - 6 * 50) <= 3


@pytest.mark.parametrize("kwargs", [{}, {"per_sample": True}, {"method": "esdirk4"}, {"method": "tsit5"}], ids=str)
def test_an_overshoot_that_overflows_recovers_by_a_shorter_step(kwargs: dict[str, Any]) -> None:
    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return -torch.where(y.abs() > 10, torch.inf, y**3)

    y0 = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
    first = {"first_step": 5.0}
    solution = solve(field, y0, [0.0, 5.0], rtol=1e-6, atol=1e-8, options=first, **kwargs)
    assert solution.stats.rejected > 0
    torch.testing.assert_close(solution.final, y0 / (1 + 2 * 5 * y0**2).sqrt(), rtol=1e-4, atol=0)


def test_the_gradient_of_a_solve_that_recovered_is_finite() -> None:
    for per_sample in (False, True):
        y0 = torch.tensor([[2.0], [3.0]], dtype=torch.float64, requires_grad=True)
        field = lambda t, y: -(torch.where(y.abs() > 10, torch.inf, y) ** 3)  # noqa: E731
        final = solve(field, y0, [0.0, 5.0], per_sample=per_sample, rtol=1e-6, atol=1e-8, options={"first_step": 5.0})
        (gradient,) = torch.autograd.grad(final.final.sum(), y0)
        torch.testing.assert_close(gradient, (1 + 10 * y0.detach() ** 2) ** -1.5, rtol=1e-3, atol=0)


def test_a_solve_ends_without_being_told_when() -> None:
    # noise that no step resolves: torchdiffeq would try for ever
    field = Counting(lambda t, y: torch.sin(1e6 * t * (1 + y)))
    error = failed(field, ONES[:1], [0.0, 1e6], method="bosh3")
    assert error.status in (Status.MAX_STEPS, Status.STEP_UNDERFLOW)
    assert error.stats.accepted + error.stats.rejected <= 10_000


def test_the_last_steps_are_shown() -> None:
    error = failed(lambda t, y: -y, ONES, [0.0, 100.0], max_steps=6)
    shown = ", ".join(f"{size:.3g}" for size in error.stats.step_sizes[-3:])
    assert f"last accepted steps {shown};" in str(error)


@pytest.mark.parametrize("others", [(), (torch.ones(3),)], ids=["tensor", "tuple"])
def test_an_underflow_of_shared_steps_names_the_fastest_sample(others: tuple[torch.Tensor, ...]) -> None:
    def field(t: torch.Tensor, y: Any) -> Any:
        return (y[0] ** 2, -y[1]) if others else y**2

    y0 = torch.tensor([[0.1], [1.0], [0.2]])
    assert "step size underflow" in str(error := failed(field, (y0, *others) if others else y0, [0.0, 2.0]))
    assert "fastest in sample 1" in str(error)
