"""The one LightningDataModule: arrays split into train, val and test."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from neuralode.data.loader import Batch, EpochOrder, ReplayLoader, Transform
from neuralode.errors import UsageError


@dataclass(frozen=True)
class Splits:
    """What a source of data delivers; all tensors of a split have equal length [N, ...]."""

    train: Batch
    val: Batch
    test: Batch
    model_args: dict[str, Any]
    """What the model has to know of the data: `features`, `classes`, `image`, `scale`, ..."""
    shared: dict[str, Batch] = field(default_factory=dict)
    """For each split, tensors that every batch carries whole (the times of a time series)."""
    transform: Transform | None = None
    """Augmentation of training batches."""
    description: dict[str, Any] = field(default_factory=dict)
    """For figures: column names, class names, the times that were trained on."""


class ArrayData(pl.LightningDataModule, abc.ABC):
    """Loads its arrays once and serves them in batches. A subclass says where they come from.

    Args:
        batch_size: samples in a training batch; None takes all of them (full batch).
        eval_batch_size: samples in a batch of validation and test; None takes all of them.
    """

    seed: int = 0
    """Of the order of the batches; the training script sets it."""

    def __init__(self, batch_size: int | None = 64, eval_batch_size: int | None = None):
        super().__init__()
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"data.batch_size is {batch_size}; it has to be at least 1, or null for full batches.")
        if eval_batch_size is not None and eval_batch_size < 1:
            raise UsageError(f"data.eval_batch_size is {eval_batch_size}; it has to be at least 1, or null for all.")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self._splits: Splits | None = None

    @abc.abstractmethod
    def load(self) -> Splits:
        """Reads or makes the data. Raises UsageError for data that cannot be used."""

    @property
    def splits(self) -> Splits:
        """The data, loaded and checked at the first use."""
        if self._splits is None:
            splits = self.load()
            for name in ("train", "val", "test"):
                _check(name, getattr(splits, name))
            self._splits = splits
        return self._splits

    def train_dataloader(self) -> ReplayLoader:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        samples = len(self.splits.train[0])
        # a run that learns a few batches by heart has to meet the same ones in each epoch
        shuffle = not getattr(self.trainer, "overfit_batches", 0)
        order = EpochOrder(samples, self.batch_size or samples, shuffle, self.seed, rank, world)
        shared = self.splits.shared.get("train", ())
        return ReplayLoader(self.splits.train, order, shared, self.splits.transform)

    def val_dataloader(self) -> ReplayLoader:
        return self._in_order("val")

    def test_dataloader(self) -> ReplayLoader:
        return self._in_order("test")

    def _in_order(self, name: str) -> ReplayLoader:
        tensors = getattr(self.splits, name)
        samples = len(tensors[0])
        order = EpochOrder(samples, self.eval_batch_size or samples, False, self.seed)
        return ReplayLoader(tensors, order, self.splits.shared.get(name, ()))


def read_text(path: str | Path, wanted: str) -> str:
    """The file at `data.path`, in UTF-8, without a mark of the byte order.

    Raises UsageError where it cannot be read; `wanted` says what to give in its place.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"data.path={path}: {error.strerror or error}; give {wanted}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"data.path={path} is not a text file in UTF-8: {error}; give {wanted}.") from error


def standard_float(array: Any) -> torch.Tensor:
    """A tensor of the default floating-point type."""
    return torch.as_tensor(array).to(torch.get_default_dtype())


def _check(name: str, tensors: Batch) -> None:
    if not tensors or not len(tensors[0]):
        raise UsageError(f"the {name} split is empty; give more data or another split.")
    for tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = (~torch.isfinite(tensor)).flatten(1).any(1) if tensor.dim() > 1 else ~torch.isfinite(tensor)
            rows = bad.nonzero().flatten().tolist()
            raise UsageError(
                f"the {name} data has NaN or infinite values in {len(rows)} of {len(tensor)} samples, the first being "
                f"sample {rows[0]}; clean the data first."
            )
