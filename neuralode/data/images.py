"""Images: scikit-learn's digits, which ship with it, and data sets that its OpenML fetcher can bring."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import fetch_openml, load_digits
from sklearn.model_selection import train_test_split

from neuralode.data.loader import Batch, Transform
from neuralode.data.module import ArrayData, Splits, standard_float
from neuralode.errors import UsageError, unknown

OPENML = {
    # name: OpenML's name, version, (colours, H, W), training images (the first ones, by the data set's convention)
    "mnist": ("mnist_784", 1, (1, 28, 28), 60_000),
    "cifar10": ("CIFAR_10", 1, (3, 32, 32), 50_000),
}


class Digits(ArrayData):
    """Scikit-learn's 1,797 scanned digits: [1, 8, 8] in [0, 1] to 10 classes.

    Stratified 80/20 split into train and test with `random_state=0`; a stratified part of the training images is
    held back for validation.

    Args:
        val_fraction: part of the training images held back.
        shift: training images are moved by up to this many pixels in each direction.
        batch_size, eval_batch_size: as in ArrayData.
    """

    def __init__(
        self,
        val_fraction: float = 0.1,
        shift: int = 1,
        batch_size: int | None = 64,
        eval_batch_size: int | None = None,
    ):
        super().__init__(batch_size, eval_batch_size)
        self.val_fraction, self.shift = val_fraction, shift

    def load(self) -> Splits:
        digits = load_digits()
        x, y = digits.images[:, None] / 16.0, digits.target
        x_fit, x_test, y_fit, y_test = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
        x_train, x_val, y_train, y_val = _hold_back(x_fit, y_fit, self.val_fraction)
        return Splits(
            train=_images(x_train, y_train),
            val=_images(x_val, y_val),
            test=_images(x_test, y_test),
            model_args={"image": [1, 8, 8], "classes": 10},
            transform=shifted(self.shift) if self.shift else None,
        )


class DigitRows(ArrayData):
    """Scikit-learn's 1,797 scanned digits as flat rows: [64], in [0, 1] before their means are removed, to 10 classes.

    The first rows train and the rest validate and test; the feature means that are removed are those of all rows.

    Args:
        rows: number of training rows.
        batch_size, eval_batch_size: as in ArrayData.
    """

    def __init__(self, rows: int = 1000, batch_size: int | None = None, eval_batch_size: int | None = None):
        super().__init__(batch_size, eval_batch_size)
        self.rows = rows

    def load(self) -> Splits:
        digits = load_digits()
        x, y = digits.data / 16.0, digits.target
        if not 0 < self.rows < len(x):
            raise UsageError(f"data.rows is {self.rows}; it has to be from 1 to {len(x) - 1}; the rest is the test.")
        x -= x.mean(0)
        rest = _images(x[self.rows :], y[self.rows :])
        return Splits(
            train=_images(x[: self.rows], y[: self.rows]),
            val=rest,
            test=rest,
            model_args={"features": x.shape[1], "classes": 10},
        )


class OpenML(ArrayData):
    """MNIST or CIFAR-10 through scikit-learn's OpenML fetcher, cached on disk; needs the extra `openml`.

    Args:
        dataset: one of OPENML.
        cache: folder for the downloaded files; scikit-learn's own if None.
        limit: use only the first so many training and test images each; None uses all.
        val_fraction, shift, batch_size, eval_batch_size: as in Digits.
    """

    def __init__(
        self,
        dataset: str = "mnist",
        cache: str | None = None,
        limit: int | None = None,
        val_fraction: float = 0.1,
        shift: int = 0,
        batch_size: int | None = 128,
        eval_batch_size: int | None = 500,
    ):
        super().__init__(batch_size, eval_batch_size)
        if dataset not in OPENML:
            raise UsageError(unknown("data.dataset", dataset, OPENML))
        self.dataset, self.cache, self.limit = dataset, cache, limit
        self.val_fraction, self.shift = val_fraction, shift

    def load(self) -> Splits:
        name, version, shape, training = OPENML[self.dataset]
        x, y = fetch(name, version, self.cache)
        x, y = as_images(x, shape), np.asarray(y).astype(np.int64)
        training = min(training, len(x) * 6 // 7)
        limit = self.limit or len(x)
        x_fit, y_fit = x[:training][:limit], y[:training][:limit]
        x_test, y_test = x[training:][:limit], y[training:][:limit]
        x_train, x_val, y_train, y_val = _hold_back(x_fit, y_fit, self.val_fraction)
        return Splits(
            train=_images(x_train, y_train),
            val=_images(x_val, y_val),
            test=_images(x_test, y_test),
            model_args={"image": list(shape), "classes": 10},
            transform=shifted(self.shift) if self.shift else None,
        )


def fetch(name: str, version: int, cache: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [N, P] and labels [N] of an OpenML data set. Raises UsageError where it cannot be had."""
    try:
        found = fetch_openml(name, version=version, data_home=cache, as_frame=False, parser="auto")
    except ImportError as error:
        raise UsageError(f"reading {name} needs pandas: pip install 'neuralode[openml]'.") from error
    except (OSError, ValueError) as error:
        folder = Path(cache or os.environ.get("SCIKIT_LEARN_DATA", "~/scikit_learn_data"))
        raise UsageError(
            f"{name} is not in the cache ({folder}) and OpenML cannot be reached ({error}). Run once with a network, "
            "or copy that folder from a machine that has it and give data.cache."
        ) from error
    return found.data, found.target


def as_images(pixels: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Rows of pixel values 0..255, [N, C·H·W], as images in [0, 1], [N, C, H, W]."""
    wanted = int(np.prod(shape))
    if pixels.ndim != 2 or pixels.shape[1] != wanted:
        raise UsageError(f"the data has shape {pixels.shape}; images of shape {shape} need {wanted} columns.")
    return pixels.astype(np.float32).reshape(-1, *shape) / 255.0


def shifted(pixels: int) -> Transform:
    """Moves each image by up to `pixels` in each direction, filling with zeros."""

    def transform(batch: Batch, generator: torch.Generator) -> Batch:
        x, *rest = batch
        height, width = x.shape[-2:]
        padded = torch.nn.functional.pad(x, (pixels,) * 4)
        offsets = torch.randint(0, 2 * pixels + 1, (2, len(x)), generator=generator)
        rows = (offsets[0][:, None] + torch.arange(height))[:, None, :, None]
        columns = (offsets[1][:, None] + torch.arange(width))[:, None, None, :]
        samples = torch.arange(len(x))[:, None, None, None]
        channels = torch.arange(x.shape[1])[None, :, None, None]
        return (padded[samples, channels, rows, columns], *rest)

    return transform


def _images(x: np.ndarray, y: np.ndarray) -> Batch:
    return standard_float(x), torch.from_numpy(np.asarray(y, dtype=np.int64))


def _hold_back(x: np.ndarray, y: np.ndarray, fraction: float) -> tuple[np.ndarray, ...]:
    if not 0 < fraction < 1:
        raise UsageError(f"data.val_fraction is {fraction}; it has to be between 0 and 1.")
    try:
        return tuple(train_test_split(x, y, test_size=fraction, stratify=y, random_state=0))
    except ValueError as error:  # too few images of some class
        raise UsageError(f"data.val_fraction={fraction} of {len(x)} images cannot be held back: {error}") from error
