"""AdamThenLBFGS: Adam to the bit, then L-BFGS to the minimum."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from neuralode.nn.optimizers import AdamThenLBFGS


def start() -> torch.Tensor:
    return torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)


def rosenbrock(x: torch.Tensor) -> torch.Tensor:
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def closure(x: torch.Tensor, optimizer: torch.optim.Optimizer) -> Callable[[], torch.Tensor]:
    def evaluate() -> torch.Tensor:
        optimizer.zero_grad()
        loss = rosenbrock(x)
        loss.backward()
        return loss

    return evaluate


def run(x: torch.Tensor, optimizer: torch.optim.Optimizer, steps: int) -> torch.Tensor:
    for _ in range(steps):
        optimizer.step(closure(x, optimizer))
    return x.detach().clone()


def test_first_steps_are_those_of_adam() -> None:
    x, y = start(), start()
    ours = run(x, AdamThenLBFGS([x], lr=0.02, adam_steps=10), 10)
    assert torch.equal(ours, run(y, torch.optim.Adam([y], lr=0.02), 10))


def test_step_after_adam_is_lbfgs() -> None:
    x = start()
    optimizer = AdamThenLBFGS([x], adam_steps=5)
    before = rosenbrock(torch.from_numpy(run(x, optimizer, 5).numpy()))
    after = rosenbrock(run(x, optimizer, 1))
    y = start()
    adam_alone = rosenbrock(run(y, torch.optim.Adam([y], lr=0.01), 6))
    assert after < before / 5
    assert after < adam_alone / 5


def test_finds_the_minimum_that_adam_does_not() -> None:
    x, y = start(), start()
    found = run(x, AdamThenLBFGS([x], adam_steps=20), 30)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=1e-6)
    assert (run(y, torch.optim.Adam([y], lr=0.01), 30) - 1).norm() > 0.1


def test_step_returns_the_loss_before_it() -> None:
    x = start()
    optimizer = AdamThenLBFGS([x], adam_steps=1)
    for _ in range(2):
        before = rosenbrock(x.detach())
        assert torch.equal(optimizer.step(closure(x, optimizer)).detach(), before)


def test_needs_a_closure() -> None:
    with pytest.raises(ValueError, match="closure"):
        AdamThenLBFGS([start()]).step()


@pytest.mark.parametrize("stop", [3, 6, 9])
def test_goes_on_from_its_state_to_the_bit(stop: int) -> None:
    x = start()
    whole = run(x, AdamThenLBFGS([x], adam_steps=6, max_iter=3), 12)

    y = start()
    first = AdamThenLBFGS([y], adam_steps=6, max_iter=3)
    middle = run(y, first, stop)
    state = copy.deepcopy(first.state_dict())
    z = middle.requires_grad_()
    second = AdamThenLBFGS([z], adam_steps=6, max_iter=3)
    second.load_state_dict(state)
    assert torch.equal(run(z, second, 12 - stop), whole)


@pytest.mark.parametrize("loaded", [False, True])
def test_scheduler_acts_on_adam(loaded: bool) -> None:
    x = start()
    optimizer = AdamThenLBFGS([x], lr=0.02)
    if loaded:
        optimizer.load_state_dict(copy.deepcopy(AdamThenLBFGS([start()], lr=0.02).state_dict()))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    moved = run(x, optimizer, 1)
    scheduler.step()
    assert not torch.equal(moved, start().detach())
    assert torch.equal(run(x, optimizer, 3), moved), "with a step size of zero nothing moves"
