"""What all training tasks share: the steps, the epoch means, the optimiser, and the checkpoint's description."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from neuralode.errors import UsageError
from neuralode.models.saved import KEY

Measured = dict[str, torch.Tensor]
"""Means over a batch by name; `loss` is what is minimised."""


class Task(pl.LightningModule, abc.ABC):
    """Trains `model`; a subclass says what is measured on a batch.

    Args:
        model: a plain module.
        optimizer: called with the parameters.
        scheduler: called with the optimiser, or None.
        scheduler_monitor: metric for a plateau scheduler.
        interval: `epoch` or `step`, how often the scheduler steps.
        description: what a checkpoint says of the model (`models.saved.describe`).
    """

    metric: str
    """The metric by which runs are compared, and its direction."""
    mode: str
    measures: tuple[str, ...] = ()
    """What `measure` returns for training and validation, by name; empty where a subclass does not say."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        scheduler: Callable[..., Any] | None = None,
        scheduler_monitor: str | None = None,
        interval: str = "epoch",
        description: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.model = model
        self._optimizer, self._scheduler = optimizer, scheduler
        self._schedule = {"interval": interval, "monitor": scheduler_monitor}
        self._description = dict(description or {})
        # Sums over the epoch so far, kept in the checkpoint: Lightning's own are lost when a run stops mid-epoch.
        self._sums: dict[str, torch.Tensor] = {}
        self._samples = 0

    @abc.abstractmethod
    def measure(self, batch: Any, stage: str) -> Measured:
        """Means over the batch; `stage` is train, val or test."""

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.model(*inputs)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        measured = self.measure(batch, "train")
        loss = measured["loss"]
        if not torch.isfinite(loss):
            raise UsageError(
                f"the loss is {loss.item()} in step {self.global_step}; lower the learning rate, clip the gradient "
                "(trainer.gradient_clip_val=1), or look for extreme values in the data."
            )
        self.log("train/loss_step", loss.detach(), on_step=True, on_epoch=False, prog_bar=False)
        size = len(batch[0])
        for name, value in measured.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().double() * size
        self._samples += size
        return loss

    def on_train_epoch_end(self) -> None:
        for name, total in self._sums.items():
            mean = (total / self._samples).float()
            self.log(f"train/{name}", mean, prog_bar=name == "loss", sync_dist=True)
        self._sums, self._samples = {}, 0

    def validation_step(self, batch: Any, index: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, index: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Any, stage: str) -> None:
        kind: dict[str, Any] = {"on_step": False, "on_epoch": True, "prog_bar": True, "sync_dist": True}
        for name, value in self.measure(batch, stage).items():
            self.log(f"{stage}/{name}", value, batch_size=len(batch[0]), **kind)

    def configure_optimizers(self) -> Any:
        try:
            optimizer = self._optimizer(self.parameters())
        except (TypeError, ValueError) as error:
            raise UsageError(f"optimizer: {error}.") from error
        if self._scheduler is None:
            return optimizer
        schedule = {"scheduler": self._scheduler(optimizer), **self._schedule}
        if self._schedule["interval"] == "epoch" and str(self._schedule["monitor"]).startswith("val/"):
            schedule["frequency"] = self.trainer.check_val_every_n_epoch or 1  # there is no value in other epochs
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = self._description
        checkpoint["optimizer"] = _name(self._optimizer)
        checkpoint["epoch_so_far"] = {"sums": self._sums, "samples": self._samples}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._refuse_another_model(checkpoint)
        saved = checkpoint.get("epoch_so_far", {"sums": {}, "samples": 0})
        self._sums = {name: total.to(self.device) for name, total in saved["sums"].items()}
        self._samples = saved["samples"]

    def _refuse_another_model(self, checkpoint: Mapping[str, Any]) -> None:
        """Raises UsageError where the checkpoint is of another model, or a resume asks for another optimiser."""
        saved, ours = checkpoint.get(KEY, {}), self._description
        then, now = ({"model": d.get("model"), **d.get("args", {}), "solver": None} for d in (saved, ours))
        if self.trainer.state.fn == "fit":
            then["optimizer"] = checkpoint.get("optimizer", _name(self._optimizer))
            now["optimizer"] = _name(self._optimizer)
        for key in now if saved and ours else ():
            if then.get(key) != now[key]:
                raise UsageError(
                    f"the checkpoint has {key}={then.get(key)!r} and the config asks for {now[key]!r}; leave it as it "
                    "was, or start a new run."
                )


def _name(optimizer: Callable[..., Any]) -> str:
    """Of the class inside a partial, too."""
    return getattr(getattr(optimizer, "func", optimizer), "__name__", "an optimiser")
