"""The replica against the real optimiser on the real module, also when it starts in the middle of training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from neuralode.gradient_flow import GradientField, OptimizerState, Replica, capture
from tests.gradient_flow.networks import mean_square, mlp, network_field

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.1, "weight_decay": 0.01}),
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "dampening": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}),
    "nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw": (AdamW, {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.1}),
    "adamw, tensor rate": (AdamW, {"lr": torch.tensor(0.01, dtype=torch.float64), "foreach": False}),
}


class Scaled(nn.Module):
    """An MLP with a scalar (0-dimensional) weight."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = mlp(), nn.Parameter(torch.tensor(1.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.net(x)


def training(name: str) -> tuple[GradientField, Optimizer, Any]:
    """Two groups in an order that is not the module's, and a schedule that drops after 6 steps."""
    base = network_field(Scaled)
    module = base.module
    assert isinstance(module, Scaled)
    cls, settings = OPTIMIZERS[name]
    groups = [
        {"params": list(module.net[2].parameters())},
        {"params": [module.scale, *module.net[0].parameters()], "lr": 0.3 * settings["lr"]},
    ]
    optimizer = cls(groups, **settings)
    chosen = [p for group in optimizer.param_groups for p in group["params"]]
    field = GradientField(module, mean_square, base.batch, chosen)
    return field, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 6, 0.1)


def train(field: GradientField, optimizer: Optimizer, schedule: Any, steps: int) -> list[list[float]]:
    """The rates of each step and group."""
    rates = []
    for _ in range(steps):
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.zero_grad()
        mean_square(field.module, field.batch).backward()
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("begun", [0, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replica_is_the_optimizer(name: str, begun: int) -> None:
    field, optimizer, schedule = training(name)
    train(field, optimizer, schedule, begun)
    start, state = field.theta, capture(optimizer)
    rates = train(field, optimizer, schedule, 10)
    ends = field.theta
    replica = Replica(start, state)
    for row in rates:
        theta = replica.step(field.gradient(replica.theta), row)
    assert (ends - start).norm() > 0.01
    torch.testing.assert_close(theta, ends, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_capture_is_a_copy(name: str) -> None:
    field, optimizer, schedule = training(name)
    train(field, optimizer, schedule, 3)
    state, start = capture(optimizer), field.theta
    before = [Replica(start, state).step(torch.ones_like(start)) for _ in range(2)]
    assert torch.equal(*before)  # nor does a replica use up the state
    train(field, optimizer, schedule, 9)
    assert torch.equal(Replica(start, state).step(torch.ones_like(start)), before[0])


def test_replica_leaves_the_training_alone() -> None:
    field, optimizer, schedule = training("adam")
    train(field, optimizer, schedule, 2)
    weights, kept = field.theta, [optimizer.state[p]["exp_avg"].clone() for p in field.parameters]
    replica = Replica(field.theta, capture(optimizer))
    replica.step(torch.ones_like(weights), [1.0, 1.0])
    assert torch.equal(field.theta, weights)
    assert all(torch.equal(optimizer.state[p]["exp_avg"], x) for p, x in zip(field.parameters, kept, strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.003])


def test_vectors_follow_theta() -> None:
    field, optimizer, schedule = training("momentum")
    state = capture(optimizer)
    assert state.sizes == [27, 49]
    assert not state.vector("momentum_buffer", field.theta).any()
    train(field, optimizer, schedule, 1)
    before = field.theta
    buffers = capture(optimizer).vector("momentum_buffer", before)
    rates = torch.cat([torch.full((27,), 0.1, dtype=torch.float64), torch.full((49,), 0.1 * 0.3, dtype=torch.float64)])
    train(field, optimizer, schedule, 1)
    after = capture(optimizer).vector("momentum_buffer", before)
    torch.testing.assert_close(field.theta, before - rates * after, rtol=0, atol=1e-14)
    assert not torch.equal(after, buffers)


def test_steps() -> None:
    field, optimizer, schedule = training("adam")
    assert capture(optimizer).steps == 0
    train(field, optimizer, schedule, 3)
    assert capture(optimizer).steps == 3
    assert capture(SGD(field.parameters, lr=0.1)).steps == 0


def test_frozen_weights_are_no_part() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3), requires_grad=False)
    assert capture(SGD([a, b], lr=0.1)).sizes == [2]


class Mine(Adam):
    """A subclass of one's own."""

    def __init__(self, params: Any, extra: int):
        super().__init__(params, lr=0.01)
        self.extra = extra


def test_subclass_is_replayed_by_its_parent() -> None:
    weight = nn.Parameter(torch.ones(2))
    state = capture(Mine([weight], extra=3))
    assert state.cls is Adam
    torch.testing.assert_close(Replica(torch.ones(2), state).step(torch.ones(2)), torch.full((2,), 0.99))


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_saved_and_restored(name: str, tmp_path: Any) -> None:
    field, optimizer, schedule = training(name)
    train(field, optimizer, schedule, 2)
    state = capture(optimizer)
    torch.save(state.state_dict(), tmp_path / "state.pt")
    restored = OptimizerState.restored(torch.load(tmp_path / "state.pt"))
    slope = torch.ones_like(field.theta)
    assert torch.equal(*(Replica(field.theta, x).step(slope) for x in (state, restored)))
