"""The field of the gradient flow dθ/ds = −∇L(θ)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from neuralode.errors import UsageError
from neuralode.gradient_flow.frozen import Frozen, flatten, frozen

LossFunction = Callable[[Any, Any], torch.Tensor]
"""(module, batch) to the loss, a scalar."""


class GradientField:
    """−∇L as a field in the space of the weights: `field(s, theta)`, a vector [P] to a vector [P].

    The module is borrowed: after every call it is as it was, weights, gradients, buffers, modes, attributes and
    random states included, also when the call fails. Batch norms use their running statistics, dropout draws the same
    mask each time, and autocast is off, so that L is a function of θ.

    Args:
        module: whatever `loss_fn` evaluates.
        loss_fn: (module, batch) to a scalar.
        batch: handed to `loss_fn` as it is.
        parameters: the weights that move, in the order of θ; all that require a gradient if not given.
        seed: of dropout masks.
        transform: applied to each gradient [P], for example a clipping.
        own_statistics: batch norms use the statistics of this batch, which do not change as training goes on.

    Raises:
        UsageError: if no weight moves, or the weights are of several types or devices, or not real.
    """

    def __init__(
        self, module: nn.Module, loss_fn: LossFunction, batch: Any, parameters: Sequence[nn.Parameter] | None = None,
        seed: int = 0, transform: Callable[[torch.Tensor], torch.Tensor] | None = None, own_statistics: bool = False,
    ):  # fmt: skip
        self.module, self.loss_fn, self.batch, self.seed, self.transform = module, loss_fn, batch, seed, transform
        self.own_statistics = own_statistics
        chosen = module.parameters() if parameters is None else parameters
        self.parameters = [p for p in chosen if p.requires_grad]
        kinds = {(p.dtype, p.device) for p in self.parameters}
        if len(kinds) != 1 or not self.parameters[0].is_floating_point():
            found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds)) or "none at all"
            raise UsageError(f"a gradient flow takes real weights of one type on one device; here are {found}.")
        self.gradients = self.losses = 0
        """How many gradients, and losses alone, were evaluated."""
        self._state: Frozen | None = None

    @property
    def theta(self) -> torch.Tensor:
        """The module's present weights, a copy, [P]."""
        return flatten(self.parameters, self.parameters)

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[Frozen]:
        """Borrows the module for many evaluations, which is cheaper than for each."""
        if self._state is not None:
            yield self._state
            return
        with frozen(self.module, self.parameters, self.seed, self.own_statistics) as state:
            self._state = state
            try:
                yield state
            finally:
                self._state = None

    @contextlib.contextmanager
    def untransformed(self) -> Iterator[None]:
        """Inside the block gradients and products are those of the loss itself."""
        transform, self.transform = self.transform, None
        try:
            yield
        finally:
            self.transform = transform

    @contextlib.contextmanager
    def loss_with_graph(self, theta: torch.Tensor) -> Iterator[torch.Tensor]:
        """The loss at θ with its graph to `parameters`, inside a block."""
        with self.borrowed() as state, state.at(theta.detach()), torch.enable_grad():
            loss = self.loss_fn(self.module, self.batch)
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                raise UsageError("loss_fn has to return the loss as a tensor with one entry.")
            yield loss

    def loss(self, theta: torch.Tensor) -> torch.Tensor:
        """L(θ), a scalar without a graph."""
        self.losses += 1
        with self.borrowed() as state, state.at(theta.detach()), torch.no_grad():
            return self.loss_fn(self.module, self.batch).detach()

    def loss_and_gradient(self, theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """L(θ) and ∇L(θ), [P], without graphs; the gradient goes through `transform`."""
        self.gradients += 1
        with self.loss_with_graph(theta) as loss:
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        gradient = flatten(found, self.parameters)
        return loss.detach(), gradient if self.transform is None else self.transform(gradient)

    def gradient(self, theta: torch.Tensor) -> torch.Tensor:
        """∇L(θ), [P]."""
        return self.loss_and_gradient(theta)[1]

    def __call__(self, s: Any, theta: torch.Tensor) -> torch.Tensor:
        return -self.gradient(theta)

    def product(self, theta: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """H(θ)v by a central difference of gradients along v: two gradients, and no double backward.

        So it passes through `odeint_adjoint`, which has none, and through layers whose second derivative is wrong.
        """
        length = torch.linalg.vector_norm(v)
        if length == 0:
            return torch.zeros_like(v)
        step = v * (reach(theta.dtype) / length)
        return (self.gradient(theta + step) - self.gradient(theta - step)) * (length / (2 * reach(theta.dtype)))


def reach(dtype: torch.dtype) -> float:
    """How far in θ the differences of gradients reach: where rounding and curvature err about alike."""
    return 3e-4 if dtype == torch.float64 else 0.02
