"""torchdiffeq's functions give torchdiffeq's numbers, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchdiffeq

from neuralode import odeint, odeint_adjoint, odeint_event
from neuralode.errors import UsageError
from neuralode.nn import MLPField
from neuralode.ode import methods
from neuralode.ode.methods import takes_fixed_steps
from tests.problems import PROBLEMS

T = torch.linspace(0, 1, 4)
Y0 = torch.tensor([[1.0, 2.0], [0.5, -1.0]])


def field() -> MLPField:
    torch.manual_seed(0)
    return MLPField(2, [8], time=True)


def settings(method: str) -> dict[str, Any]:
    # explicit_adams blows up with its default, the twelfth order
    order = {"max_order": 5} if "adams" in method else {}
    return {"method": method, "options": {"step_size": 0.1, **order} if takes_fixed_steps(method) else None}


@pytest.mark.parametrize("method", methods())
def test_odeint(method: str) -> None:
    for problem in PROBLEMS:
        args = (problem.field, problem.y0, problem.times(4))
        kwargs = {"rtol": 1e-4, "atol": 1e-4, **settings(method)}
        assert torch.equal(odeint(*args, **kwargs), torchdiffeq.odeint(*args, **kwargs))


def test_odeint_by_default() -> None:
    assert torch.equal(odeint(field(), Y0, T), torchdiffeq.odeint(field(), Y0, T))


def test_odeint_of_a_tuple() -> None:
    ours, theirs = (
        solver(lambda t, y: (y[1], -y[0]), (Y0, 2 * Y0), T, rtol=1e-4) for solver in (odeint, torchdiffeq.odeint)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("method", ["dopri5", "rk4", "midpoint"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(odeint, torchdiffeq.odeint), (odeint_adjoint, torchdiffeq.odeint_adjoint)],
    ids=["exact", "adjoint"],
)
def test_gradients(ours: Any, theirs: Any, method: str) -> None:
    found = []
    for solver in (ours, theirs):
        module, y0, t = field(), Y0.clone().requires_grad_(), T.clone().requires_grad_()
        solver(module, y0, t, rtol=1e-4, atol=1e-4, **settings(method)).pow(2).sum().backward()
        found.append([y0.grad, t.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
        assert a.abs().max() > 0


def test_adjoint_keywords_reach_torchdiffeq() -> None:
    found = []
    for solver in (odeint_adjoint, torchdiffeq.odeint_adjoint):
        module = field()
        ys = solver(module, Y0, T, adjoint_rtol=0.1, adjoint_atol=0.1, adjoint_options={"norm": "seminorm"})
        ys.sum().backward()
        found.append([p.grad for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def fall(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Height and speed under a gravity of 2."""
    return torch.stack([y[1], torch.full_like(y[1], -2.0)])


def ground(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y[0]


def test_event_time_and_its_gradient() -> None:
    found = []
    for solver in (odeint_event, torchdiffeq.odeint_event):
        y0 = torch.tensor([4.0, 0.0], dtype=torch.float64, requires_grad=True)
        time, states = solver(fall, y0, torch.tensor(0.0, dtype=torch.float64), event_fn=ground, atol=1e-10)
        time.backward()
        found.append((time, states, y0.grad))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    time, states, gradient = found[0]
    # from height h the ground is reached at √h, with the derivative 1 / (2√h)
    torch.testing.assert_close(time, torch.full_like(time, 2.0), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[0], torch.full_like(time, 0.25), rtol=1e-6, atol=0)
    assert states.shape == (2, 2)


def test_odeint_stops_at_an_event() -> None:
    y0, t = torch.tensor([4.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    ours, theirs = (solver(fall, y0, t, event_fn=ground) for solver in (odeint, torchdiffeq.odeint))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("solver", [odeint, odeint_adjoint])
def test_unknown_method_has_the_nearest_one(solver: Any) -> None:
    with pytest.raises(UsageError, match=r"'dopr5'; did you mean 'dopri5'\?"):
        solver(field(), Y0, T, method="dopr5")


def test_unknown_method_of_an_event_has_the_nearest_one() -> None:
    with pytest.raises(UsageError, match="did you mean"):
        odeint_event(fall, torch.tensor([4.0, 0.0]), torch.tensor(0.0), event_fn=ground, method="dopr5")


def test_assertions_stay_assertions() -> None:
    with pytest.raises(AssertionError, match="strictly increasing"):
        odeint(field(), Y0, torch.tensor([0.0, 2.0, 1.0]))
