"""What the monitor evaluates: a fixed sample of the training data, and the loss of any LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from neuralode.errors import UsageError
from neuralode.tasks import Task

Loss = Callable[[Any, Any], torch.Tensor]
"""(module, batch) to the loss."""


def training_loss(module: pl.LightningModule, batch: Any) -> torch.Tensor:
    """The loss that a step of training minimises on this batch, with nothing logged."""
    if isinstance(module, Task):
        return module.measure(batch, "train")["loss"]

    def mute(*args: Any, **kwargs: Any) -> None: ...

    # attributes of the instance, which go when the module is put back
    module.__dict__["log"] = module.__dict__["log_dict"] = mute
    found = module.training_step(batch, 0)
    loss = found["loss"] if isinstance(found, dict) else found
    if not isinstance(loss, torch.Tensor):
        raise UsageError("training_step returns no loss; give the monitor a loss_fn(module, batch).")
    return loss


def mean_loss(loss: Loss) -> Callable[[Any, Sequence[Any]], torch.Tensor]:
    """The loss of several batches that make one optimiser step: their mean, as accumulated gradients have it."""
    return lambda module, batches: sum(loss(module, batch) for batch in batches) / len(batches)  # type: ignore[return-value]


def probe_batch(trainer: pl.Trainer, module: pl.LightningModule, samples: int | None) -> Any | None:
    """At most `samples` fixed training samples (None: all) as one batch on the device; None for data without an index.

    The same samples in every run: a generator of its own draws them.
    """
    loader: Any = trainer.train_dataloader
    tensors: Any = getattr(loader, "tensors", None)
    dataset: Any = getattr(loader, "dataset", None)
    if tensors is not None:
        rows = _chosen(len(tensors[0]), samples)
        batch: Any = (*(tensor[rows] for tensor in tensors), *loader.shared)
    elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        batch = loader.collate_fn([dataset[i] for i in _chosen(len(dataset), samples).tolist()])
    else:
        return None
    batch = trainer.precision_plugin.convert_input(batch)
    return trainer.strategy.batch_to_device(batch, module.device)


def _chosen(count: int, most: int | None) -> torch.Tensor:
    if most is None or count <= most:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most].sort().values


def unable(trainer: pl.Trainer, module: pl.LightningModule) -> str:
    """Why this training cannot be monitored; empty if it can."""
    if not module.automatic_optimization:
        return "it optimises by hand, so that a step is not known"
    if len(trainer.optimizers) != 1:
        return f"it has {len(trainer.optimizers)} optimisers; one is known how to follow"
    if str(trainer.precision) in ("16-true", "bf16-true"):
        return f"weights in {trainer.precision} are too coarse for differences of gradients; use 32-true or 16-mixed"
    strategy = type(trainer.strategy).__name__
    if strategy not in ("SingleDeviceStrategy", "DDPStrategy"):
        return f"{strategy} spreads the weights over processes; use one device or ddp"
    return ""
