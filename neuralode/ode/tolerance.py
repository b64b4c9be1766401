"""When an error is small enough: tolerances, norms, and the way of a number from a tensor to the host."""

from __future__ import annotations

import cmath
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from neuralode.kernels import stages as kernels
from neuralode.ode.interpolants import increment

_BATCHES = [torch._C._dispatch_key_parse(name) for name in ("FuncTorchBatched", "Batched")]


def rms(x: torch.Tensor) -> torch.Tensor:
    """Root mean square over all entries."""
    return torch.linalg.vector_norm(x) / math.sqrt(max(x.numel(), 1))


def largest_rms(sizes: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The largest of the root mean squares of the parts of a packed state; `sizes` are their numbers of entries."""

    def norm(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([rms(part) for part in x.split(list(sizes), dim=-1) if part.numel()]).max()

    return norm


@dataclass(frozen=True)
class Tolerance:
    """Relative and absolute tolerance, and the norm by which errors are weighed against them."""

    rtol: Any
    """A float, or a tensor that broadcasts against the state."""
    atol: Any
    norm: Callable[[torch.Tensor], torch.Tensor] = rms

    def ratio(self, error: torch.Tensor, y0: torch.Tensor, y1: torch.Tensor) -> float:
        """Error over tolerance; the step stands if it is at most 1."""
        return self.ratio_of_sum([error], [1.0], y0, y1)

    def ratio_of_sum(self, parts: Sequence[torch.Tensor], weights: Sequence[float], y0: torch.Tensor,
                     y1: torch.Tensor) -> float:  # fmt: skip
        """`ratio` of the error Σᵢ weights[i]·parts[i], in one pass over the memory where the kernels can."""
        if self.norm is rms and self.uniform and not watched() and kernels.serves(y0, (y1, *parts)):
            return kernels.error_ratio(parts, weights, y0, y1, self.rtol, self.atol)
        error = increment(parts, weights)
        if error is None:
            return 0.0
        scale = torch.maximum(y0.abs(), y1.abs()).mul_(self.rtol).add_(self.atol)
        if self.norm is rms:  # as below, in fewer operations
            return to_host(torch.linalg.vector_norm(error / scale)) / math.sqrt(max(error.numel(), 1))
        return abs(to_host(self.norm(error / scale)))

    @functools.cached_property
    def uniform(self) -> bool:
        """Whether the same tolerances hold for all entries."""
        return isinstance(self.rtol, float) and isinstance(self.atol, float)

    def first_step(self, y0: torch.Tensor, f0: torch.Tensor, order: int,
                   slope_after: Callable[[float], torch.Tensor]) -> float:  # fmt: skip
        """A first step size (Hairer, Nørsett, Wanner, I, section II.4), as torchdiffeq and DOPRI5 have it.

        Args:
            slope_after: f after an Euler step of a given size.
        """
        size, slope = self.ratio(y0, y0, y0), self.ratio(f0, y0, y0)
        if not (math.isfinite(size) and math.isfinite(slope)):
            return 1e-6
        h0 = 1e-6 if size < 1e-5 or slope < 1e-5 else 0.01 * size / slope
        bend = self.ratio_of_sum([slope_after(h0), f0], [1.0, -1.0], y0, y0) / h0
        if not bend < math.inf:
            return h0
        steepest = max(slope, bend)
        h1 = max(1e-6, h0 * 1e-3) if steepest <= 1e-15 else (0.01 / steepest) ** (1 / order)
        return min(100 * h0, h1)


def to_host(x: torch.Tensor) -> float:
    """A scalar as a float; under `torch.func.vmap` the largest of the mapped scalars, so that all share the steps."""
    try:
        return float(x)
    except RuntimeError:
        return float(_Largest.apply(x).detach())


def all_finite(x: torch.Tensor) -> bool:
    """Whether no entry is infinite or NaN."""
    try:
        if cmath.isfinite(x.detach().sum().item()):  # the cheapest look; of large numbers the sum may be infinite
            return True
        return bool(torch.isfinite(x).all())
    except RuntimeError:  # under torch.func.vmap
        return not to_host((~torch.isfinite(x).all()).double())


def finite_rows(x: torch.Tensor) -> torch.Tensor:
    """Whether each entry along dimension 0 is finite throughout, [B]."""
    return torch.isfinite(x.detach()).reshape(len(x), math.prod(x.shape[1:])).all(1)


def in_transform() -> bool:
    """Whether the solve runs inside a transform of torch.func."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def transformed() -> bool:
    """Whether derivatives are taken by torch.func or in forward mode, which no backward pass of ours serves."""
    return in_transform() or forward_ad._current_level >= 0


def watched() -> bool:
    """Whether something besides autograd follows the operations: a transform, a tracer, forward differentiation."""
    recorded = torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0
    return recorded or transformed()


def is_batch(x: torch.Tensor) -> bool:
    """Whether it stands for several tensors at once, as vmap has them, in its old form too."""
    keys = torch._C._dispatch_keys(x)
    return any(map(keys.has, _BATCHES))


class _Largest(torch.autograd.Function):
    generate_vmap_rule = False

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.detach().clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Largest.apply(x.amax(in_dims[0]) if in_dims[0] is not None else x), None
