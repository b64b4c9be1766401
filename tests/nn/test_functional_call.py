"""Gradients of an ODEBlock whose parameters are passed in, which continuous adjoints elsewhere silently lose."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from neuralode import ODEBlock, SolverConfig
from neuralode.nn import MLPField

pytestmark = pytest.mark.parametrize("gradient", ["exact", "adjoint"])


def model(gradient: str, autonomous: bool = False) -> nn.Module:
    torch.manual_seed(0)
    field = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)) if autonomous else MLPField(2, [8], time=True)
    return nn.Sequential(nn.Linear(2, 2), ODEBlock(field, SolverConfig(gradient=gradient, rtol=1e-6, atol=1e-6)))


def data() -> torch.Tensor:
    return torch.randn(4, 2, generator=torch.Generator().manual_seed(1))


def gradients_of(module: nn.Module) -> dict[str, torch.Tensor]:
    module.zero_grad()
    module(data()).pow(2).sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def other_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Values that differ from the module's own, so that a gradient at the wrong parameters is wrong."""
    return {name: (0.7 * p.detach() + 0.1).requires_grad_() for name, p in module.named_parameters()}


@pytest.mark.parametrize("autonomous", [False, True], ids=["f(t,y)", "f(y)"])
def test_gradients_are_those_of_the_normal_call(gradient: str, autonomous: bool) -> None:
    module = model(gradient, autonomous)
    weights = other_weights(module)
    normal = copy.deepcopy(module)
    normal.load_state_dict(weights)
    wanted = gradients_of(normal)

    functional_call(module, weights, (data(),)).pow(2).sum().backward()
    for name, weight in weights.items():
        assert wanted[name].abs().max() > 1e-3, name
        torch.testing.assert_close(weight.grad, wanted[name], rtol=1e-5, atol=1e-6, msg=name)
    assert all(p.grad is None for p in module.parameters()), "the module's own parameters were not used"


def test_parameters_computed_from_another_tensor(gradient: str) -> None:
    module = model(gradient)
    wanted = gradients_of(module)
    own = {name: p.detach() for name, p in module.named_parameters()}
    # at scale 1, d loss / d scale = Σ ⟨d loss / d w, w⟩
    scale = torch.ones((), requires_grad=True)
    functional_call(module, {name: scale * w for name, w in own.items()}, (data(),)).pow(2).sum().backward()
    by_hand = sum((wanted[name] * w).sum() for name, w in own.items())
    assert by_hand.abs() > 1e-2
    torch.testing.assert_close(scale.grad, by_hand, rtol=1e-4, atol=1e-5)


def test_one_sided_call_leaves_the_rest_to_the_module(gradient: str) -> None:
    module = model(gradient)
    wanted = gradients_of(module)
    module.zero_grad()
    name = "1.field.net.0.weight"
    swapped = module.get_parameter(name).detach().clone().requires_grad_()
    functional_call(module, {name: swapped}, (data(),)).pow(2).sum().backward()
    torch.testing.assert_close(swapped.grad, wanted[name], rtol=1e-5, atol=1e-6)
    assert module.get_parameter(name).grad is None
    other = "1.field.net.2.weight"
    torch.testing.assert_close(module.get_parameter(other).grad, wanted[other], rtol=1e-5, atol=1e-6)


def test_calls_with_different_weights_before_one_backward(gradient: str) -> None:
    module = model(gradient)
    one, two = other_weights(module), {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
    losses = [functional_call(module, weights, (data(),)).pow(2).sum() for weights in (one, two)]
    sum(losses).backward()
    wanted = gradients_of(module)
    for name, weight in two.items():
        torch.testing.assert_close(weight.grad, wanted[name], rtol=1e-5, atol=1e-6, msg=name)
        assert not torch.allclose(one[name].grad, weight.grad), name


def test_buffers_are_swapped_too(gradient: str) -> None:
    class Rate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rate", torch.tensor(-1.0))
            self.gain = nn.Parameter(torch.tensor(1.0))

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.gain * self.rate * y

    block = ODEBlock(Rate(), SolverConfig(gradient=gradient, rtol=1e-6, atol=1e-6))
    gain, rate = torch.tensor(1.0, requires_grad=True), torch.tensor(-0.5)
    functional_call(block, {"field.rate": rate, "field.gain": gain}, (torch.ones(1),)).sum().backward()
    # y(1) = exp(gain·rate), whose derivative by the gain is rate·exp(gain·rate)
    torch.testing.assert_close(gain.grad, rate * rate.exp(), rtol=1e-4, atol=1e-5)
