"""The gradient field: values, order of the weights, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from neuralode.errors import UsageError
from neuralode.gradient_flow import GradientField
from tests.gradient_flow.networks import mean_square, mlp, network_field, relative


class Partly(nn.Module):
    """Weights that are used, unused, tied, frozen and scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(5, 5)
        self.tied = nn.Linear(5, 5)
        self.tied.weight = self.used.weight
        self.unused = nn.Parameter(torch.ones(4))
        self.still = nn.Linear(5, 3).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.still(self.scale * self.tied(self.used(x).tanh()))


def backward(field: GradientField) -> list[torch.Tensor]:
    field.module.zero_grad()
    field.loss_fn(field.module, field.batch).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in field.parameters]


def test_values() -> None:
    field = network_field()
    loss, gradient = field.loss_and_gradient(field.theta)
    torch.testing.assert_close(gradient, torch.cat([g.reshape(-1) for g in backward(field)]), rtol=0, atol=1e-15)
    assert float(loss) == float(field.loss(field.theta)) == float(mean_square(field.module, field.batch).detach())
    assert torch.equal(field(None, field.theta), -gradient)
    assert not loss.requires_grad
    assert not gradient.requires_grad


def test_other_weights() -> None:
    field = network_field()
    here = field.theta
    there = here + 0.1
    away = field.gradient(there)
    with torch.no_grad():
        for p in field.parameters:
            p.add_(0.1)
    torch.testing.assert_close(field.theta, there)
    torch.testing.assert_close(torch.cat([g.reshape(-1) for g in backward(field)]), away)


def test_unused_tied_frozen_and_scalar_weights() -> None:
    field = network_field(Partly)
    assert field.theta.numel() == 25 + 5 + 5 + 4 + 1
    gradient = field.gradient(field.theta)
    torch.testing.assert_close(gradient, torch.cat([g.reshape(-1) for g in backward(field)]))
    names = [name for name, p in field.module.named_parameters() if p.requires_grad]
    parts = dict(zip(names, gradient.split([p.numel() for p in field.parameters]), strict=True))
    assert not parts["unused"].any()
    assert parts["scale"].abs().min() > 0
    step = 1e-6 * torch.cat([torch.full_like(parts[name], name == "used.weight") for name in names])
    difference = (field.loss(field.theta + step) - field.loss(field.theta - step)) / 2
    assert relative(difference, step @ gradient) < 1e-6


def test_order_of_the_weights() -> None:
    base = network_field()
    field = GradientField(base.module, mean_square, base.batch, base.parameters[::-1])
    sizes = [p.numel() for p in base.parameters]
    assert torch.equal(field.theta, torch.cat(base.theta.split(sizes)[::-1]))
    assert torch.equal(field.gradient(field.theta), torch.cat(base.gradient(base.theta).split(sizes)[::-1]))


def test_some_of_the_weights() -> None:
    base = network_field()
    field = GradientField(base.module, mean_square, base.batch, base.parameters[2:])
    assert torch.equal(field.gradient(field.theta), base.gradient(base.theta)[-len(field.theta) :])


def test_transform() -> None:
    base = network_field()
    field = GradientField(base.module, mean_square, base.batch, transform=lambda g: g.clamp(-0.01, 0.01))
    assert torch.equal(field.gradient(field.theta), base.gradient(base.theta).clamp(-0.01, 0.01))
    assert float(field(0.0, field.theta).abs().max()) == 0.01
    with field.untransformed():
        assert torch.equal(field.gradient(field.theta), base.gradient(base.theta))
    assert float(field.gradient(field.theta).abs().max()) == 0.01


def test_counts() -> None:
    field = network_field()
    field.gradient(field.theta)
    field.loss(field.theta)
    field.product(field.theta, torch.ones_like(field.theta))
    assert (field.gradients, field.losses) == (3, 1)


def test_in_modes_without_gradients() -> None:
    """Where Lightning validates, for instance."""
    field = network_field()
    true, theta = field.gradient(field.theta), field.theta
    with torch.no_grad():
        assert torch.equal(field.gradient(field.theta), true)
        with field.borrowed():
            assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert torch.equal(field.gradient(field.theta), true)
        assert torch.equal(field.gradient(theta), true)
    assert all(p.requires_grad and not p.is_inference() for p in field.parameters)
    backward(field)


def test_autocast_is_off() -> None:
    field = network_field(dtype=torch.float32)
    true = field.gradient(field.theta)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(field.gradient(field.theta), true)
        assert torch.is_autocast_enabled("cpu")


def test_loss_has_to_be_a_scalar() -> None:
    for loss_fn in (lambda module, batch: module(batch[0]), lambda module, batch: 1.0):
        field = GradientField(mlp(), loss_fn, (torch.randn(2, 5),))
        with pytest.raises(UsageError, match="a tensor with one entry"):
            field.gradient(field.theta)


def mixed() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3).double())


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Tanh(), "here are none at all"),
        (mlp().requires_grad_(False), "here are none at all"),
        (mixed(), r"here are torch\.float32 on cpu, torch\.float64 on cpu"),
        (nn.Linear(2, 2, dtype=torch.complex64), r"here are torch\.complex64 on cpu"),
    ],
)
def test_refused(module: nn.Module, words: str) -> None:
    with pytest.raises(UsageError, match=f"real weights of one type on one device; {words}"):
        GradientField(module, mean_square, None)


def test_frozen_weights_of_another_type_are_welcome() -> None:
    module: Any = mixed()
    module[0].requires_grad_(False)
    assert len(GradientField(module, mean_square, None).theta) == 15


def test_own_statistics_of_batch_norm_do_not_see_the_running_ones() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    batch = torch.randn(16, 3, dtype=torch.float64)

    def loss(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m(x).square().mean()

    fields = {own: GradientField(module, loss, batch, own_statistics=own) for own in (False, True)}
    theta = fields[True].theta
    before = {own: float(field.loss(theta)) for own, field in fields.items()}
    module[1].running_mean.add_(3.0)  # type: ignore[operator, union-attr]
    kept = module[1].running_mean.clone()  # type: ignore[operator, union-attr]
    assert float(fields[True].loss(theta)) == before[True]
    assert float(fields[False].loss(theta)) != before[False]
    assert torch.equal(module[1].running_mean, kept)  # type: ignore[arg-type]
