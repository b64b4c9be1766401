"""The flows that optimisers discretise, with their momenta and schedules."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import torch

from neuralode.errors import UsageError
from neuralode.gradient_flow.field import GradientField
from neuralode.gradient_flow.flow import Path, integrate
from neuralode.gradient_flow.optimizer_state import OptimizerState
from neuralode.gradient_flow.sharpness import Sharpness
from neuralode.gradient_flow.update_rule import Numbers, UpdateRule, same_or_each


class Schedule:
    """Learning rates as functions of continuous iterations: straight lines between the middles of the steps.

    Args:
        lrs: of each step and group, [K][G]; the weights move by lrs[0] in the first step.
    """

    def __init__(self, lrs: Sequence[Sequence[float]], sizes: Sequence[int], like: torch.Tensor):
        self.lrs, self.sizes, self.like = [tuple(row) for row in lrs], sizes, like
        self.middles = [k + 0.5 for k in range(len(lrs))]

    def at(self, k: float) -> Numbers:
        """η at iteration k, for all of θ."""
        right = bisect.bisect(self.middles, k)
        if right == 0 or right == len(self.middles):
            row: Sequence[float] = self.lrs[min(right, len(self.lrs) - 1)]
        else:
            part = k - self.middles[right - 1]
            row = [(1 - part) * a + part * b for a, b in zip(self.lrs[right - 1], self.lrs[right], strict=True)]
        return same_or_each(row, self.sizes, self.like)

    def time(self, k: float) -> float:
        """Flow time after k steps: s = Σ η of the first group; within a step it runs evenly."""
        whole = int(k)
        return sum(row[0] for row in self.lrs[:whole]) + ((k - whole) * self.lrs[whole][0] if k > whole else 0.0)


class OptimizerFlow:
    """The flow of an optimiser, its momenta included, in continuous iterations k; SGD without momentum included.

    A state is [θ], [θ, u] or [θ, m, v], stacked, [n, P], with the dot for d/dk:

    - SGD: θ̇ = −ηg; with momentum θ̇ = −ηu, (1+β)u̇/2 + (1−β)u = (1−d)g, and for PyTorch's Nesterov + βHθ̇ on the right.
      Where η is constant, (1+β)θ̈/2 + (1−β)θ̇ = −η(1−d)g.
    - Adam: (1+β₁)ṁ/2 = (1−β₁)(g−m), (1+β₂)v̇/2 = (1−β₂)(g²−v), θ̇ = −η m̂/(√v̂+ε), AdamW − ηwθ.

    The averages that move the weights from k to k+1 are the flow's at k+½; so they start half a step on, and Adam's are
    bias-corrected by 1 − β^(k+½). With that the flow stays within O(η²) of the iterates, not O(η).

    Coupled weight decay w is part of g. (Kovachki and Stuart 2021; Barakat and Bianchi 2021.)

    Args:
        rules: of each group.
        state: the optimiser's state when the flow begins.
        lrs: of each step and group, [K][G].
        begun: steps that the optimiser had taken by then.
    """

    def __init__(self, field: GradientField, rules: Sequence[UpdateRule], state: OptimizerState,
                 lrs: Sequence[Sequence[float]], begun: float | None = None):  # fmt: skip
        kinds = {(rule.kind, rule.nesterov, rule.momentum > 0) for rule in rules}
        if len(kinds) > 1:
            raise UsageError("the flow of groups of different kinds (with and without momentum, say) is not known.")
        self.field, self.rule, self.begun = field, rules[0], state.steps if begun is None else begun
        sizes, like = state.sizes, field.theta
        self.schedule = Schedule(lrs, sizes, like)
        self.beta, self.dampening, self.square, self.eps, self.decay = (
            same_or_each([getattr(rule, name) for rule in rules], sizes, like)
            for name in ("momentum", "dampening", "square", "eps", "weight_decay")
        )
        self._state = state

    def start(self, theta: torch.Tensor) -> torch.Tensor:
        """The flow's state where weights and optimiser are now, [n, P]."""
        if not self.rule.adaptive and self.rule.momentum == 0:
            return theta[None]
        g, beta = self._slope(theta), self.beta
        if self.rule.adaptive:
            m, v = (self._state.vector(name, theta) for name in ("exp_avg", "exp_avg_sq"))
            return torch.stack(
                [theta, _half_on(m, beta, 1 - beta, g), _half_on(v, self.square, 1 - self.square, g * g)]
            )
        if any("momentum_buffer" in state for state in self._state.states):
            before = self._state.vector("momentum_buffer", theta)
        else:
            before = self.dampening / beta * g  # torch does not dampen the first gradient
        u = _half_on(before, beta, 1 - self.dampening, g)
        return torch.stack([theta, g + beta * u if self.rule.nesterov else u])

    def _slope(self, theta: torch.Tensor) -> torch.Tensor:
        """g with coupled weight decay, [P]."""
        g = self.field.gradient(theta)
        return g if self.rule.kind == "adamw" else g + self.decay * theta

    def __call__(self, k: Any, z: torch.Tensor) -> torch.Tensor:
        """d/dk of the state, [n, P]."""
        theta, lr = z[0], self.schedule.at(float(k))
        g, beta = self._slope(theta), self.beta
        if self.rule.adaptive:
            return self._adam(float(k), z, lr, g)
        if len(z) == 1:
            return (-lr * g)[None]
        move, force = -lr * z[1], (1 - self.dampening) * g - (1 - beta) * z[1]
        if self.rule.nesterov:
            force = force + beta * (self.field.product(theta, move) + self.decay * move)
        return torch.stack([move, 2 / (1 + beta) * force])

    def _adam(self, k: float, z: torch.Tensor, lr: Numbers, g: torch.Tensor) -> torch.Tensor:
        theta, m, v = z
        beta, square, steps = self.beta, self.square, k + self.begun + 0.5
        move = m / (1 - beta**steps) / ((v / (1 - square**steps)).clamp_min(0).sqrt() + self.eps)
        if self.rule.kind == "adamw":
            move = move + self.decay * theta
        slopes = (2 * (1 - beta) / (1 + beta) * (g - m), 2 * (1 - square) / (1 + square) * (g.square() - v))
        return torch.stack([-lr * move, *slopes])

    @property
    def method(self) -> str:
        """The solver that serves: the flows with momenta oscillate, which stabilised methods do not bear."""
        return "rkc2" if self.rule.kind == "sgd" and self.rule.momentum == 0 else "tsit5"


def _half_on(average: torch.Tensor, kept: Numbers, taken: Numbers, new: torch.Tensor) -> torch.Tensor:
    """A running average half a step on: the mean of what it is and of what the next step makes of it."""
    return (average + kept * average + taken * new) / 2


def follow(
    dynamics: OptimizerFlow, start: torch.Tensor, reads: Sequence[float], *, method: str | None = None,
    rtol: float = 1e-3, atol: float | None = None, sharpness: Sharpness | None = None, first_step: float | None = None,
    max_steps: int = 10_000,
) -> Path:  # fmt: skip
    """The flow of an optimiser from a state [n, P], its weights after those iterations in `reads`.

    Args:
        reads: rising numbers of iterations, the first of which belongs to `start`.
        method: of `solve`; the one that suits the optimiser if not given.
        rtol, atol, sharpness, first_step, max_steps: as in `flow`, with steps in iterations.
    """
    field, schedule = dynamics.field, dynamics.schedule
    begun = field.gradients

    def pace(k: float) -> float:
        lr = schedule.at(k)
        return lr if isinstance(lr, float) else float(lr.max())

    solution = integrate(
        dynamics,
        field,
        start,
        [float(k) for k in reads],
        method or dynamics.method,
        rtol,
        atol,
        sharpness,
        pace,
        first_step,
        max_steps,
    )
    assert isinstance(solution.ys, torch.Tensor)
    s = torch.tensor([schedule.time(k) for k in reads], dtype=torch.float64)
    return Path(s, solution.ys[:, 0], solution.stats, field.gradients - begun, solution.ys[-1])
