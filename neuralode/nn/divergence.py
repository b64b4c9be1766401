"""The divergence of a vector field, and the density that flows along it: continuous normalising flows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from neuralode.errors import UsageError, unknown
from neuralode.nn.fields import MLPField

TRACES = ("exact", "hutchinson")

Along = Callable[[torch.Tensor], torch.Tensor]
Slope = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def _silu_slope(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    gate = torch.sigmoid(x)
    return gate + y * (1 - gate)


def _softplus_slope(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    assert isinstance(layer, nn.Softplus)
    slope = torch.sigmoid(layer.beta * x)
    if layer.threshold >= 20:  # where it is one in any case
        return slope
    return torch.where(layer.beta * x > layer.threshold, 1.0, slope)


_SLOPES: dict[type[nn.Module], Slope] = {
    nn.Tanh: lambda layer, x, y: 1 - y * y,
    nn.Sigmoid: lambda layer, x, y: y * (1 - y),
    nn.Softplus: _softplus_slope,
    nn.SiLU: _silu_slope,
}
"""Derivatives of activations by argument and value."""


class DensityField(nn.Module):
    """A state and the logarithm of its density, dy/dt = f(t, y) and d log p/dt = −tr ∂f/∂y.

    The instantaneous change of variables (Chen et al. 2018, equation 8). The state of a solve is the tuple (y, log p),
    of shapes [B, D] and [B]. Of an MLPField with tanh, sigmoid, softplus or silu whose layers are plain ones without
    hooks the trace is written out: with one hidden layer it is a sum, with two one more product,
    tr J = σ₂′ᵀ (W₂ ∘ (W₁ W₃)ᵀ) σ₁′, beyond that D tangents; the kernels know all of these. Of any other field it takes
    D products with the Jacobian.

    Args:
        field: f(t, y), states [B, D].
        trace: "exact", or "hutchinson" for εᵀ J ε with one random sign vector ε a sample (Grathwohl et al. 2019), to be
            drawn by `draw` before each solve.

    Raises:
        UsageError: for an unknown trace, or a state that is not (y, log p).
    """

    noise: torch.Tensor | None

    def __init__(self, field: nn.Module, trace: str = "exact"):
        super().__init__()
        if trace not in TRACES:
            raise UsageError(unknown("trace", trace, TRACES))
        self.field, self.trace = field, trace
        self.register_buffer("noise", None, persistent=False)

    def draw(self, y: torch.Tensor, generator: torch.Generator | None = None) -> None:
        """Draws the signs ε for states like y, [B, D]; they have to stay the same during a solve."""
        signs = torch.randint(0, 2, y.shape, generator=generator, device=y.device)
        self.noise = signs.to(y.dtype) * 2 - 1

    def forward(self, t: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        if not (isinstance(state, tuple) and len(state) == 2 and state[0].dim() == 2):
            raise UsageError("a DensityField needs the state (y, log p) of shapes [B, D] and [B].")
        y = state[0]
        if self.trace == "hutchinson":
            if self.noise is None or self.noise.shape != y.shape:
                raise UsageError(f"no noise was drawn for a state {tuple(y.shape)}; call draw(y) before the solve.")
            dy, along = _derivative(self.field, t, y)
            return dy, -(along(self.noise) * self.noise).sum(-1)
        dy, divergence = _exact(self.field, t, y)
        return dy, -divergence


def _exact(field: nn.Module, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f(t, y) and the trace of its Jacobian, [B]."""
    layers = _layers(field)
    depth = len(layers.weights) - 1 if layers is not None and layers.power == 1 else None
    if layers is not None and depth == 1:
        first, last = layers.weights
        dy, (slope,) = layers.run(t, y)
        return dy, (slope * (first * last.t()).sum(1)).sum(-1)
    if layers is not None and depth == 2:
        first, middle, last = layers.weights
        dy, (inner, outer) = layers.run(t, y)
        return dy, ((inner @ (middle * (first @ last).t()).t()) * outer).sum(-1)
    dy, along = _derivative(field, t, y)
    total = torch.zeros_like(y[:, 0])
    for i in range(y.shape[-1]):
        direction = torch.zeros_like(y)
        direction[:, i] = 1.0
        total = total + along(direction)[:, i]
    return dy, total


def _derivative(field: nn.Module, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, Along]:
    """f(t, y), and the function that gives its derivative along a direction [B, D]."""
    layers = _layers(field)
    if layers is None:
        return field(t, y), lambda v: torch.func.jvp(lambda y: field(t, y), (y,), (v,))[1]
    dy, slopes = layers.run(t, y)

    def through_layers(v: torch.Tensor) -> torch.Tensor:
        if layers.power != 1:
            v = v * layers.power * y ** (layers.power - 1)
        for weight, slope in zip(layers.weights, slopes, strict=False):
            v = (v @ weight.t()) * slope
        return v @ layers.weights[-1].t()

    return dy, through_layers


class _Layers:
    """An MLPField taken apart."""

    def __init__(self, field: MLPField, layers: list[Any]):
        self.field, self.layers, self.power = field, layers, field.power
        first, *others = (layer.weight for layer in layers[::2])
        features = others[-1].shape[0] if others else first.shape[0]
        self.weights = [first[:, :features], *others]
        """Of the layers as functions of the state: the time's column is left out."""

    def run(self, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """f(t, y) and the derivatives of the activations, [B, width] each."""
        x, slopes = self.field.inputs(t, y), []
        for layer in self.layers:
            value = layer(x)
            slope = _SLOPES.get(type(layer))
            if slope:
                slopes.append(slope(layer, x, value))
            x = value
        return x, slopes


def _layers(field: nn.Module) -> _Layers | None:
    """The field's layers, if it is an MLPField as it was made, whose activations have a derivative here."""
    if type(field) is not MLPField or type(net := cast(Any, field.net)) is not nn.Sequential:
        return None
    layers = list(net)
    linear = all(type(layer).forward is nn.Linear.forward for layer in layers[::2])
    known = linear and len(layers) % 2 and all(type(layer) in _SLOPES for layer in layers[1::2])
    return _Layers(field, layers) if known and all(map(_is_plain, (field, net, *layers))) else None


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of a module is the forward of its class, without hooks, and leaves its argument as it was."""
    own = module.__dict__
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in own or own.get("inplace"))
