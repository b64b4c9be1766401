"""`estimates=True`: the regularisers are the sums over the accepted steps that they are said to be, with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neuralode.errors import UsageError
from neuralode.nn import MLPField
from neuralode.ode import solve
from neuralode.ode.methods import METHODS

POLICIES = {
    "never": {"checkpoint": "never"}, "always": {"checkpoint": "always"}, "some": {"checkpoint": 2},
    "auto": {}, "little": {"memory_budget": 1}, "half": {"memory_budget": 3000},
}  # fmt: skip
policies = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
PAIRS = ["dopri5", "tsit5", "bosh3", "adaptive_heun"]
WITH_STIFFNESS = ("dopri5", "tsit5")
"""Those whose last two stages lie at the same time."""
FROZEN = {"rtol": 1e8, "atol": 1e8, "options": {"first_step": 0.15, "ifactor": 1.3}}
"""Steps that do not depend on the state."""


def mlp() -> MLPField:
    torch.manual_seed(0)
    return MLPField(2, [5], time=True).double()


def start(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def by_hand(field: Any, y: torch.Tensor, t: torch.Tensor, sizes: list[float], method: str) -> list[torch.Tensor]:
    """Σ|h|·‖error‖ and Σ|h|·‖k₇ - k₆‖/‖z₇ - z₆‖ from plain steps of these sizes, from t[0] to t[-1]."""
    tableau = METHODS[method].tableau
    direction = 1.0 if t[-1] > t[0] else -1.0
    errors, stiffness = torch.zeros((), dtype=y.dtype), torch.zeros((), dtype=y.dtype)
    gone = 0.0
    for number, size in enumerate(sizes, 1):
        now = t[0] + direction * gone
        h = t[-1] - now if number == len(sizes) else torch.tensor(direction * size, dtype=y.dtype)
        places, slopes = [], []
        for c, row in zip(tableau.c, tableau.a, strict=True):
            places.append(y + h * sum(a * k for a, k in zip(row, slopes, strict=True)))
            slopes.append(field(now + c * h, places[-1]))
        error = h * sum(e * k for e, k in zip(tableau.error, slopes, strict=True))
        errors = errors + h.abs() * error.norm()
        if method in WITH_STIFFNESS:
            stiffness = stiffness + h.abs() * (slopes[-1] - slopes[-2]).norm() / (places[-1] - places[-2]).norm()
        y = y + h * sum(b * k for b, k in zip(tableau.b, slopes, strict=True))
        gone += size
    return [errors, stiffness]


@policies
@pytest.mark.parametrize("span", [(0.0, 0.6, 1.3), (1.3, 0.6, 0.1)], ids=["forward", "reversed"])
@pytest.mark.parametrize("method", PAIRS)
def test_sums_and_gradients_are_those_computed_by_hand(
    method: str, span: tuple[float, ...], policy: dict[str, Any]
) -> None:
    net, y0 = mlp(), start()
    t = torch.tensor(span, dtype=torch.float64, requires_grad=True)
    stats = solve(net, y0, t, method=method, rtol=1e-5, atol=1e-5, estimates=True, **policy).stats
    wanted = by_hand(net, y0, t, stats.step_sizes, method)
    sources = [y0, t, *net.parameters()]
    found = [stats.error_estimate, stats.stiffness_estimate]
    for ours, reference in zip(found, wanted if method in WITH_STIFFNESS else wanted[:1], strict=False):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-15)
        for a, b in zip(
            torch.autograd.grad(ours, sources, retain_graph=True, allow_unused=True),
            torch.autograd.grad(reference, sources, retain_graph=True, allow_unused=True),
            strict=True,
        ):
            # an output time between the steps and the last bias of the error have no share in it
            b = torch.zeros_like(a) if b is None and a is not None else b
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-13)


@policies
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_an_estimate_of_stiffness_is_there_or_none(method: str, policy: dict[str, Any]) -> None:
    stats = solve(mlp(), start(), [0.0, 1.0], method=method, estimates=True, **policy).stats
    assert (stats.stiffness_estimate is not None) == (method in WITH_STIFFNESS)
    assert stats.error_estimate > 0


@policies
@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_against_finite_differences_on_the_frozen_grid(method: str, policy: dict[str, Any]) -> None:
    net = mlp()

    def sums(y0: torch.Tensor, gain: torch.Tensor) -> Any:
        stats = solve(
            lambda t, y, g: g * net(t, y), y0, [0.0, 1.0], args=(gain,), method=method, estimates=True,
            **FROZEN, **policy,
        ).stats  # fmt: skip
        return 1e3 * stats.error_estimate, stats.stiffness_estimate

    gain = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sums, (start(1), gain), atol=1e-5)


@policies
def test_the_states_and_their_gradients_do_not_change(policy: dict[str, Any]) -> None:
    net = mlp()
    found = []
    for estimates in (False, True):
        y0 = start()
        ys = solve(net, y0, [0.0, 0.3, 1.0], estimates=estimates, **policy).ys
        found.append([ys, *torch.autograd.grad(ys.square().sum(), [y0, *net.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@policies
def test_a_loss_of_states_and_estimates_together(policy: dict[str, Any]) -> None:
    net, y0 = mlp(), start()
    found = []
    for how in ({"checkpoint": "never"}, policy):
        solution = solve(net, y0, [0.0, 0.3, 1.0], estimates=True, **how)
        stats = solution.stats
        loss = solution.final.square().sum() + 1e3 * stats.error_estimate + 0.1 * stats.stiffness_estimate
        found.append(torch.autograd.grad(loss, [y0, *net.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("checkpoint", ["never", "always", 2])
def test_with_steps_for_each_sample_the_sum_is_that_of_the_samples_alone(checkpoint: Any) -> None:
    net, y0 = mlp(), start()
    stats = solve(net, y0, [0.0, 1.0], per_sample=True, estimates=True, checkpoint=checkpoint).stats
    alone = [solve(net, row[None], [0.0, 1.0], estimates=True).stats for row in y0]
    for name in ("error_estimate", "stiffness_estimate"):
        total = torch.stack([getattr(each, name) for each in alone]).sum()
        torch.testing.assert_close(getattr(stats, name), total, rtol=1e-7, atol=1e-14)
        sources = [y0, *net.parameters()]
        for a, b in zip(
            torch.autograd.grad(getattr(stats, name), sources, retain_graph=True, allow_unused=True),
            torch.autograd.grad(total, sources, retain_graph=True, allow_unused=True),
            strict=True,
        ):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-5, atol=1e-10)


def test_per_sample_estimates_where_the_samples_differ_much() -> None:
    # rows that have ended take steps of size zero, which count for nothing, also in the gradient
    rates = torch.tensor([[1.0], [40.0]], dtype=torch.float64, requires_grad=True)
    y0 = torch.ones(2, 1, dtype=torch.float64)
    stats = solve(lambda t, y, r: -r * y, y0, [0.0, 1.0], args=(rates,), per_sample=True, estimates=True).stats
    (gradient,) = torch.autograd.grad(stats.error_estimate + stats.stiffness_estimate, rates)
    assert torch.isfinite(gradient).all()
    # for a linear field the estimate of ‖J‖ is exact, so that the sum is the rate times the length of the solve
    torch.testing.assert_close(stats.stiffness_estimate, rates.sum().detach(), rtol=1e-6, atol=0)


def test_stiffness_of_a_linear_field_is_its_rate_times_the_length() -> None:
    rate = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    y0 = torch.ones(3, dtype=torch.float64)
    for span in ([0.0, 2.0], [2.0, 0.0]):
        stats = solve(lambda t, y: -rate * y, y0, span, estimates=True).stats
        torch.testing.assert_close(stats.stiffness_estimate.detach(), 2 * rate.detach(), rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(stats.stiffness_estimate, rate)
        assert gradient == pytest.approx(2.0, rel=1e-6)


def test_what_has_no_estimate_says_none_or_refuses() -> None:
    assert solve(mlp(), start(), [0.0, 1.0]).stats.error_estimate is None
    assert solve(mlp(), start(), [0.0, 1.0], method="bosh3", estimates=True).stats.stiffness_estimate is None
    with pytest.raises(UsageError, match="estimates"):
        solve(mlp(), start(), [0.0, 1.0], estimates=True, engine="torchdiffeq")


@pytest.mark.parametrize("method", ["euler", "rk4", "midpoint"])
def test_a_method_without_an_error_estimate_is_refused_with_a_sentence(method: str) -> None:
    with pytest.raises(UsageError, match=f"{method}.*estimate"):
        solve(mlp(), start(), [0.0, 1.0], method=method, step_size=0.1, estimates=True)


def test_the_adjoint_which_has_no_gradient_for_them_refuses_them() -> None:
    with pytest.raises(UsageError, match=r"adjoint.*estimates|estimates.*adjoint"):
        solve(mlp(), start(), [0.0, 1.0], gradient="adjoint", estimates=True)


@pytest.mark.parametrize("method", ["rkc2", "esdirk4", "dopri8", "dop853", "fehlberg2"])
@pytest.mark.parametrize("policy", ["always", 2])
def test_error_estimates_of_the_other_methods_are_recomputed_alike(method: str, policy: Any) -> None:
    net, y0 = mlp(), start()
    found = []
    for checkpoint in ("never", policy):
        stats = solve(net, y0, [0.0, 0.4, 1.0], method=method, estimates=True, checkpoint=checkpoint).stats
        assert stats.error_estimate > 0
        found.append([stats.error_estimate, *torch.autograd.grad(stats.error_estimate, [y0, *net.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-14)


def test_training_with_the_estimates_lowers_the_number_of_evaluations() -> None:
    torch.manual_seed(0)
    y0 = torch.randn(16, 2)
    evaluations = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        net = MLPField(2, [16], init_std=2.0)
        optimiser = torch.optim.Adam(net.parameters(), 0.03)
        for _ in range(25):
            stats = solve(net, y0, [0.0, 1.0], estimates=True, rtol=1e-5, atol=1e-5).stats
            optimiser.zero_grad()
            (weight * (1e3 * stats.error_estimate + 0.1 * stats.stiffness_estimate)).backward()
            optimiser.step()
        evaluations.append(solve(net, y0, [0.0, 1.0], rtol=1e-5, atol=1e-5).stats.nfe)
    assert evaluations[1] < 0.7 * evaluations[0]
