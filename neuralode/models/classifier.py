"""Classifiers whose middle is a vector field, the residual network they are compared with, and a plain perceptron."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from neuralode.errors import UsageError
from neuralode.models.registry import build_field, register_model
from neuralode.nn import ODEBlock
from neuralode.nn.fields import activation
from neuralode.ode import SolverConfig


@register_model("ode_classifier")
class ODEClassifier(nn.Module):
    """Points [B, features] flow along a vector field, then a linear layer reads the class: logits [B, classes].

    Args:
        features, classes: sizes of the data.
        solver: how to solve.
        field, field_args: registered name and arguments of the vector field.
        augment: extra zero dimensions (ANODE).
    """

    def __init__(
        self,
        features: int,
        classes: int,
        solver: SolverConfig | None = None,
        field: str = "mlp",
        field_args: dict[str, Any] | None = None,
        augment: int = 0,
    ):
        super().__init__()
        width = features + augment
        self.block = ODEBlock(build_field(field, width, field_args or {}), solver, augment=augment)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(x))


class _Stem(nn.Sequential):
    """Images [B, colours, H, W] to [B, width, H/2^k, W/2^k] with k halvings."""

    def __init__(self, colours: int, width: int, halvings: int):
        layers: list[nn.Module] = [nn.Conv2d(colours, width, 3, padding=1)]
        for _ in range(halvings):
            layers += [nn.GroupNorm(8, width), nn.ReLU(), nn.Conv2d(width, width, 4, stride=2, padding=1)]
        super().__init__(*layers)


class _Head(nn.Sequential):
    """Feature maps [B, width, h, w] to logits [B, classes]."""

    def __init__(self, width: int, pixels: int, classes: int, dropout: float):
        super().__init__(
            nn.GroupNorm(8, width), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(width * pixels, classes)
        )


@register_model("conv_ode_net")
class ConvODENet(nn.Module):
    """ODE-Net for images: convolutional stem, ODEBlock over feature maps, linear head (Chen et al. 2018).

    Args:
        image: shape (colours, H, W) of an image.
        classes: number of classes.
        solver: how to solve.
        width: channels of the state.
        halvings: how many times the stem halves H and W.
        field, field_args: registered name and arguments of the vector field.
        dropout: probability before the last layer.
    """

    def __init__(
        self,
        image: Sequence[int],
        classes: int,
        solver: SolverConfig | None = None,
        width: int = 64,
        halvings: int = 1,
        field: str = "conv",
        field_args: dict[str, Any] | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.stem = _Stem(image[0], width, halvings)
        self.block = ODEBlock(build_field(field, width, field_args or {}), solver)
        self.head = _Head(width, _pixels(image, halvings), classes, dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.stem(x)))


class _ResidualBlock(nn.Module):
    """y + f(y), f as in ConvField but without time: one Euler step of size 1."""

    def __init__(self, width: int, activation_name: str):
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width), activation(activation_name), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), activation(activation_name), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return y + self.body(y)


@register_model("resnet")
class ResNet(nn.Module):
    """The residual network of the same stem, width and head, with `blocks` residual blocks (He et al. 2016).

    Args:
        image, classes, width, halvings, dropout: as in ConvODENet.
        blocks: number of residual blocks.
        activation_name: activation inside the blocks.
    """

    def __init__(
        self,
        image: Sequence[int],
        classes: int,
        width: int = 64,
        halvings: int = 1,
        blocks: int = 6,
        activation_name: str = "softplus",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.stem = _Stem(image[0], width, halvings)
        self.body = nn.Sequential(*(_ResidualBlock(width, activation_name) for _ in range(blocks)))
        self.head = _Head(width, _pixels(image, halvings), classes, dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(x)))


@register_model("mlp")
class MLPClassifier(nn.Sequential):
    """A multilayer perceptron: features [B, features] or images [B, colours, H, W] to logits [B, classes].

    Args:
        classes: number of classes.
        features: size of flat data; None where the data are images.
        image: shape (colours, H, W) of an image; images are flattened.
        hidden: widths of the hidden layers.
        activation_name: activation after each of them.
    """

    def __init__(
        self,
        classes: int,
        features: int | None = None,
        image: Sequence[int] | None = None,
        hidden: Sequence[int] = (32, 32),
        activation_name: str = "tanh",
    ):
        if features is None:
            if image is None:
                raise UsageError("model 'mlp' needs to know features, or the shape of an image.")
            features = math.prod(image)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise([features, *hidden, classes]):
            # drawn in float32 always, so that a seed gives the same network in every precision
            layers += [nn.Linear(before, after, dtype=torch.float32), activation(activation_name)]
        super().__init__(*layers[:-1])
        self.to(torch.get_default_dtype())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(1))


def _pixels(image: Sequence[int], halvings: int) -> int:
    height, width = image[1], image[2]
    for _ in range(halvings):
        height, width = height // 2, width // 2
    return height * width
