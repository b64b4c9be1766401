"""A borrowed module comes back as it was, and what it computed was a function of the weights alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from neuralode import ODEBlock
from neuralode.gradient_flow import GradientField, Sharpness, derivatives, flow
from neuralode.nn import MLPField


class Busy(nn.Module):
    """Everything that a module may change when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6, max_norm=1.0)
        self.norm, self.dropout = nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.block = ODEBlock(MLPField(6, [4], "tanh"))
        self.out = nn.Linear(6, 1)
        self.nfe, self.last = 0, None
        for name in ("rebound", "changed", "hidden"):
            self.register_buffer(name, torch.zeros(3))
        self.register_buffer("unused", None)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.nfe += 1
        self.last = tokens  # type: ignore[assignment]
        self.extra = tokens.sum()
        self.rebound = self.rebound + 1
        self.changed.add_(1)
        self.hidden.data.mul_(0.9).add_(1)
        if "cache" not in self._buffers:
            self.register_buffer("cache", torch.ones(2), persistent=False)
        drawn = float(np.random.rand() + random.random() + torch.rand(()))  # noqa: NPY002
        return self.out(self.block(self.dropout(self.norm(self.embed(tokens))))) * (1 + drawn)


def loss_of(module: Any, tokens: torch.Tensor) -> torch.Tensor:
    return module(tokens).square().mean()


def failing(module: Any, tokens: torch.Tensor) -> torch.Tensor:
    loss_of(module, tokens)
    module.eval()
    raise RuntimeError("in the middle")


TOKENS = torch.arange(7)


def busy() -> Busy:
    torch.manual_seed(0)
    module = Busy()
    with torch.no_grad():
        module.embed.weight.mul_(3)  # so that max_norm has to act
    module.block.eval()  # a mixture of modes
    module.out.weight.grad = torch.ones_like(module.out.weight)
    return module


def parts(module: nn.Module) -> dict[str, Any]:
    """Objects and contents of everything that a module holds, and the random states."""
    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        found |= {f"{name}.{key}": value for key, value in vars(part).items() if not key.startswith("_")}
        found |= {
            f"{name}._buffers.{key}": (id(b), None if b is None else b.tolist()) for key, b in part._buffers.items()
        }
    for name, p in module.named_parameters():
        found[name] = (id(p), p.data_ptr(), p.tolist(), None if p.grad is None else p.grad.tolist(), p.requires_grad)
    found["random"] = (torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate())  # noqa: NPY002
    return found


USES: dict[str, Callable[[GradientField], Any]] = {
    "gradient": lambda field: field.gradient(field.theta + 0.1),
    "loss": lambda field: field.loss(field.theta + 0.1),
    "derivatives": lambda field: derivatives(field, field.theta, 0.1),
    "sharpness": lambda field: Sharpness(3, 3)(lambda v: field.product(field.theta, v), field.theta),
    "flow": lambda field: flow(field, field.theta, [0, 0.01], rtol=1e-1),
}


@pytest.mark.parametrize("use", USES)
def test_no_trace(use: str) -> None:
    module = busy()
    before = parts(module)
    USES[use](GradientField(module, loss_of, TOKENS))
    after = parts(module)
    assert after.keys() == before.keys()
    assert [name for name in before if after[name] is not before[name] and after[name] != before[name]] == []


@pytest.mark.parametrize("use", ["gradient", "loss", "flow"])
def test_no_trace_of_a_failure(use: str) -> None:
    module = busy()
    before, field = parts(module), GradientField(module, failing, TOKENS)
    with pytest.raises(RuntimeError, match="in the middle"):
        USES[use](field)
    assert parts(module) == before
    field.loss_fn = loss_of
    assert field.gradient(field.theta).isfinite().all()  # and the field still serves


def test_the_loss_is_a_function_of_the_weights() -> None:
    """Masks, averages, counters and random numbers are the same at every evaluation, borrowed once or each time."""
    field = GradientField(busy(), loss_of, TOKENS)
    theta = field.theta
    with field.borrowed():
        first = field.gradient(theta)
        field.gradient(theta + 1)
        assert torch.equal(field.gradient(theta), first)
    torch.rand(3)
    random.random()
    assert torch.equal(field.gradient(theta), first)


def test_the_seed_chooses_the_mask() -> None:
    module = busy()
    gradients = [GradientField(module, loss_of, TOKENS, seed=seed).gradient for seed in (0, 1)]
    theta = GradientField(module, loss_of, TOKENS).theta
    assert not torch.equal(gradients[0](theta), gradients[1](theta))


def test_theta_is_not_written_to() -> None:
    field = GradientField(busy(), loss_of, TOKENS)
    theta = field.theta
    kept = theta.clone()
    field.gradient(theta)
    assert torch.equal(theta, kept)


def test_batch_norm_uses_its_running_statistics() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    module(torch.randn(50, 3))
    batch = torch.randn(5, 3) + 4
    field = GradientField(module, loss_of, batch)
    found = field.loss(field.theta)
    module.eval()
    assert float(found) == pytest.approx(float(loss_of(module, batch).detach()))
    alone = GradientField(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 1)), loss_of, batch)
    assert alone.gradient(alone.theta).isfinite().all()


def test_a_pending_backward_survives() -> None:
    module = busy()
    loss = loss_of(module, TOKENS)
    expected = torch.autograd.grad(loss, module.out.weight, retain_graph=True)[0]
    field = GradientField(module, loss_of, TOKENS)
    field.gradient(field.theta + 1)
    assert torch.equal(torch.autograd.grad(loss, module.out.weight)[0], expected)


def train(observed: bool) -> tuple[nn.Module, torch.Tensor]:
    """A few epochs with dropout, batch norm and shuffling; the module at the end, and a last random number."""
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))
    x = torch.randn(24, 6)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    field = GradientField(module, loss_of, x)
    for _ in range(3):
        for rows in torch.randperm(24).split(8):
            optimizer.zero_grad()
            loss = loss_of(module, x[rows])
            if observed:
                field.gradient(field.theta)
            loss.backward()
            if observed:
                derivatives(field, field.theta, 0.1)
                flow(field, field.theta, [0, 0.2])
            optimizer.step()
    return module, torch.rand(2)


def test_training_is_the_same_with_and_without() -> None:
    (alone, drawn), (observed, again) = train(False), train(True)
    assert torch.equal(drawn, again)
    for name, value in alone.state_dict().items():
        assert torch.equal(value, observed.state_dict()[name]), name


def test_a_copy_of_a_used_module_trains_alike() -> None:
    module = busy()
    untouched = copy.deepcopy(module)
    GradientField(module, loss_of, TOKENS).gradient(torch.zeros(sum(p.numel() for p in module.parameters())))
    results = []
    for part in (module, untouched):
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        random.seed(1)
        results.append(loss_of(part, TOKENS))
    assert torch.equal(*results)
