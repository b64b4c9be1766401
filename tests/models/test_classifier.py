"""Classifiers: shapes, what they are made of, and that gradients reach all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from neuralode.errors import UsageError
from neuralode.models import build_model
from neuralode.models.classifier import ConvODENet, MLPClassifier, ODEClassifier, ResNet
from neuralode.ode import SolverConfig

RK4 = SolverConfig(method="rk4", step_size=0.5)


def images(colours: int, side: int) -> torch.Tensor:
    return torch.randn(2, colours, side, side, generator=torch.Generator().manual_seed(0))


def grads(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor | None]:
    model(x).pow(2).sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("gradient", ["exact", "adjoint"])
@pytest.mark.parametrize("augment", [0, 2])
def test_ode_classifier(augment: int, gradient: str) -> None:
    torch.manual_seed(0)
    model = ODEClassifier(3, 4, SolverConfig(gradient=gradient), augment=augment)
    x = torch.randn(5, 3)
    assert model(x).shape == (5, 4)
    assert model.block(x).shape == (5, 3 + augment)
    assert all(g is not None and g.abs().max() > 0 for g in grads(model, x))


def test_ode_classifier_reads_the_end_of_the_flow() -> None:
    model, x = ODEClassifier(2, 2), torch.randn(5, 2)
    torch.testing.assert_close(model(x), model.head(model.block.solve(x, [0.0, 0.5, 1.0]).final), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("build", [ConvODENet, ResNet])
@pytest.mark.parametrize(("colours", "side", "halvings"), [(1, 8, 0), (1, 8, 1), (3, 12, 2), (1, 7, 1)], ids=str)
def test_image_models(build: Any, colours: int, side: int, halvings: int) -> None:
    torch.manual_seed(0)
    extra = {"solver": RK4} if build is ConvODENet else {"blocks": 2}
    model = build([colours, side, side], 5, width=8, halvings=halvings, **extra)
    x = images(colours, side)
    assert model(x).shape == (2, 5)
    assert model.stem(x).shape == (2, 8, side // 2**halvings, side // 2**halvings)
    assert all(g is not None for g in grads(model, x))


def test_images_need_not_be_square() -> None:
    for model in (ConvODENet([1, 8, 12], 3, RK4, width=8), ResNet([1, 8, 12], 3, width=8, blocks=1)):
        assert model(torch.randn(2, 1, 8, 12)).shape == (2, 3)


def test_both_image_models_differ_in_the_middle_alone() -> None:
    net, residual = ConvODENet([1, 8, 8], 3, RK4, width=8), ResNet([1, 8, 8], 3, width=8, blocks=2)
    for part in ("stem", "head"):
        sizes = [[p.shape for p in getattr(model, part).parameters()] for model in (net, residual)]
        assert sizes[0] == sizes[1]


def test_residual_blocks_are_added_to_the_identity() -> None:
    few, many = (ResNet([1, 8, 8], 3, width=8, blocks=n) for n in (1, 3))
    size = sum(p.numel() for p in many.body.parameters())
    assert size == 3 * sum(p.numel() for p in few.body.parameters()) > 0
    y = torch.randn(2, 8, 4, 4)
    with torch.no_grad():
        for p in many.body.parameters():
            p.zero_()
    assert torch.equal(many.body(y), y)


def test_dropout_acts_in_training_alone() -> None:
    torch.manual_seed(0)
    model, x = ConvODENet([1, 8, 8], 3, RK4, width=8, dropout=0.5), images(1, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_linear_starts_at_zero() -> None:
    model = build_model("linear", {"features": 3, "targets": 2})
    assert torch.equal(model(torch.randn(4, 3)), torch.zeros(4, 2))
    assert sum(p.numel() for p in model.parameters()) == 8


def test_mlp_is_the_plain_sequential() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    torch.manual_seed(0)
    model = build_model("mlp", {"features": 64, "classes": 10})
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    x = torch.randn(5, 64)
    assert torch.equal(model(x), plain(x))


def test_mlp_of_a_seed_is_the_same_in_every_precision() -> None:
    torch.manual_seed(0)
    single, after = MLPClassifier(3, features=6, hidden=[4]), torch.rand(1)
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        double = MLPClassifier(3, features=6, hidden=[4])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.rand(1), after), "and the generator goes on from the same place"
    assert all(p.dtype == torch.float64 for p in double.parameters())
    assert all(torch.equal(a.double(), b) for a, b in zip(single.parameters(), double.parameters(), strict=True))


def test_mlp_flattens_images() -> None:
    model = MLPClassifier(3, image=[2, 4, 5], hidden=[7], activation_name="relu")
    x = torch.randn(6, 2, 4, 5)
    assert model(x).shape == (6, 3)
    assert torch.equal(model(x), model(x.flatten(1)))
    assert all(g is not None and g.abs().max() > 0 for g in grads(model, x))
    assert [p.shape for p in MLPClassifier(3, features=2, hidden=[]).parameters()] == [(3, 2), (3,)]
    with pytest.raises(UsageError, match="features, or the shape of an image"):
        MLPClassifier(3)
