"""What the solves inside a model cost, in TensorBoard and in the run's result."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch

from neuralode.errors import UsageError
from neuralode.nn import ODEBlock, largest_jacobian_norm
from neuralode.ode import Stats

FEW_DIMENSIONS = 16  # up to here the Jacobian of the field is formed


class SolverMonitor(pl.Callback):
    """Logs every solve's evaluations, steps and wall share under `solver/`.

    `summary` holds what goes into the result: mean evaluations a solve in the last epoch (forward and backward) and
    in the test, and, where `model.block` of the LightningModule is an ODEBlock with states of few dimensions, the
    largest Jacobian norm of the field along the test solutions.

    Args:
        every: training steps between two logged points.
    """

    def __init__(self, every: int = 10):
        if every < 1:
            raise UsageError(f"monitor.solver_every is {every}; it has to be at least 1.")
        self.every = every
        self.summary: dict[str, float] = {}
        self._totals = {"nfe_forward": 0, "nfe_backward": 0, "solves": 0}
        self._test_nfe: list[int] = []
        self._batch_started = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"totals": dict(self._totals), "summary": dict(self.summary)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._totals.update(state_dict["totals"])
        self.summary.update(state_dict["summary"])

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._totals = dict.fromkeys(self._totals, 0)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self._batch_started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        stats = [block.stats for block in _blocks(pl_module) if block.stats is not None]
        if not stats:
            return
        self._totals["nfe_forward"] += sum(s.nfe for s in stats)
        self._totals["nfe_backward"] += sum(s.nfe_backward for s in stats)
        self._totals["solves"] += 1
        if trainer.global_step % self.every == 0:
            seconds = time.perf_counter() - self._batch_started
            scalars = _scalars(stats, seconds)
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=trainer.global_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        solves = self._totals["solves"]
        if solves:
            self.summary["nfe_forward"] = self._totals["nfe_forward"] / solves
            self.summary["nfe_backward"] = self._totals["nfe_backward"] / solves

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._test_nfe = []
        self.summary.pop("max_jacobian_norm", None)

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        stats = [block.stats for block in _blocks(pl_module) if block.stats is not None]
        if stats:
            self._test_nfe.append(sum(s.nfe for s in stats))
            self.summary["nfe_test"] = sum(self._test_nfe) / len(self._test_nfe)
        model: Any = getattr(pl_module, "model", None)
        known = isinstance(batch, list | tuple) and not hasattr(model, "stem")
        if known and isinstance(getattr(model, "block", None), ODEBlock):
            start = batch[0] if batch[0].dim() == 2 else batch[0][:, 0] / getattr(model, "scale", 1.0)
            if start.shape[1] <= FEW_DIMENSIONS:
                norm = largest_jacobian_norm(model.block, start)
                self.summary["max_jacobian_norm"] = max(norm, self.summary.get("max_jacobian_norm", 0.0))


def _blocks(module: torch.nn.Module) -> list[ODEBlock]:
    return [part for part in module.modules() if isinstance(part, ODEBlock)]


def _scalars(stats: list[Stats], seconds: float) -> dict[str, float]:
    """One point of every `solver/` chart, from the solves of one training step that took `seconds`."""
    steps = [h for s in stats for h in s.step_sizes]
    scalars = {
        "solver/nfe_forward": float(sum(s.nfe for s in stats)),
        "solver/nfe_backward": float(sum(s.nfe_backward for s in stats)),
        "solver/forward_time_share": sum(s.seconds for s in stats) / seconds,
    }
    if all(s.accepted is not None and s.rejected is not None for s in stats):
        scalars["solver/accepted_steps"] = float(sum(s.accepted or 0 for s in stats))
        scalars["solver/rejected_steps"] = float(sum(s.rejected or 0 for s in stats))
    if steps:
        scalars |= {
            "solver/step_size_mean": sum(steps) / len(steps),
            "solver/step_size_min": min(steps),
            "solver/step_size_max": max(steps),
        }
    return scalars
