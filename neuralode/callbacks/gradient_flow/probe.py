"""What the monitor evaluates: a fixed sample of the training data, and the loss of any LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.utils.data import DataLoader, IterableDataset

from neuralode.errors import UsageError
from neuralode.gradient_flow.frozen import frozen
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
    indexed = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    found = module.training_step(batch, 0) if indexed else module.training_step(batch)
    loss = found["loss"] if isinstance(found, dict) else found
    if not isinstance(loss, torch.Tensor):
        raise UsageError("training_step returns no loss; give the monitor a loss_fn(module, batch).")
    return loss


def mean_loss(loss: Loss, parts: int = 1) -> Callable[[Any, Sequence[Any]], torch.Tensor]:
    """The loss of the batches that make one optimiser step, as accumulated gradients have it.

    Args:
        parts: batches that a step takes; at the end of an epoch there may be fewer, and the sum is over `parts` still.
    """
    return lambda module, batches: sum(loss(module, batch) for batch in batches) / parts  # type: ignore[return-value]


def probe_batch(trainer: pl.Trainer, module: pl.LightningModule, samples: int | None) -> Any | None:
    """At most `samples` fixed training samples (None: all) as one batch on the device; None for data without an index.

    The same samples in every run: a generator of its own draws them. Datasets and hooks that draw random numbers, or
    change the module, leave no trace either.
    """
    with frozen(module, list(module.parameters()), seed=0) as state:
        state.draw_again()
        batch = _sample(trainer.train_dataloader, samples)
        if batch is None:
            return None
        batch = trainer.precision_plugin.convert_input(batch)
        return trainer.strategy.batch_to_device(batch, module.device)


def _sample(loader: Any, samples: int | None) -> Any | None:
    tensors: Any = getattr(loader, "tensors", None)
    dataset: Any = getattr(loader, "dataset", None)
    if tensors is not None:
        rows = _chosen(len(tensors[0]), samples)
        return (*(tensor[rows] for tensor in tensors), *loader.shared)
    if not isinstance(loader, DataLoader) or loader.batch_sampler is None or isinstance(dataset, IterableDataset):
        return None
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        return None
    return loader.collate_fn([dataset[i] for i in _chosen(len(dataset), samples).tolist()])


def _chosen(count: int, most: int | None) -> torch.Tensor:
    if most is None or count <= most:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most].sort().values


def clipping(trainer: pl.Trainer) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What the trainer does to a gradient [P] before the optimiser sees it."""
    most = trainer.gradient_clip_val
    if not most:
        return None
    if trainer.gradient_clip_algorithm == "value":
        return lambda g: g.clamp(-most, most)
    return lambda g: g * (most / (torch.linalg.vector_norm(g) + 1e-6)).clamp_max(1.0)


def savable(batch: Any) -> bool:
    """Whether a checkpoint with this batch can be read: it is made of nothing but what `weights_only` lets through."""
    if type(batch) in (tuple, list):
        return all(savable(part) for part in batch)
    if type(batch) is dict:
        return all(savable(part) for pair in batch.items() for part in pair)
    return type(batch) in (torch.Tensor, bool, int, float, str, type(None))


def unable(trainer: pl.Trainer, module: pl.LightningModule, loss: Loss) -> str:
    """Why this training cannot be monitored by this loss; empty if it can."""
    if not module.automatic_optimization:
        return "it optimises by hand, so that a step is not known"
    if len(trainer.optimizers) != 1:
        return f"it has {len(trainer.optimizers)} optimisers; one is known how to follow"
    if str(trainer.precision) in ("16-true", "bf16-true"):
        return f"weights in {trainer.precision} are too coarse for differences of gradients; use 32-true or 16-mixed"
    strategy = type(trainer.strategy).__name__
    if strategy not in ("SingleDeviceStrategy", "DDPStrategy"):
        return f"{strategy} spreads the weights over processes; use one device or ddp"
    if trainer.world_size > 1 and loss is training_loss and not isinstance(module, Task):
        return "training_step may wait for other processes; give GradientFlowMonitor a loss_fn(module, batch)"
    return ""
