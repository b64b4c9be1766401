"""Vector fields: the right-hand sides f(t, y; θ) that a solve integrates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from neuralode.errors import UsageError, unknown

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "elu": nn.ELU,
}


def activation(name: str) -> nn.Module:
    """A new activation layer. Raises UsageError for a name that is not in ACTIVATIONS."""
    if name not in ACTIVATIONS:
        raise UsageError(unknown("activation", name, ACTIVATIONS))
    return ACTIVATIONS[name]()


class MLPField(nn.Module):
    """A multilayer perceptron as a vector field: [B, features] to [B, features].

    Args:
        features: size of the state.
        hidden: widths of the hidden layers.
        activation_name: one of ACTIVATIONS.
        time: give t to the network as a further input.
        power: the network sees y to this power; 3 is torchdiffeq's spiral demo.
        init_std: standard deviation of the initial weights, biases then start at zero; None is torch's default.
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (64, 64),
        activation_name: str = "tanh",
        time: bool = False,
        power: int = 1,
        init_std: float | None = None,
    ):
        super().__init__()
        self.time, self.power = time, power
        widths = [features + int(time), *hidden]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), activation(activation_name)]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], features))
        if init_std is not None:
            for layer in self.net:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=init_std)
                    nn.init.zeros_(layer.bias)

    def inputs(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What the network sees, [B, features], or [B, features + 1] with the time."""
        if self.power != 1:
            y = y**self.power
        if self.time:
            y = torch.cat([y, t.to(y).expand(*y.shape[:-1], 1)], dim=-1)
        return y

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.net(self.inputs(t, y))


class ConvField(nn.Module):
    """Two 3x3 convolutions with group normalisation as a vector field: [B, C, H, W] to the same shape.

    The field of the ODE-Net of Chen et al. 2018, with t as one more channel of each convolution.

    Args:
        features: number of channels C of the state.
        hidden: channels between the two convolutions; C if None.
        activation_name: one of ACTIVATIONS.
        groups: groups of the normalisation; has to divide both channel counts.
    """

    def __init__(self, features: int, hidden: int | None = None, activation_name: str = "softplus", groups: int = 8):
        super().__init__()
        hidden = hidden or features
        if features % groups or hidden % groups:
            raise UsageError(f"ConvField has {features} and {hidden} channels; groups={groups} has to divide both.")
        self.norm1, self.norm2 = nn.GroupNorm(groups, features), nn.GroupNorm(groups, hidden)
        self.conv1 = nn.Conv2d(features + 1, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden + 1, features, 3, padding=1)
        self.activation = activation(activation_name)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        time = t.to(y).expand(y.shape[0], 1, *y.shape[2:])
        y = self.conv1(torch.cat([self.activation(self.norm1(y)), time], dim=1))
        return self.conv2(torch.cat([self.activation(self.norm2(y)), time], dim=1))


class AttentionField(nn.Module):
    """Causal self-attention and a perceptron side by side as a vector field: [B, L, features] to the same shape.

    Both see the layer-normalised state, with t as one more feature of every position. A step of size 1 of Euler's
    method is then a transformer block, its two parts in parallel (Lu et al. 2019, "Understanding and Improving
    Transformer From a Multi-Particle Dynamic System Point of View"): attention moves the positions as particles that
    act on each other, the perceptron moves each by itself. No position sees a later one.

    Args:
        features: size of each position's state.
        heads: of the attention; has to divide `features`.
        hidden: width of the perceptron; 4 times `features` if None.
        activation_name: one of ACTIVATIONS.
        time: give t to both parts.
    """

    def __init__(self, features: int, heads: int = 4, hidden: int | None = None, activation_name: str = "silu",
                 time: bool = True):  # fmt: skip
        super().__init__()
        if heads < 1 or features < 1 or features % heads:
            raise UsageError(f"AttentionField has {features} features; heads={heads} has to divide them.")
        if hidden is not None and hidden < 1:
            raise UsageError(f"AttentionField has hidden={hidden}; it has to be at least 1.")
        self.heads, self.time = heads, time
        seen, hidden = features + int(time), hidden or 4 * features
        self.norm = nn.LayerNorm(features)
        self.queries_keys_values = nn.Linear(seen, 3 * features)
        self.mixed = nn.Linear(features, features)
        self.mlp = nn.Sequential(nn.Linear(seen, hidden), activation(activation_name), nn.Linear(hidden, features))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.norm(y)
        if self.time:
            x = torch.cat([x, t.to(y).expand(*y.shape[:-1], 1)], dim=-1)
        return self.attention(x) + self.mlp(x)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """What each position takes over from itself and from those before it, [B, L, features]."""
        q, k, v = self.queries_keys_values(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        # written out: PyTorch's fused attention has no second derivative, which the sharpness needs
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        taken = scores.masked_fill(later, -math.inf).softmax(-1) @ v
        return self.mixed(taken.transpose(1, 2).flatten(2))


class LotkaVolterraField(nn.Module):
    """Prey x and predator z with learned positive coefficients: ẋ = αx − βxz, ż = δxz − γz; [B, 2] to [B, 2].

    Lotka 1925, Volterra 1926. The coefficients are kept as logarithms, so that they stay positive.

    Args:
        features: size of the state; has to be 2.
        initial: α, β, δ, γ to start from, in the units of the scaled state and of t.
    """

    def __init__(self, features: int = 2, initial: Sequence[float] = (0.5, 0.5, 0.5, 0.5)):
        super().__init__()
        if features != 2:
            raise UsageError(f"lotka_volterra describes two species, prey then predator; the data has {features}.")
        if len(initial) != 4 or min(initial) <= 0:
            raise UsageError(f"initial is {list(initial)}; it has to be four positive numbers, α, β, δ, γ.")
        self.log_coefficients = nn.Parameter(torch.tensor(initial, dtype=torch.get_default_dtype()).log())

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        alpha, beta, delta, gamma = self.log_coefficients.exp()
        prey, predator = y.unbind(-1)
        meeting = prey * predator
        return torch.stack([alpha * prey - beta * meeting, delta * meeting - gamma * predator], dim=-1)
