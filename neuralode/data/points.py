"""Points in the plane, and on the line: made on the spot, with a fixed seed."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import make_moons

from neuralode.data.module import ArrayData, Splits, standard_float
from neuralode.errors import UsageError


class Moons(ArrayData):
    """Two interleaving half circles: [2] to 2 classes.

    Args:
        samples: points in each of train, val and test.
        noise: standard deviation of the Gaussian noise, in units of the radius.
        data_seed: of the points, apart from the training's seed.
        batch_size, eval_batch_size: as in ArrayData.
    """

    def __init__(
        self,
        samples: int = 1000,
        noise: float = 0.1,
        data_seed: int = 0,
        batch_size: int | None = 128,
        eval_batch_size: int | None = None,
    ):
        super().__init__(batch_size, eval_batch_size)
        self.samples, self.noise, self.data_seed = samples, noise, data_seed

    def load(self) -> Splits:
        if self.samples < 2 or self.noise < 0:
            raise UsageError(f"moons needs samples >= 2 and noise >= 0; got {self.samples} and {self.noise}.")
        train, val, test = (self._points(3 * self.data_seed + part) for part in range(3))
        return Splits(train, val, test, model_args={"features": 2, "classes": 2})

    def _points(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = make_moons(self.samples, noise=self.noise, random_state=seed)
        return standard_float(x), torch.from_numpy(y)


class Concentric(ArrayData):
    """A disk inside a ring: no flow of the plane can separate them (Dupont et al. 2019, "Augmented Neural ODEs").

    Args:
        samples: points in each of train, val and test.
        features: dimension of the space; disk and ring become ball and shell.
        inner: outer radius of the disk.
        ring: inner and outer radius of the ring.
        data_seed: of the points, apart from the training's seed.
        batch_size, eval_batch_size: as in ArrayData.
    """

    def __init__(
        self,
        samples: int = 1000,
        features: int = 2,
        inner: float = 0.5,
        ring: tuple[float, float] = (1.0, 1.5),
        data_seed: int = 0,
        batch_size: int | None = 128,
        eval_batch_size: int | None = None,
    ):
        super().__init__(batch_size, eval_batch_size)
        self.samples, self.features, self.inner, self.ring, self.data_seed = samples, features, inner, ring, data_seed

    def load(self) -> Splits:
        random = np.random.default_rng(self.data_seed)
        train, val, test = (self._points(random) for _ in range(3))
        return Splits(train, val, test, model_args={"features": self.features, "classes": 2})

    def _points(self, random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        label = np.arange(self.samples) % 2
        low = np.where(label == 0, 0.0, self.ring[0]) ** self.features
        high = np.where(label == 0, self.inner, self.ring[1]) ** self.features
        radius = random.uniform(low, high) ** (1 / self.features)  # uniform in volume
        direction = random.normal(size=(self.samples, self.features))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        return standard_float(radius[:, None] * direction), torch.from_numpy(label)


class Line(ArrayData):
    """y = 4 + 3x + noise, 100 points, the regression of the gradient-flow page: [1] to [1].

    Train, val and test are the same points: what is looked at is the optimiser's path, not generalisation.

    Args:
        samples: number of points.
        data_seed: of numpy's legacy generator, so that the points are the published ones.
        batch_size, eval_batch_size: as in ArrayData.
    """

    def __init__(
        self,
        samples: int = 100,
        data_seed: int = 42,
        batch_size: int | None = None,
        eval_batch_size: int | None = None,
    ):
        super().__init__(batch_size, eval_batch_size)
        self.samples, self.data_seed = samples, data_seed

    def load(self) -> Splits:
        random = np.random.RandomState(self.data_seed)  # the published numbers come from it
        x = 2 * random.rand(self.samples, 1)
        y = 4 + 3 * x + random.randn(self.samples, 1)
        points = (standard_float(x), standard_float(y))
        return Splits(points, points, points, model_args={"features": 1, "targets": 1})


class OnePoint(ArrayData):
    """The single sample (x, y), as train, val and test: [1] to [1].

    Args:
        x, y: the sample.
    """

    def __init__(self, x: float = 1.0, y: float = 0.6):
        super().__init__(batch_size=None)
        self.x, self.y = x, y

    def load(self) -> Splits:
        point = (standard_float([[self.x]]), standard_float([[self.y]]))
        return Splits(point, point, point, model_args={"features": 1, "targets": 1})
