"""`last.ckpt` as an exact resume point, and clean ends on Ctrl-C and SIGTERM."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from neuralode.errors import Stopped, UsageError, stop_at_once

KEY = "exact_resume"


class ExactResume(pl.Callback):
    """Keeps `last.ckpt` such that a resumed run equals the uninterrupted one bit for bit (on the CPU).

    The only safe point is just before a training batch that begins an optimiser step: all that belongs to earlier
    batches and epochs, validation and schedulers included, is done by then. There this callback saves, every so often
    and when a signal came in; and there, after a resume, it restores the random states.

    Args:
        folder: where `last.ckpt` goes.
        every_seconds: wall time between two saves.
    """

    def __init__(self, folder: str, every_seconds: float = 15.0):
        if every_seconds < 0:
            raise UsageError(f"every_seconds is {every_seconds}; it cannot be negative.")
        self.path = Path(folder) / "last.ckpt"
        self.every_seconds = every_seconds
        self.seconds = 0.0
        """Wall time of the fit, earlier parts of a resumed run included."""
        self.metrics: dict[str, float] = {}
        """Last value of every metric, earlier parts of a resumed run included."""
        self._signum: int | None = None
        self._saved_at = -float("inf")
        self._started = time.monotonic()
        self._finished: bool | None = None  # which kind of save is under way; None when another callback saves
        self._restored: dict[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # As late as this, for Lightning has put its own handler in place by now, which would end the run with code 0.
        # It also puts back, at the end, what was there before.
        self._started = time.monotonic() - self.seconds
        with contextlib.suppress(ValueError):  # not the main thread: whoever runs us there handles signals
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, self._on_signal)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if self._restored is not None:
            _set_random_states(self._restored["random"])
            trainer.fit_loop.epoch_loop._batches_that_stepped = self._restored["batches_that_stepped"]
            self._restored = None
        if index % trainer.accumulate_grad_batches:
            return  # half-accumulated gradients are not in a checkpoint
        stop = _any_process(trainer, self._signum is not None)
        if stop or _any_process(trainer, time.monotonic() - self._saved_at > self.every_seconds):
            self._save(trainer, finished=False)
        if stop:
            raise Stopped(self._signum or signal.SIGTERM)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer, finished=True)  # which also updates seconds and metrics

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.seconds = time.monotonic() - self._started
        self.metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        checkpoint[KEY] = {
            "metrics": dict(self.metrics),
            "random": _random_states(),
            "batches_that_stepped": trainer.fit_loop.epoch_loop._batches_that_stepped,
            "seconds": self.seconds,
        }
        if self._finished is None:
            return
        # Lightning's counters say that a batch has been fetched which is not trained on yet, and the loader does not
        # know how many of its batches were used: write down where the next batch really is.
        fit_loop = checkpoint["loops"]["fit_loop"]
        batches = fit_loop["epoch_loop.batch_progress"]
        batches["is_last_batch"] = False
        if self._finished:
            batches["current"].update(ready=0, started=0, processed=0, completed=0)
        for counter in (batches["total"], batches["current"]):
            counter["ready"] = counter["completed"] + 1
        epoch = fit_loop["epoch_progress"]["current"]["processed"]
        fit_loop["state_dict"]["combined_loader"] = [{"epoch": epoch, "batch": batches["current"]["completed"]}]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == "fit" and KEY in checkpoint:
            self._restored = checkpoint[KEY]
            self.seconds = checkpoint[KEY]["seconds"]
            self.metrics = dict(checkpoint[KEY]["metrics"])

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # For a signal after the last batch: looked at here, where all callbacks have done what they do at the end.
        if stage == "fit" and _any_process(trainer, self._signum is not None):
            raise Stopped(self._signum or signal.SIGTERM)

    def _save(self, trainer: pl.Trainer, finished: bool) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        self._finished = finished
        # Lightning moves a file here from the folder of temporary files, which may lie on another disk: a disk that is
        # full by then would leave half a checkpoint in the place of the one before.
        draft = self.path.with_name("last.draft")
        try:
            trainer.save_checkpoint(draft)
            if trainer.is_global_zero:
                draft.replace(self.path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise
        finally:
            self._finished = None
        self._saved_at = time.monotonic()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None:  # asked twice: do not wait for the batch
            stop_at_once(signum, frame)
        self._signum = signum
        print(f"\n{signal.Signals(signum).name}: stopping before the next batch; once more stops at once.", flush=True)


def _any_process(trainer: pl.Trainer, decision: bool) -> bool:
    """True on every process if it is on one: all have to save and stop together."""
    if trainer.world_size == 1:
        return decision
    return trainer.strategy.reduce_boolean_decision(decision, all=False)


def _random_states() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - whatever a user's field draws from
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(states["python"])
