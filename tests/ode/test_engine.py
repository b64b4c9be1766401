"""Every setting of a SolverConfig reaches torchdiffeq: same numbers, to the bit, as when it is called by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchdiffeq

from neuralode.nn import MLPField
from neuralode.ode import SolverConfig, solve_configured

T = torch.linspace(0, 1, 3)
Y0 = torch.tensor([[1.0, 2.0], [0.5, -1.0]])


def field() -> MLPField:
    torch.manual_seed(0)
    return MLPField(2, [8], time=True)


@pytest.mark.parametrize(
    ("settings", "by_hand"),
    [
        ({}, {}),
        ({"rtol": 1e-2, "atol": 1e-7}, {"rtol": 1e-2, "atol": 1e-7}),
        ({"rtol": 1e-7, "atol": 1e-2}, {"rtol": 1e-7, "atol": 1e-2}),
        ({"method": "bosh3", "options": {"first_step": 0.2}}, {"method": "bosh3", "options": {"first_step": 0.2}}),
        ({"method": "rk4", "step_size": 0.2}, {"method": "rk4", "options": {"step_size": 0.2, "interp": "cubic"}}),
    ],
    ids=str,
)
def test_forward(settings: dict[str, Any], by_hand: dict[str, Any]) -> None:
    ours = solve_configured(field(), Y0, T, SolverConfig(engine="torchdiffeq", **settings)).ys
    assert torch.equal(ours, torchdiffeq.odeint(field(), Y0, T, **{"rtol": 1e-4, "atol": 1e-5, **by_hand}))


ADJOINTS = [
    ({}, {}),
    ({"adjoint_rtol": 0.3}, {"adjoint_rtol": 0.3}),
    ({"adjoint_atol": 0.3, "adjoint_rtol": 1e-6}, {"adjoint_atol": 0.3, "adjoint_rtol": 1e-6}),
    ({"adjoint_seminorm": True}, {"adjoint_options": {"norm": "seminorm"}}),
]


def adjoint_gradients(settings: dict[str, Any]) -> list[torch.Tensor]:
    module = field()
    config = SolverConfig(engine="torchdiffeq", gradient="adjoint", rtol=1e-4, atol=1e-6, **settings)
    solve_configured(module, Y0, T, config).ys.pow(2).sum().backward()
    return [p.grad for p in module.parameters()]


@pytest.mark.parametrize(("settings", "by_hand"), ADJOINTS, ids=str)
def test_adjoint(settings: dict[str, Any], by_hand: dict[str, Any]) -> None:
    module = field()
    torchdiffeq.odeint_adjoint(module, Y0, T, rtol=1e-4, atol=1e-6, **by_hand).pow(2).sum().backward()
    for ours, parameter in zip(adjoint_gradients(settings), module.parameters(), strict=True):
        assert torch.equal(ours, parameter.grad)


def test_each_setting_of_the_adjoint_matters() -> None:
    found = [torch.cat([g.flatten() for g in adjoint_gradients(settings)]) for settings, _ in ADJOINTS]
    for i, one in enumerate(found):
        assert not any(torch.equal(one, other) for other in found[i + 1 :])
