"""Small trainings to watch, what is left after them, and what was measured."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from neuralode.data.loader import EpochOrder, ReplayLoader

SMALL: dict[str, Any] = {"window": 4, "every": 3, "defect_every": 2, "budget": None}
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "log_every_n_steps": 1, "max_epochs": 3,
}  # fmt: skip
MODES = ["window", "piecewise", "global"]


class Plain(pl.LightningModule):
    """Nothing of this package: dropout, batch norm, noise drawn in the step, logging, a tensor or a dict."""

    def __init__(self, returns: str = "tensor", optimizer: Callable[..., Any] | None = None):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))
        self.returns, self.optimizer = returns, optimizer or (lambda p: torch.optim.SGD(p, 0.05, momentum=0.9))

    def training_step(self, batch: Any, index: int) -> Any:
        x, y = batch
        noise = 0.1 * torch.randn_like(x) + 0.01 * random.random() + 0.01 * np.random.rand()  # noqa: NPY002
        loss = (self.net(x + noise) - y).square().mean()
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"train/twice": 2 * loss})
        return loss if self.returns == "tensor" else {"loss": loss, "more": 1}

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


def samples(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, generator=generator)
    return x, x[:, :1] * x[:, 1:2] + 0.1 * torch.randn(count, 1, generator=generator)


def replayed() -> ReplayLoader:
    return ReplayLoader(samples(), EpochOrder(40, 10, shuffle=True, seed=5))


def shuffled() -> DataLoader:
    return DataLoader(TensorDataset(*samples()), batch_size=10, shuffle=True)


def everything(trainer: pl.Trainer) -> list[Any]:
    """Weights, buffers, modes, the optimiser's state and the random states after a run."""
    module, optimizer = trainer.lightning_module, trainer.optimizers[0]
    state = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [{k: v for k, v in optimizer.state[p].items() if v is not None} for p in state]
    numpy_state = [torch.from_numpy(np.random.get_state()[1].copy()), np.random.get_state()[2]]  # noqa: NPY002
    return [
        dict(module.state_dict()), kept, [p.grad for p in state], [part.training for part in module.modules()],
        sorted(module.__dict__), torch.get_rng_state(), numpy_state, random.getstate(),
        {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("flow/")},
    ]  # fmt: skip


def same(one: Any, other: Any) -> bool:
    """Equal bit for bit, down to the tensors."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def fit(module: pl.LightningModule, loader: Any, monitor: pl.Callback | None = None, *others: pl.Callback,
        ckpt_path: Any = None, **options: Any) -> pl.Trainer:  # fmt: skip
    pl.seed_everything(7)
    callbacks = [*others, *([] if monitor is None else [monitor])]
    trainer = pl.Trainer(**{**QUIET, **options}, callbacks=callbacks)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def rows(folder: Path) -> list[tuple[str, str, str, str]]:
    """What `scalars.csv` holds, but for what the clock says."""
    with (folder / "scalars.csv").open(newline="") as file:
        return [tuple(row) for row in list(csv.reader(file))[1:] if row[2] != "flow/overhead"]  # type: ignore[misc]
