"""`per_sample=True` and times [B, T]: each sample is solved as if it were alone, only all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from neuralode.errors import UsageError
from neuralode.ode import solve
from neuralode.ode.methods import METHODS, in_torchdiffeq
from tests.problems import PROBLEMS

ADAPTIVE = sorted(name for name, method in METHODS.items() if method.adaptive and method.by_sample)
READING = [name for name in ADAPTIVE if METHODS[name].interpolates]
FIXED = sorted(name for name, method in METHODS.items() if not method.adaptive)
POLICIES: list[dict[str, Any]] = [
    {"checkpoint": "never"}, {"checkpoint": "always"}, {"checkpoint": 3}, {"memory_budget": 1},
]  # fmt: skip
ROUNDING = {"rtol": 1e-10, "atol": 1e-11}
RATES = torch.tensor([0.5, 12.0, 3.0], dtype=torch.float64)
Y0 = torch.tensor([[0.2, 1.5], [0.9, -0.3], [1.7, 0.4]], dtype=torch.float64)
SPANS = torch.tensor([[0.0, 0.3, 0.7, 1.0], [2.0, 1.0, 0.9, 0.6], [0.5, 0.50001, 3.0, 3.1]], dtype=torch.float64)

Field = Callable[..., torch.Tensor]


def turning(t: torch.Tensor, y: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """Each sample turns at a rate of its own, so that each needs steps of its own."""
    return rate * torch.stack([y[..., 1], -y[..., 0]], -1) + 0.3 * t.cos() * y.sin()


def settings(method: str) -> dict[str, Any]:
    loose = {"esdirk4": 1e-4}.get(method, 1e-3 if METHODS[method].order < 4 else 1e-6)
    return {"method": method, "rtol": loose, "atol": loose}


def alone(i: int, times: torch.Tensor, rate: torch.Tensor, y0: torch.Tensor, **kwargs: Any) -> Any:
    """The solve of sample i without the others, by the loop that all solves use."""
    at = times if times.dim() == 1 else times[i]
    return solve(turning, y0[i : i + 1], at, args=(rate[i : i + 1, None],), **kwargs)


def leaves(times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return Y0.clone().requires_grad_(), RATES.clone().requires_grad_(), times.clone().requires_grad_()


@pytest.mark.parametrize("span", [(0.0, 2.0), (2.0, 1.2)], ids=str)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_each_sample_is_as_if_alone(method: str, span: tuple[float, float]) -> None:
    times = torch.tensor(span, dtype=torch.float64)
    together = solve(turning, Y0, times, args=(RATES[:, None],), per_sample=True, **settings(method))
    accepted, rejected = together.stats.accepted_per_sample, together.stats.rejected_per_sample
    assert accepted.shape == rejected.shape == (3,)
    for i in range(3):
        one = alone(i, times, RATES, Y0, **settings(method))
        torch.testing.assert_close(together.final[i], one.final[0], **ROUNDING)
        assert (int(accepted[i]), int(rejected[i])) == (one.stats.accepted, one.stats.rejected)
    assert together.stats.accepted == int(accepted.max())
    assert together.stats.rejected == int(rejected.max())


@pytest.mark.parametrize("method", READING)
def test_each_sample_reads_its_outputs_as_if_alone(method: str) -> None:
    together = solve(turning, Y0, SPANS, args=(RATES[:, None],), **settings(method))
    assert together.ys.shape == (4, 3, 2)
    torch.testing.assert_close(together.ys[0], Y0, rtol=0, atol=0)
    for i in range(3):
        one = alone(i, SPANS, RATES, Y0, **settings(method))
        torch.testing.assert_close(together.ys[:, i], one.ys[:, 0], **ROUNDING)
        assert int(together.stats.accepted_per_sample[i]) == one.stats.accepted


def test_shared_times_are_the_same_as_a_row_for_each_sample() -> None:
    times = torch.linspace(0, 2, 6, dtype=torch.float64)
    shared = solve(turning, Y0, times, args=(RATES[:, None],), per_sample=True)
    spread = solve(turning, Y0, times.expand(3, -1), args=(RATES[:, None],))
    torch.testing.assert_close(spread.ys, shared.ys, rtol=0, atol=0)
    assert spread.stats.accepted_per_sample.tolist() == shared.stats.accepted_per_sample.tolist()


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_closed_forms_at_times_of_each_sample(problem: Any) -> None:
    times = torch.tensor([[0.1, 0.9, 1.0, 2.7], [2.9, 2.2, 0.3, 0.2]], dtype=torch.float64)
    exact = torch.stack([problem.exact(row)[:, i] for i, row in enumerate(times)], dim=1)
    ys = solve(problem.field, exact[0], times, rtol=1e-8, atol=1e-8).ys
    torch.testing.assert_close(ys, exact, rtol=0, atol=2e-6)


def test_a_stiff_sample_does_not_slow_the_others() -> None:
    slow = solve(turning, Y0[:1], [0.0, 2.0], args=(RATES[:1, None],)).stats.accepted
    rates = torch.tensor([[0.5], [100.0]], dtype=torch.float64)
    stats = solve(turning, Y0[:2], [0.0, 2.0], args=(rates,), per_sample=True).stats
    assert int(stats.accepted_per_sample[0]) == slow
    assert int(stats.accepted_per_sample[1]) > 20 * slow
    shared = solve(turning, Y0[:2], [0.0, 2.0], args=(rates,)).stats
    assert shared.accepted > 20 * slow
    assert shared.accepted_per_sample is None


def test_order_of_the_samples_does_not_matter() -> None:
    there = solve(turning, Y0, SPANS, args=(RATES[:, None],))
    back = solve(turning, Y0.flip(0), SPANS.flip(0), args=(RATES[:, None].flip(0),))
    torch.testing.assert_close(back.ys.flip(1), there.ys, **ROUNDING)
    assert back.stats.accepted_per_sample.flip(0).tolist() == there.stats.accepted_per_sample.tolist()


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4)], ids=str)
def test_the_field_receives_a_time_for_each_sample(shape: tuple[int, ...]) -> None:
    seen: list[tuple[int, ...]] = []

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(t.shape))
        return t.cos() * y

    y0 = torch.linspace(0.5, 1.5, 3, dtype=torch.float64).view(3, *[1] * (len(shape) - 1)).expand(shape)
    spans = torch.tensor([[0.0, 1.0], [1.0, 3.0], [2.0, 0.5]], dtype=torch.float64)
    ys = solve(field, y0, spans, rtol=1e-8, atol=1e-8, dense=True).final
    assert set(seen) == {(3, *[1] * (len(shape) - 1))}
    growth = (spans[:, 1].sin() - spans[:, 0].sin()).exp().view(3, *[1] * (len(shape) - 1))
    torch.testing.assert_close(ys, y0 * growth, rtol=0, atol=1e-6)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dop853", "esdirk4"])
@pytest.mark.parametrize("spans", [False, True])
def test_gradients_are_as_if_alone(method: str, policy: dict[str, Any], spans: bool) -> None:
    """To y0, to the field's arguments and to the times, [T] or [B, T], of a solve of each sample by itself."""
    times = SPANS if spans else torch.tensor([0.1, 0.55, 0.9, 2.0], dtype=torch.float64)
    weights = torch.randn(4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y0, rate, ts = leaves(times)
    given = {**settings(method), **policy}
    ys = solve(turning, y0, ts, args=(rate[:, None],), per_sample=True, **given).ys
    ours = torch.autograd.grad((weights * ys).sum(), (y0, rate, ts))
    total = sum(
        (weights[:, i] * alone(i, ts, rate, y0, checkpoint="never", **settings(method)).ys[:, 0]).sum()
        for i in range(3)
    )
    wanted = torch.autograd.grad(total, (y0, rate, ts))
    for gradient, single in zip(ours, wanted, strict=True):
        torch.testing.assert_close(gradient, single, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("method", [*ADAPTIVE, "rk4", "euler"])
def test_gradients_are_those_of_finite_differences_on_the_frozen_grid(method: str, policy: dict[str, Any]) -> None:
    """Tolerances so wide that the steps do not depend on the state."""
    outputs = slice(None) if METHODS[method].interpolates or method in FIXED else [0, 3]
    times = SPANS[:, outputs].clone()
    given: dict[str, Any] = {"rtol": 1e8, "atol": 1e8, "options": {"first_step": 0.21, "ifactor": 1.2}}
    given = {"step_size": 0.21} if method in FIXED else given
    generator = torch.Generator().manual_seed(3)
    point = (Y0, RATES / 3, times)
    directions = [torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in point]
    directions[2] /= 100
    weights = torch.randn(times.shape[1], 3, 2, dtype=torch.float64, generator=generator)

    def value(y0: torch.Tensor, rate: torch.Tensor, ts: torch.Tensor, **policy: Any) -> torch.Tensor:
        return (weights * solve(turning, y0, ts, args=(rate[:, None],), method=method, **given, **policy).ys).sum()

    inputs = [x.clone().requires_grad_() for x in point]
    gradients = torch.autograd.grad(value(*inputs, **policy), inputs)
    for which, (gradient, direction) in enumerate(zip(gradients, directions, strict=True)):
        above, below = (
            float(value(*(x + step * direction if i == which else x for i, x in enumerate(point))))
            for step in (1e-5, -1e-5)
        )
        assert float((gradient * direction).sum()) == pytest.approx((above - below) / 2e-5, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("policy", [*POLICIES, {}], ids=str)
def test_gradients_reach_the_parameters_of_a_module(policy: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return module(y) * (1 + t)

    class Field(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return field(t, y)

    ys = solve(Field(), Y0, SPANS, rtol=1e-6, atol=1e-6, **policy).ys
    ours = torch.autograd.grad(ys.square().sum(), list(module.parameters()))
    singly = [
        solve(field, Y0[i : i + 1], SPANS[i], rtol=1e-6, atol=1e-6, checkpoint="never").ys[:, 0] for i in range(3)
    ]
    wanted = torch.autograd.grad(torch.stack(singly, 1).square().sum(), list(module.parameters()))
    for gradient, single in zip(ours, wanted, strict=True):
        torch.testing.assert_close(gradient, single, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("policy", [*POLICIES, {}], ids=str)
def test_an_overflow_in_a_rejected_trial_leaves_the_gradients_finite(policy: dict[str, Any]) -> None:
    """The first trial step of the middle sample overflows; it is rejected and may not reach any gradient."""

    def field(t: torch.Tensor, y: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
        return -rate * y * (y * y).exp()

    y0 = torch.tensor([[0.1], [3.0], [0.2]], dtype=torch.float64, requires_grad=True)
    rate = torch.tensor([[1.0], [2.0], [0.5]], dtype=torch.float64, requires_grad=True)
    given: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5, "options": {"first_step": 0.5}}
    solution = solve(field, y0, [0.0, 1.0], args=(rate,), per_sample=True, **given, **policy)
    assert int(solution.stats.rejected_per_sample[1]) > 2
    ours = torch.autograd.grad(solution.final.sum(), (y0, rate))
    singly = [
        solve(field, y0[i : i + 1], [0.0, 1.0], args=(rate[i : i + 1],), checkpoint="never", **given).final
        for i in range(3)
    ]
    wanted = torch.autograd.grad(torch.cat(singly).sum(), (y0, rate))
    for gradient, single in zip(ours, wanted, strict=True):
        assert torch.isfinite(gradient).all()
        torch.testing.assert_close(gradient, single, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", FIXED)
def test_fixed_steps_go_through_times_of_each_sample(method: str) -> None:
    together = solve(turning, Y0, SPANS, args=(RATES[:, None],), method=method, step_size=0.17)
    for i in range(3):
        one = alone(i, SPANS, RATES, Y0, method=method, step_size=0.17)
        torch.testing.assert_close(together.ys[:, i], one.ys[:, 0], **ROUNDING)
        assert int(together.stats.accepted_per_sample[i]) == one.stats.accepted
    assert together.stats.rejected_per_sample.tolist() == [0, 0, 0]


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("begin", "end", "count"), [(0.0, 0.3, 3), (0.0, -0.3, 3), (10.0, 12.1, 21), (0.0, 0.32, 4)])
def test_rounded_times_need_no_further_step(
    begin: float, end: float, count: int, dtype: torch.dtype, per_sample: bool
) -> None:
    """In single precision 0.3 is more than three steps of 0.1, by a sliver."""
    y0, times = torch.ones(2, 1, dtype=dtype), torch.tensor([begin, end], dtype=dtype)
    solution = solve(lambda t, y: -y, y0, times, method="rk4", step_size=0.1, per_sample=per_sample)
    assert solution.stats.accepted == count
    torch.testing.assert_close(solution.final, (y0 * (begin - end)).exp(), rtol=1e-5, atol=0)


def test_linear_reading_between_fixed_steps() -> None:
    given: dict[str, Any] = {"method": "rk4", "step_size": 0.17, "options": {"interp": "linear"}}
    together = solve(turning, Y0, SPANS, args=(RATES[:, None],), **given)
    for i in range(3):
        torch.testing.assert_close(together.ys[:, i], alone(i, SPANS, RATES, Y0, **given).ys[:, 0], **ROUNDING)


@pytest.mark.parametrize("times", [torch.tensor([0.0, 0.4, 2.0]).double(), SPANS], ids=["shared", "own"])
def test_tuple_states(times: torch.Tensor) -> None:
    shapes: set[tuple[int, ...]] = set()

    def field(t: torch.Tensor, y: tuple[torch.Tensor, ...], rate: torch.Tensor) -> tuple[torch.Tensor, ...]:
        shapes.add(tuple(t.shape))
        return turning(t, y[0], rate), t[..., None].sin() * y[1]

    start = (Y0, torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 2, 2))
    ys = solve(field, start, times, args=(RATES[:, None],), per_sample=True, rtol=1e-9, atol=1e-9).ys
    alike = solve(turning, Y0, times, args=(RATES[:, None],), per_sample=True, rtol=1e-9, atol=1e-9).ys
    assert shapes == {(3, 1)}
    torch.testing.assert_close(ys[0], alike, rtol=0, atol=1e-6)
    grid = times.expand(3, -1)
    growth = (grid[:, :1].cos() - grid.cos()).exp().T[..., None, None]
    torch.testing.assert_close(ys[1], start[1] * growth, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", [8, 3])
@pytest.mark.parametrize("span", [(0.0, 0.3, 1.9, 2.0), (2.0, 1.5, 1.2)], ids=str)
@pytest.mark.parametrize("method", READING)
def test_the_device_loop_is_the_host_loop(method: str, span: tuple[float, ...], chunk: int) -> None:
    """Looking at the device once in several steps changes neither states nor gradients nor counts."""
    times = torch.tensor(span, dtype=torch.float64)
    results = []
    for options in ({}, {"steps_per_sync": chunk}):
        y0, rate, ts = leaves(times)
        solution = solve(turning, y0, ts, args=(rate[:, None],), options=options, **settings(method))
        gradients = torch.autograd.grad(solution.ys.square().sum(), (y0, rate, ts))
        results.append((solution, gradients))
    (host, wanted), (device, ours) = results
    torch.testing.assert_close(device.ys, host.ys, **ROUNDING)
    assert (device.stats.accepted, device.stats.rejected) == (host.stats.accepted, host.stats.rejected)
    for gradient, single in zip(ours, wanted, strict=True):
        torch.testing.assert_close(gradient, single, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_chunks_change_nothing_for_samples_of_their_own(policy: dict[str, Any]) -> None:
    results = []
    for chunk in (1, 8):
        y0, rate, ts = leaves(SPANS)
        solution = solve(turning, y0, ts, args=(rate[:, None],), options={"steps_per_sync": chunk}, **policy)
        gradients = torch.autograd.grad(solution.ys.square().sum(), (y0, rate, ts))
        results.append((solution, gradients))
    (one, wanted), (eight, ours) = results
    torch.testing.assert_close(eight.ys, one.ys, **ROUNDING)
    assert eight.stats.accepted_per_sample.tolist() == one.stats.accepted_per_sample.tolist()
    assert eight.stats.rejected_per_sample.tolist() == one.stats.rejected_per_sample.tolist()
    for gradient, single in zip(ours, wanted, strict=True):
        torch.testing.assert_close(gradient, single, rtol=1e-9, atol=1e-10)


def test_nothing_lingers_after_the_last_time() -> None:
    """A sample that has ended stays where it is, whatever the field would say beyond."""

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert bool((t <= torch.tensor([[1.0], [5.0]]) + 1e-9).all()), "evaluated beyond the end of a sample"
        return t.cos() * y

    spans = torch.tensor([[0.0, 1.0], [0.0, 5.0]], dtype=torch.float64)
    ys = solve(field, torch.ones(2, 1, dtype=torch.float64), spans, options={"first_step": 0.01, "ifactor": 1.5}).final
    torch.testing.assert_close(ys[:, 0], spans[:, 1].sin().exp(), rtol=0, atol=1e-3)


def test_failures_name_the_sample() -> None:
    y0 = torch.tensor([[0.1], [2.0]], dtype=torch.float64)  # 1 / (1/2 - t): infinite at 0.5
    solution = solve(lambda t, y: y * y, y0, [0.0, 1.0], per_sample=True, throw=False, max_steps=300)
    assert solution.status.name != "SUCCESS"
    assert "sample 1" in solution.stats.diagnosis
    assert solution.ys[0].isnan().flatten().tolist() == [False, True]


@pytest.mark.parametrize("outputs", [2, 4])
def test_failed_solves_have_states_of_the_right_shape(outputs: int) -> None:
    y0 = torch.tensor([[0.1], [2.0], [0.2]], dtype=torch.float64)
    times = torch.linspace(0, 1, outputs, dtype=torch.float64).expand(3, -1)
    solution = solve(lambda t, y: y * y, y0, times, throw=False, max_steps=300)
    assert solution.ys.shape == (outputs, 3, 1)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"engine": "torchdiffeq"}, "no steps for each sample"),
        ({"gradient": "adjoint"}, "the adjoint takes the same steps for all samples"),
        ({"method": "rkc2"}, "'rkc2' takes the same steps for all samples"),
        ({"method": "rk4", "step_size": None, "options": {"grid_constructor": lambda f, y, t: t}}, "step_size"),
        ({"method": "implicit_adams", "step_size": 0.1}, "no method 'implicit_adams'"),
        ({"method": "dopri8"}, "'dopri8' has no dense output accurate enough"),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else "",
)
def test_what_cannot_be_is_refused_in_a_sentence(given: dict[str, Any], sentence: str) -> None:
    times = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    with pytest.raises(UsageError, match=sentence) as caught:
        solve(turning, Y0, times, args=(RATES[:, None],), per_sample=True, **given)
    assert "\n" not in str(caught.value)
    if in_torchdiffeq(given.get("method", "")):
        with pytest.raises(UsageError):
            solve(turning, Y0, times.expand(3, -1), args=(RATES[:, None],), engine="stepper", **given)


@pytest.mark.parametrize(
    ("y0", "times"),
    [
        (torch.tensor(1.0), torch.tensor([0.0, 1.0])),
        (torch.ones(3, 2), torch.tensor([[0.0, 1.0], [0.0, 2.0]])),
        (torch.ones(3, 2), torch.zeros(3, 2, 2)),
        (torch.ones(3, 2), torch.zeros(3, 1)),
        (torch.ones(2), torch.tensor([[0.0, 1.0], [1.0, 1.0]])),
        (torch.ones(2), torch.tensor([[0.0, 1.0, 2.0], [1.0, 2.0, 0.0]])),
        (torch.ones(2), torch.tensor([[0.0, 1.0], [0.0, float("inf")]])),
    ],
    ids=["scalar", "rows", "dims", "one time", "no span", "turns", "infinite"],
)
def test_states_and_times_that_do_not_fit_are_refused(y0: torch.Tensor, times: torch.Tensor) -> None:
    with pytest.raises(UsageError):
        solve(lambda t, y: -y, y0, times, per_sample=True)
