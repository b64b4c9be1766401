"""Points in the plane, and the line of the gradient-flow page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from neuralode.data import Concentric, Line, Moons, OnePoint
from neuralode.errors import UsageError


@pytest.fixture
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("_float64")
def test_line_has_the_published_least_squares_solution() -> None:
    x, y = Line().splits.train
    assert x.shape == y.shape == (100, 1)
    solution = torch.linalg.lstsq(torch.cat([torch.ones_like(x), x], 1), y).solution.flatten()
    assert solution.tolist() == pytest.approx([4.21509616, 2.77011339], abs=5e-9)


def test_line_is_looked_at_whole() -> None:
    data = Line()
    splits = data.splits
    assert splits.model_args == {"features": 1, "targets": 1}
    for split in (splits.val, splits.test):
        assert all(torch.equal(a, b) for a, b in zip(splits.train, split, strict=True))
    assert len(data.train_dataloader()) == 1


@pytest.mark.usefixtures("_float64")
def test_one_point() -> None:
    data = OnePoint(y=-0.1)
    splits = data.splits
    assert splits.model_args == {"features": 1, "targets": 1}
    for split in (splits.train, splits.val, splits.test):
        assert [part.tolist() for part in split] == [[[1.0]], [[-0.1]]]
        assert all(part.dtype == torch.float64 for part in split)
    assert len(data.train_dataloader()) == 1


@pytest.mark.parametrize("features", [1, 2, 3, 10])
def test_concentric_radii(features: int) -> None:
    data = Concentric(samples=400, features=features, inner=0.3, ring=(0.8, 1.2))
    assert data.splits.model_args == {"features": features, "classes": 2}
    for x, y in (data.splits.train, data.splits.val, data.splits.test):
        radius = x.norm(dim=1)
        assert x.shape == (400, features)
        assert (radius[y == 0] <= 0.3 + 1e-6).all()
        assert ((radius[y == 1] >= 0.8 - 1e-6) & (radius[y == 1] <= 1.2 + 1e-6)).all()
        assert (y == 0).sum() == (y == 1).sum() == 200


def test_concentric_is_uniform_in_volume() -> None:
    x, y = Concentric(samples=8000, inner=1.0).splits.train
    radius = x[y == 0].norm(dim=1)
    assert (radius < 0.5).float().mean().item() == pytest.approx(0.25, abs=0.03)
    # and no direction is preferred
    assert x.mean(0).norm() < 0.05


def test_moons() -> None:
    x, y = Moons(samples=200, noise=0.0).splits.train
    # without noise: two half circles of radius 1, around (0, 0) and (1, 0.5)
    centre = torch.tensor([[0.0, 0.0], [1.0, 0.5]])[y]
    torch.testing.assert_close((x - centre).norm(dim=1), torch.ones(200))
    assert (y == 0).sum() == 100
    with pytest.raises(UsageError, match=r"noise >= 0; got 200 and -1"):
        Moons(samples=200, noise=-1).splits  # noqa: B018


@pytest.mark.parametrize("source", [Moons, Concentric])
def test_points_are_those_of_the_data_seed(source: type) -> None:
    def points(seed: int) -> list[torch.Tensor]:
        splits = source(samples=50, data_seed=seed).splits
        return [splits.train[0], splits.val[0], splits.test[0]]

    one, again, other = points(3), points(3), points(4)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    distinct = [*one, *other]
    for i, a in enumerate(distinct):
        assert not any(torch.equal(a, b) for b in distinct[i + 1 :]), "splits and seeds do not share points"


def test_loaders() -> None:
    data = Moons(samples=100, batch_size=30, eval_batch_size=40)
    assert [len(x) for x, _ in data.train_dataloader()] == [30, 30, 30, 10]
    assert [len(x) for x, _ in data.val_dataloader()] == [40, 40, 20]
    x, y = next(iter(data.test_dataloader()))
    assert torch.equal(x, data.splits.test[0][:40]), "evaluation goes in order"
    assert torch.equal(y, data.splits.test[1][:40])
    data.seed = 1
    assert not torch.equal(next(iter(data.train_dataloader()))[0], data.splits.train[0][:30])
    assert len(Moons(samples=100, batch_size=None).train_dataloader()) == 1


@pytest.mark.parametrize("size", [0, -1])
def test_batch_size_has_to_be_positive(size: int) -> None:
    with pytest.raises(UsageError, match=rf"batch_size is {size}.*at least 1"):
        Moons(batch_size=size)


def test_eval_batch_size_has_to_be_positive() -> None:
    with pytest.raises(UsageError, match="eval_batch_size"):
        Moons(eval_batch_size=-5).val_dataloader()


def test_empty_split_is_refused() -> None:
    with pytest.raises(UsageError, match="the train split is empty"):
        Concentric(samples=0).splits  # noqa: B018
