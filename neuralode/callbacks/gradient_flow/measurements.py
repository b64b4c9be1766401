"""What is measured at a training step: the defect, the derivatives, and the distance to the edge of stability."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from neuralode.callbacks.gradient_flow.words import formula, in_words, name_of
from neuralode.gradient_flow import GradientField, Sharpness, capture, derivatives, stability, update_rules
from neuralode.gradient_flow.frozen import flatten

Scalars = dict[str, float]


class Defect:
    """η/2 ‖g(θ⁺) − g(θ)‖ on the batch of a step from θ to θ⁺: its leading error as a step along the flow."""

    def __init__(self) -> None:
        self.trusts_training: bool | None = None
        """Whether the gradient that training computed is the field's, so that one gradient can be saved."""
        self._before: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def noted(self) -> bool:
        return self._before is not None

    def note(self, weights: list[torch.nn.Parameter]) -> None:
        """Before the step: its weights, and the gradient that it takes, before clipping."""
        self._before = (flatten(weights, weights), flatten([p.grad for p in weights], weights))

    def measure(self, field: GradientField, lr: float) -> Scalars:
        """After the step, on a field of the step's own batch."""
        assert self._before is not None
        (before, known), self._before = self._before, None
        theta = field.theta
        with field.borrowed():
            after = field.gradient(theta)
            if not self.trusts_training:
                ours = field.gradient(before)
                if self.trusts_training is None:
                    # not so with dropout, with batch norm, or where processes share a batch
                    apart = torch.linalg.vector_norm(ours - known)
                    self.trusts_training = bool(apart <= 1e-3 * torch.linalg.vector_norm(ours))
                known = ours
        moved, change = theta - before, after - known
        size = float(torch.linalg.vector_norm(moved))
        defect = lr / 2 * float(torch.linalg.vector_norm(change))
        values = {"flow/defect": defect}
        if size > 0:
            values |= {"flow/defect_relative": defect / size, "flow/kappa": float(moved @ change) / size**2}
        return values


class Edge:
    """Sharpness against the optimiser's threshold, followed through training."""

    def __init__(self) -> None:
        self.sharpness = Sharpness()
        self.last: tuple[int, float, float] | None = None
        """Step, sharpness and loss on the probe of the last measurement."""

    def measure(
        self, field: GradientField, optimizer: torch.optim.Optimizer, step: int, lrs: Sequence[float]
    ) -> tuple[Scalars, str]:
        """The scalars, and what they mean in words; `lrs` are those of the groups in the last step."""
        rules = [replace(rule, lr=lr) for rule, lr in zip(update_rules(optimizer), lrs, strict=True)]
        theta = field.theta
        found = stability(field, theta, rules, capture(optimizer), self.sharpness)
        with field.untransformed():
            loss, gradient = field.loss_and_gradient(theta)
        steps_to_edge, fall = math.inf, math.nan
        if self.last is not None:
            then, sharpness_then, loss_then = self.last
            steps = max(step - then, 1)
            pace, fall = (found.sharpness - sharpness_then) / steps, (loss_then - float(loss)) / steps
            if pace > 0 and found.ratio < 1:
                steps_to_edge = (found.threshold - found.sharpness) / pace
        self.last = (step, found.sharpness, float(loss))
        values = {
            "flow/sharpness": found.sharpness,
            "flow/threshold": found.threshold,
            "flow/stability": found.ratio,
        }
        if math.isfinite(steps_to_edge):
            values["flow/steps_to_edge"] = steps_to_edge
        rule, square = rules[0], float(gradient @ gradient)
        # momentum adds up a gradient that hardly changes; with β = 1 for ever
        known = rule.kind == "sgd" and rule.momentum < 1
        rate = rule.lr * square * (1 - rule.dampening) / (1 - rule.momentum) if known else math.nan
        words = in_words(
            step, found.sharpness, found.threshold, formula(rules), steps_to_edge, rate, fall, name_of(rules)
        )
        return values, words

    def state_dict(self) -> dict[str, Any]:
        return {"sharpness": self.sharpness.state_dict(), "last": self.last}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.sharpness.load_state_dict(saved["sharpness"])
        self.last = None if saved["last"] is None else tuple(saved["last"])


def derivative_values(field: GradientField, lr: float, loss_floor: float) -> Scalars:
    """Acceleration, jerk and the rate of convergence at the present weights."""
    found = derivatives(field, field.theta, lr)
    values = {
        "flow/acceleration": float(found.acceleration.norm()),
        "flow/jerk": float(found.jerk.norm()),
        "flow/jerk_ratio": found.jerk_ratio,
    }
    gap = found.loss - loss_floor
    if gap > 0:  # the constant of Polyak and Łojasiewicz
        values["flow/pl"] = float(found.gradient @ found.gradient) / (2 * gap)
    return values
