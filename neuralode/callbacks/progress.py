"""A progress bar in a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar


def progress(every_seconds: float = 5.0) -> ProgressBar:
    """The rich progress bar where a person watches, else PlainProgress."""
    return RichProgressBar() if sys.stdout.isatty() else PlainProgress(every_seconds)


class PlainProgress(ProgressBar):
    """Prints the epoch and its metrics at most every so many seconds, and once more where the training ends."""

    def __init__(self, every_seconds: float = 5.0):
        super().__init__()
        self.every_seconds = every_seconds
        self._printed_at = time.monotonic()
        self._epochs = self._printed = 0

    def disable(self) -> None:
        """Lightning switches the bars of all processes but the first off."""
        self.every_seconds = float("inf")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._printed = trainer.current_epoch  # by the run that this one goes on from

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # the line of the epoch before, for at its end the means over it are not known yet
        self._epochs = trainer.current_epoch
        if time.monotonic() - self._printed_at >= self.every_seconds:
            self._print(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epochs = trainer.current_epoch
        if self.every_seconds < float("inf"):
            self._print(trainer)

    def _print(self, trainer: pl.Trainer) -> None:
        if self._epochs == self._printed:
            return
        self._printed_at, self._printed = time.monotonic(), self._epochs
        metrics = trainer.callback_metrics.items()
        shown = {k: v for k, v in metrics if k.startswith(("train/", "val/")) and not k.endswith("_step")}
        means = "  ".join(f"{name} {float(value):.4g}" for name, value in sorted(shown.items()))
        print(f"epoch {self._epochs}/{trainer.max_epochs}  {means}", flush=True)
