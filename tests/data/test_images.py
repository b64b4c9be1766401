"""Images: the digits that ship, OpenML without a network, and the shifts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from neuralode.data import DigitRows, Digits, OpenML, images
from neuralode.data.images import as_images, shifted
from neuralode.errors import UsageError


@pytest.fixture
def openml(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Serves 210 small images in the format of OpenML; the list receives what was asked for."""
    asked: list[dict[str, Any]] = []

    def fetch(name: str, **kwargs: Any) -> SimpleNamespace:
        asked.append({"name": name, **kwargs})
        side = {"mnist_784": 784, "CIFAR_10": 3072}[name]
        pixels = np.random.default_rng(0).integers(0, 256, (210, side)).astype(np.float64)
        pixels[:, 0] = np.arange(210)  # so that a row can be told from the others
        return SimpleNamespace(data=pixels, target=np.array([str(i % 10) for i in range(210)], dtype=object))

    monkeypatch.setattr(images, "fetch_openml", fetch)
    return asked


def rows(split: tuple[torch.Tensor, ...]) -> list[int]:
    return sorted(round(float(v) * 255) for v in split[0][:, 0, 0, 0])


def test_digits_are_split_stratified() -> None:
    splits = Digits().splits
    sizes = [len(split[0]) for split in (splits.train, splits.val, splits.test)]
    assert sizes[0] + sizes[1] == 1437
    assert sizes[2] == 360
    assert sizes[1] == 144
    assert splits.model_args == {"image": [1, 8, 8], "classes": 10}
    share = torch.bincount(torch.cat([splits.train[1], splits.val[1]])) / 1437
    for split in (splits.train, splits.val, splits.test):
        torch.testing.assert_close(torch.bincount(split[1]) / len(split[1]), share, rtol=0, atol=0.01)


def test_digits_are_all_there_once() -> None:
    splits = Digits().splits
    x = torch.cat([splits.train[0], splits.val[0], splits.test[0]])
    y = torch.cat([splits.train[1], splits.val[1], splits.test[1]])
    assert x.dtype == torch.float32
    assert x.min() == 0
    assert x.max() == 1
    found = sorted(
        (tuple((image.flatten() * 16).int().tolist()), int(label)) for image, label in zip(x, y, strict=True)
    )
    digits = load_digits()
    assert found == sorted((tuple(map(int, row)), int(k)) for row, k in zip(digits.data, digits.target, strict=True))


def test_digit_rows_are_the_rows_without_their_means() -> None:
    data = DigitRows(rows=700)
    splits, digits = data.splits, load_digits()
    assert splits.model_args == {"features": 64, "classes": 10}
    assert [len(split[0]) for split in (splits.train, splits.val, splits.test)] == [700, 1097, 1097]
    assert all(torch.equal(a, b) for a, b in zip(splits.val, splits.test, strict=True))
    x, y = (torch.cat(parts) for parts in zip(splits.train, splits.test, strict=True))
    assert x.dtype == torch.float32
    assert y.tolist() == digits.target.tolist(), "in their order"
    # of all rows, not of the training rows alone
    torch.testing.assert_close(x.mean(0), torch.zeros(64), rtol=0, atol=1e-6)
    assert splits.train[0].mean(0).abs().max() > 1e-3
    torch.testing.assert_close(x[5] - x[900], torch.tensor(digits.data[5] - digits.data[900]).float() / 16)
    assert len(data.train_dataloader()) == 1
    assert len(DigitRows().splits.train[0]) == 1000


@pytest.mark.parametrize("rows", [-1, 0, 1797])
def test_digit_rows_leave_some_to_test_on(rows: int) -> None:
    with pytest.raises(UsageError, match=rf"data.rows is {rows}.*1 to 1796"):
        DigitRows(rows).splits  # noqa: B018


def test_held_back_part() -> None:
    assert len(Digits(val_fraction=0.25).splits.val[0]) == 360
    for fraction in (0.0, 1.0, -0.1):
        with pytest.raises(UsageError, match=r"val_fraction.*between 0 and 1"):
            Digits(val_fraction=fraction).splits  # noqa: B018


def test_held_back_part_that_cannot_hold_every_class() -> None:
    with pytest.raises(UsageError):
        Digits(val_fraction=0.001).splits  # noqa: B018


def test_only_training_images_are_shifted() -> None:
    data = Digits(shift=1, batch_size=32)
    loader = data.train_dataloader()
    plain = data.splits.train[0][loader.sampler.batches(0)[0]]
    moved = loader.batch(0, 0)[0]
    assert not torch.equal(moved, plain)
    assert torch.equal(next(iter(data.val_dataloader()))[0], data.splits.val[0])
    assert torch.equal(Digits(shift=0, batch_size=32).train_dataloader().batch(0, 0)[0], plain)


def test_shifted_images_are_shifts() -> None:
    x = torch.rand(40, 2, 6, 5, generator=torch.Generator().manual_seed(0)) + 0.1
    moved, label = shifted(2)((x, torch.arange(40)), torch.Generator().manual_seed(1))
    assert torch.equal(label, torch.arange(40))
    assert torch.equal(shifted(2)((x,), torch.Generator().manual_seed(1))[0], moved), "the generator alone decides"
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    offsets = []
    for image, frame in zip(moved, padded, strict=True):
        fits = [(r, c) for r in range(5) for c in range(5) if torch.equal(image, frame[:, r : r + 6, c : c + 5])]
        assert len(fits) == 1
        offsets += fits
    assert {r for r, _ in offsets} == {c for _, c in offsets} == set(range(5))


@pytest.mark.parametrize(
    ("dataset", "name", "shape"), [("mnist", "mnist_784", [1, 28, 28]), ("cifar10", "CIFAR_10", [3, 32, 32])]
)
def test_openml(dataset: str, name: str, shape: list[int], openml: list[dict[str, Any]], tmp_path: Path) -> None:
    splits = OpenML(dataset, cache=str(tmp_path)).splits
    assert openml == [{"name": name, "version": 1, "data_home": str(tmp_path), "as_frame": False, "parser": "auto"}]
    # the first six of seven parts are for training, as in MNIST
    assert sorted(rows(splits.train) + rows(splits.val)) == list(range(180))
    assert rows(splits.test) == list(range(180, 210))
    assert list(splits.train[0].shape[1:]) == splits.model_args["image"] == shape
    assert splits.train[0].max() == 1.0
    assert splits.train[1].dtype == torch.int64
    assert all(int(y) == row % 10 for y, row in zip(splits.test[1], range(180, 210), strict=True))


def test_openml_limit(openml: list[dict[str, Any]]) -> None:
    splits = OpenML("mnist", limit=100, val_fraction=0.2).splits
    assert sorted(rows(splits.train) + rows(splits.val)) == list(range(100))
    assert (len(splits.val[0]), len(splits.test[0])) == (20, 30)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (URLError("no route to host"), ["mnist_784", "no route to host", "Run once with a network", "data.cache"]),
        (ValueError("bad checksum"), ["mnist_784", "bad checksum", "data.cache"]),
        (ImportError("no pandas"), ["pandas", "pip install 'neuralode[openml]'"]),
    ],
    ids=["network", "file", "pandas"],
)
def test_openml_that_cannot_be_had(
    error: Exception, words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fetch(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(images, "fetch_openml", fetch)
    with pytest.raises(UsageError) as caught:
        OpenML(cache=str(tmp_path / "cache")).splits  # noqa: B018
    for word in words:
        assert word in str(caught.value)
    if not isinstance(error, ImportError):
        assert str(tmp_path / "cache") in str(caught.value)


def test_unknown_dataset() -> None:
    with pytest.raises(UsageError, match="'minst'; did you mean 'mnist'"):
        OpenML("minst")


def test_as_images() -> None:
    pixels = np.arange(2 * 12, dtype=np.float64).reshape(2, 12)
    found = as_images(pixels, (3, 2, 2))
    assert found.shape == (2, 3, 2, 2)
    np.testing.assert_allclose(found[1, 2] * 255, [[20, 21], [22, 23]], rtol=1e-6)
    for wrong in (pixels[:, :11], pixels[0], pixels.reshape(2, 3, 4)):
        with pytest.raises(UsageError, match=rf"{str(wrong.shape)[1:-1]}.*12 columns"):
            as_images(wrong, (3, 2, 2))
