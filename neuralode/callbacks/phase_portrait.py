"""Pictures of what a model's flow does, while it learns and at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from neuralode.data import ArrayData
from neuralode.errors import UsageError
from neuralode.models.classifier import ODEClassifier
from neuralode.models.language import ODETransformer
from neuralode.models.regression import LinearModel
from neuralode.models.trajectory import TrajectoryModel


class PhasePortrait(pl.Callback):
    """Draws the flow to TensorBoard and to a PNG file: for points in the plane the decision boundary and the states
    along depth time, for time series the phase plane and the curves, for a linear regression the line and the way of
    its weights over the loss, for a transformer whose depth is time how sure it is along the depth of what comes next.
    Other models have no portrait. Drawn is the LightningModule's `model`, on the data of its ArrayData.

    Drawing draws no random number and changes no weight; should it fail, it warns once and switches itself off.

    Args:
        folder: where the PNG files go.
        every: epochs between two pictures in TensorBoard; the last one is always drawn, and alone becomes a file.
    """

    def __init__(self, folder: str, every: int = 10):
        if every < 1:
            raise UsageError(f"monitor.figure_every is {every}; it has to be at least 1.")
        self.folder, self.every = Path(folder), every
        self._off = False
        self._weights: list[list[float]] = []
        """Of a line, after each epoch: intercept and slope."""

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self._weights} if self._weights else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._weights = list(state_dict["weights"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._weights:
            self._note(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._note(pl_module)
        if trainer.current_epoch % self.every == 0:
            self._draw(trainer, pl_module, to_file=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer, pl_module, to_file=True)

    def _note(self, module: pl.LightningModule) -> None:
        model = getattr(module, "model", None)
        if isinstance(model, LinearModel) and model.linear.weight.numel() == 1:
            self._weights.append([model.linear.bias.item(), model.linear.weight.item()])

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule, to_file: bool) -> None:
        if self._off or not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        try:
            with torch.no_grad(), _evaluating(pl_module.model) as model:  # type: ignore[arg-type]
                figure = portrait(model, trainer.datamodule, self._weights)  # type: ignore[attr-defined]
            if figure is None:
                self._off = True
                return
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure("phase_portrait", figure, trainer.global_step)
            if to_file:
                self.folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(self.folder / "phase_portrait.png")
        except Exception as error:
            self._off = True
            rank_zero_warn(f"the phase portrait could not be drawn and is switched off: {error}")


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode; each of its parts goes back to its own mode."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for part, training in modes:
            part.training = training


def portrait(model: Any, data: ArrayData, weights: Sequence[Sequence[float]] = ()) -> Any:
    """The figure for this model on this data's test split, or None if it has none.

    Args:
        weights: intercept and slope of a line as training went on, [K, 2].
    """
    from neuralode.viz import phase_portrait as viz  # matplotlib, only when something is drawn

    if isinstance(model, ODEClassifier) and data.splits.test[0].shape[1:] == (2,):
        return viz.classifier_figure(**_classifier_arrays(model, *data.splits.test))
    if isinstance(model, TrajectoryModel):
        return viz.series_figure(**_series_arrays(model, data))
    if isinstance(model, ODETransformer):
        from neuralode.viz.language import depth_figure

        return depth_figure(**_depth_arrays(model, *data.splits.test))
    if weights:
        x, y = (part[:, 0].numpy() for part in data.splits.train)
        return viz.regression_figure(x, y, np.array(weights))
    return None


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def _classifier_arrays(model: ODEClassifier, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    device = _device(model)
    x, y = x[:400].to(device), y[:400]
    start, end = model.block.solver.t_span
    times = torch.linspace(start, end, 41, device=device, dtype=x.dtype)
    path = model.block.solve(x, times).ys
    assert isinstance(path, torch.Tensor)

    low, high = x.amin(0) - 0.4, x.amax(0) + 0.4
    axes = [torch.linspace(float(low[i]), float(high[i]), 80, device=device, dtype=x.dtype) for i in range(2)]
    grid = torch.cartesian_prod(*axes)
    probability = model(grid).softmax(-1)[:, 1].reshape(80, 80).T

    # the window must hold where the points go to; the field is shown on it with augmented coordinates at zero
    reach = path[..., :2].flatten(0, 1)
    span = (reach.amin(0) - 0.2, reach.amax(0) + 0.2)
    ticks = [torch.linspace(float(span[0][i]), float(span[1][i]), 25, device=device, dtype=x.dtype) for i in range(2)]
    plane = model.block.augmented(torch.cartesian_prod(*ticks))
    shown = [0, 13, 27, 40]
    arrows = torch.stack([model.block.vector_field(times[i], plane)[:, :2] for i in shown])
    return {
        "axes": [a.cpu().numpy() for a in axes],
        "probability": probability.cpu().numpy(),
        "times": times.cpu().numpy(),
        "path": path[..., :2].cpu().numpy(),
        "labels": y.numpy(),
        "shown": shown,
        "ticks": [a.cpu().numpy() for a in ticks],
        "arrows": arrows.reshape(len(shown), 25, 25, 2).transpose(1, 2).cpu().numpy(),
        "hidden_dimensions": model.block.augment,
    }


def _depth_arrays(model: ODETransformer, tokens: torch.Tensor, following: torch.Tensor) -> dict[str, Any]:
    device = _device(model)
    some = slice(None, None, -(-len(tokens) // 32))  # from the whole text
    tokens, following = tokens[some].to(device), following[some].to(device)
    start, end = model.block.solver.t_span
    times = torch.linspace(start, end, 31, device=device)
    chances = model.along_depth(tokens, times).softmax(-1)
    right = chances.take_along_dim(following[None, :, :, None], -1).squeeze(-1)
    ends = ["".join(model.vocabulary[token] for token in row[-40:]) for row in following]  # it has seen enough there
    example = max(range(len(ends)), key=lambda i: sum(map(str.isalpha, ends[i])))  # rather prose than a table
    return {
        "times": times.cpu().numpy(),
        "bits": -right.log2().mean((1, 2)).cpu().numpy(),
        "characters": ends[example],
        "probability": right[:, example, -40:].cpu().numpy(),
    }


def _series_arrays(model: TrajectoryModel, data: ArrayData) -> dict[str, Any]:
    device = _device(model)
    (y,), (t,) = data.splits.test, data.splits.shared["test"]
    fine = torch.linspace(float(t[0]), float(t[-1]), max(1000, len(t)), device=device, dtype=y.dtype)
    curve = model(y[:, 0].to(device), fine)[0]
    arrays = {
        "times": t.numpy(),
        "record": y[0].numpy(),
        "fine_times": fine.cpu().numpy(),
        "curve": curve.cpu().numpy(),
        "names": data.splits.description["names"],
        "train_until": data.splits.description["train_until"],
    }
    if y.shape[-1] == 2:
        both = torch.cat([y[0].to(device), curve])
        margin = 0.1 * (both.amax(0) - both.amin(0))
        ticks = [
            torch.linspace(float(lo), float(hi), 25, device=device, dtype=y.dtype)
            for lo, hi in zip(both.amin(0) - margin, both.amax(0) + margin, strict=True)
        ]
        arrows = model.vector_field(fine[0], torch.cartesian_prod(*ticks)).reshape(25, 25, 2).transpose(0, 1)
        arrays |= {"ticks": [a.cpu().numpy() for a in ticks], "arrows": arrows.cpu().numpy()}
    return arrays
