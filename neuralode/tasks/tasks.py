"""The tasks: what is minimised, and what is reported beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from neuralode.errors import UsageError, unknown
from neuralode.tasks.task import Measured, Task


class Classification(Task):
    """Classes [B] from logits [B, classes]; reports accuracy.

    Args:
        label_smoothing: part of the target spread over all classes while training; with `cross_entropy` alone.
        loss: `cross_entropy`, or `squared`: ½‖logits − one-hot‖², summed over classes, mean over samples.
        model, optimizer, scheduler, ...: as in Task.
    """

    metric, mode = "accuracy", "max"
    measures = ("loss", "accuracy")

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0, loss: str = "cross_entropy", **task: Any):
        super().__init__(model, **task)
        if loss not in ("cross_entropy", "squared"):
            raise UsageError(unknown("task.loss", loss, ("cross_entropy", "squared")))
        if not 0 <= label_smoothing < 1:
            raise UsageError(f"task.label_smoothing is {label_smoothing}; it has to be in [0, 1).")
        if label_smoothing and loss == "squared":
            raise UsageError(f"task.label_smoothing is {label_smoothing}; with task.loss=squared it has to be 0.")
        self.loss_name, self.label_smoothing = loss, label_smoothing

    def measure(self, batch: tuple[torch.Tensor, torch.Tensor], stage: str) -> Measured:
        x, y = batch
        logits = self(x)
        _refuse_other_shapes(logits, y, 1)
        if self.loss_name == "squared":
            loss = _squared(logits, F.one_hot(y, logits.shape[-1]))
        else:
            smoothing = self.label_smoothing if stage == "train" else 0.0
            loss = F.cross_entropy(logits, y, label_smoothing=smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(-1) == y).float().mean()}


class Language(Task):
    """The next character at every position, [B, L], from logits [B, L, classes].

    Reports the cross-entropy in nats (`loss`) and in bits a character, and how often the likeliest character is right.
    """

    metric, mode = "bits", "min"
    measures = ("loss", "bits", "accuracy")

    def measure(self, batch: tuple[torch.Tensor, torch.Tensor], stage: str) -> Measured:
        tokens, following = batch
        logits = self(tokens)
        _refuse_other_shapes(logits, following, 2)
        loss = F.cross_entropy(logits.flatten(0, 1), following.flatten())
        right = (logits.argmax(-1) == following).float().mean()
        return {"loss": loss, "bits": loss / math.log(2), "accuracy": right}


class Regression(Task):
    """Squared errors on [B, targets].

    Args:
        loss: `mse`, the mean over samples and targets, or `squared`: ½‖predicted − y‖², summed over targets, mean over
            samples.
        model, optimizer, scheduler, ...: as in Task.
    """

    metric, mode = "loss", "min"
    measures = ("loss",)

    def __init__(self, model: nn.Module, *optimisation: Any, loss: str = "mse", **task: Any):
        super().__init__(model, *optimisation, **task)
        if loss not in _REGRESSION_LOSSES:
            raise UsageError(unknown("task.loss", loss, _REGRESSION_LOSSES))
        self.loss_name = loss

    def measure(self, batch: tuple[torch.Tensor, torch.Tensor], stage: str) -> Measured:
        x, y = batch
        predicted = self(x)
        if predicted.shape != y.shape:
            raise UsageError(f"the model returns shape {tuple(predicted.shape)} for targets {tuple(y.shape)}.")
        return {"loss": _REGRESSION_LOSSES[self.loss_name](predicted, y)}


class TrajectoryFitting(Task):
    """Follows observed trajectories [B, T, D] at times [T] from their first points.

    Reports the mean absolute error, and where the record goes on after `train_until`, that of the forecast.

    Args:
        loss: `mse`, `mae` or `log_mse` (of logarithms, for positive states whose errors are relative); errors are
            measured in units of the model's scale.
        warmup_steps, warmup_points: for the first so many optimiser steps only the first so many points of each
            training window are fitted, since short horizons are cheap and have no far-off minima.
        train_until: last fitted time; the data module knows it.
        model, optimizer, scheduler, ...: as in Task.
    """

    metric, mode = "mae", "min"
    measures = ("loss", "mae")

    def __init__(
        self,
        model: nn.Module,
        loss: str = "mse",
        warmup_steps: int = 0,
        warmup_points: int = 2,
        train_until: float | None = None,
        **task: Any,
    ):
        super().__init__(model, **task)
        if loss not in _TRAJECTORY_LOSSES:
            raise UsageError(unknown("task.loss", loss, _TRAJECTORY_LOSSES))
        if warmup_points < 2:
            raise UsageError(f"task.warmup_points is {warmup_points}; a trajectory has at least 2 points.")
        self.loss_name, self.train_until = loss, train_until
        self.warmup_steps, self.warmup_points = warmup_steps, warmup_points

    def measure(self, batch: tuple[torch.Tensor, torch.Tensor], stage: str) -> Measured:
        y, t = batch
        if stage == "train" and self.global_step < self.warmup_steps:
            y, t = y[:, : self.warmup_points], t[: self.warmup_points]
        predicted = self(y[:, 0], t)
        scale = getattr(self.model, "scale", 1.0)
        fitted = t <= self.train_until if self.train_until is not None else torch.ones_like(t, dtype=torch.bool)
        error = (predicted - y).abs()
        measured = {
            "loss": _TRAJECTORY_LOSSES[self.loss_name](predicted[:, fitted] / scale, y[:, fitted] / scale),
            "mae": error.mean(),
        }
        if stage == "test" and not fitted.all():
            measured |= {"fit_mae": error[:, fitted].mean(), "forecast_mae": error[:, ~fitted].mean()}
        return measured


def _refuse_other_shapes(logits: torch.Tensor, classes: torch.Tensor, dimensions: int) -> None:
    """Raises UsageError unless there are logits for each of the classes, which have so many dimensions."""
    if classes.dim() != dimensions or logits.shape[:-1] != classes.shape:
        raise UsageError(
            f"the model returns shape {tuple(logits.shape)} for classes of shape {tuple(classes.shape)}; "
            "task=classification takes one class a sample, task=language one a position."
        )


def _squared(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """½‖predicted − target‖² of [B, D], summed over D, mean over B: its gradient by `predicted` is the residual / B."""
    return 0.5 * (predicted - target).square().sum(-1).mean()


def _log_mse(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(predicted.clamp_min(1e-6).log(), target.clamp_min(1e-6).log())


_Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_REGRESSION_LOSSES: Mapping[str, _Loss] = {"mse": F.mse_loss, "squared": _squared}

_TRAJECTORY_LOSSES: Mapping[str, _Loss] = {
    "mse": F.mse_loss,
    "mae": F.l1_loss,
    "log_mse": _log_mse,
}
