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
    """Prints the epoch and its metrics at most every so many seconds."""

    def __init__(self, every_seconds: float = 5.0):
        super().__init__()
        self.every_seconds = every_seconds
        self._printed = time.monotonic()

    def disable(self) -> None:
        """Lightning switches the bars of all processes but the first off."""
        self.every_seconds = float("inf")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if time.monotonic() - self._printed < self.every_seconds:
            return
        self._printed = time.monotonic()
        shown = {k: v for k, v in trainer.callback_metrics.items() if k.startswith(("train/", "val/"))}
        metrics = "  ".join(f"{name} {float(value):.4g}" for name, value in sorted(shown.items()))
        print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {metrics}", flush=True)
