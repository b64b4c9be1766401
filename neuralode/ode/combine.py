"""Combinations of a step's slopes: in one pass over the memory where the kernels can, else operation by operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from neuralode.kernels import stages as kernels
from neuralode.ode.controllers import Controller
from neuralode.ode.interpolants import advance, increment
from neuralode.ode.tolerance import Tolerance, is_batch, watched

Row = Sequence[tuple[int, float]]
"""The slopes that a combination takes, by index, and their weights."""

_LARGE = 2**17
"""Entries of a state from which on a pass over memory takes longer than what Python does around it."""


def nonzero(row: Sequence[float]) -> list[tuple[int, float]]:
    return [(i, weight) for i, weight in enumerate(row) if weight]


def end(y: torch.Tensor, slopes: Sequence[torch.Tensor], row: Row, h: Any) -> torch.Tensor:
    """y + h Σᵢ bᵢkᵢ, the increments summed before y comes in: one rounding at the size of y a step."""
    if isinstance(h, torch.Tensor):
        slope, scale = _slope(slopes, row)
        return torch.addcmul(y, slope, h if h.dtype == y.dtype else h.to(y.dtype), value=scale)
    if len(row) > 1 and y.numel() >= _LARGE:
        return _one(y, slopes, row, h)
    slope, scale = _slope(slopes, row)
    return torch.add(y, slope, alpha=scale * h)


def stage(y: torch.Tensor, slopes: Sequence[torch.Tensor], row: Row, h: Any) -> torch.Tensor:
    """y + h Σⱼ aⱼkⱼ."""
    if isinstance(h, torch.Tensor):
        return end(y, slopes, row, h)
    if len(row) > 1 and y.numel() >= _LARGE:
        return _one(y, slopes, row, h)
    for i, weight in row:  # fewest operations, which is what a small field's solve spends its time on
        y = torch.add(y, slopes[i], alpha=weight * h)
    return y


def error(slopes: Sequence[torch.Tensor], row: Row, h: Any) -> torch.Tensor:
    """h Σᵢ eᵢkᵢ."""
    slope, scale = _slope(slopes, row)
    return slope * (scale * h)


def error_ratio(slopes: Sequence[torch.Tensor], row: Row, h: Any, y0: torch.Tensor, y1: torch.Tensor,
                tolerance: Tolerance) -> float:  # fmt: skip
    """The size of the error h Σᵢ eᵢkᵢ over the tolerance; the step stands if it is at most 1."""
    if isinstance(h, float):
        return tolerance.ratio_of_sum([slopes[i] for i, _ in row], [h * e for _, e in row], y0, y1)
    return tolerance.ratio(error(slopes, row, h), y0, y1)


def judge_of(tolerance: Tolerance, control: Controller, order: int, steps: kernels.RowSteps) -> kernels.RowJudge | None:
    """Who judges these steps of rows and those after them; None if the kernels do not know such tolerances.

    Args:
        order: the error estimate is O(h^order).
    """
    if not tolerance.uniform:
        return None
    return kernels.RowJudge((tolerance.rtol, tolerance.atol), tuple(vars(control).values()), order, steps)


def judge_rows(judge: kernels.RowJudge, slopes: Sequence[torch.Tensor], row: Row, y0: torch.Tensor,
               y1: torch.Tensor) -> kernels.Judged | None:  # fmt: skip
    """Which rows accept their steps from y0 to y1, whose error is h Σᵢ eᵢkᵢ; None where the kernels cannot say."""
    used = [slopes[i] for i, _ in row]
    if not (row and y0.numel()) or watched() or not kernels.serves(y0, (y1, *used)):
        return None
    return judge(used, [e for _, e in row], y0, y1)


def _slope(slopes: Sequence[torch.Tensor], row: Row) -> tuple[torch.Tensor, float]:
    """Σᵢ wᵢkᵢ, divided by the first of the weights, and that weight: one operation less."""
    (first, scale), *rest = row
    slope = slopes[first]
    for i, weight in rest:
        slope = torch.add(slope, slopes[i], alpha=weight / scale)
    return slope, scale


def _one(y: torch.Tensor, slopes: Sequence[torch.Tensor], row: Row, h: float) -> torch.Tensor:
    used, weights = [slopes[i] for i, _ in row], [h * weight for _, weight in row]
    if watched() or not kernels.serves(y, used):
        return advance(y, 1.0, increment(used, weights))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (y, *used)):
        return _Combination.apply(weights, y, *used)
    return kernels.take_stage(y, used, weights)


class _Combination(torch.autograd.Function):
    """y + Σⱼ wⱼkⱼ, whose gradients are linear in that of the result: nothing is kept for them."""

    @staticmethod
    def forward(ctx: Any, weights: list[float], y: torch.Tensor, *slopes: torch.Tensor) -> torch.Tensor:
        ctx.weights = weights
        return kernels.take_stage(y, slopes, weights)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        (g,), wanted = cotangents, ctx.needs_input_grad[2:]
        weights = [weight for weight, wants in zip(ctx.weights, wanted, strict=True) if wants]
        if torch.is_grad_enabled() or watched() or is_batch(g) or not kernels.serves(g, ()):
            found = iter([g * weight for weight in weights])
        else:
            found = iter(kernels.pull_stage(g, weights))
        return (None, g if ctx.needs_input_grad[1] else None, *(next(found) if wants else None for wants in wanted))
