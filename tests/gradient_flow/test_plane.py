"""The plane of two paths."""

from __future__ import annotations

import pytest
import torch

from neuralode.errors import UsageError
from neuralode.gradient_flow import Plane, plane


def walk(seed: int, size: int = 30, steps: int = 12, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A path from the origin of seed 0, so that all start alike."""
    start = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moves = torch.randn(steps, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([start[None], start + moves.cumsum(0)]).to(dtype)


def orthonormal(found: Plane) -> bool:
    product = found.directions @ found.directions.T
    tolerance = 1e-12 if product.dtype == torch.float64 else 1e-6
    return bool((product - torch.eye(2).to(product)).abs().max() < tolerance)


def off(found: Plane, thetas: torch.Tensor) -> float:
    """How far weights lie from the plane."""
    return float((found.lift(found.project(thetas)) - thetas).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["ends", "pca"])
def test_orthonormal(kind: str, dtype: torch.dtype) -> None:
    found = plane([walk(1, dtype=dtype), walk(2, dtype=dtype)], kind)
    assert orthonormal(found)
    assert found.directions.dtype == dtype
    assert 0 < found.explained < 1


def test_ends_lie_in_the_plane() -> None:
    first, second = walk(1), walk(2, steps=7)
    found = plane([first, second])
    for theta in (first[0], first[-1], second[-1]):
        assert off(found, theta) < 1e-12
    assert off(found, first[5]) > 0.1


def test_ends_that_are_close() -> None:
    first = walk(1)
    second = torch.cat([first[:-1], first[-1:] + 1e-7 * walk(3)[-1:]])
    found = plane([first, second])
    assert orthonormal(found)
    apart = found.project(second[-1]) - found.project(first[-1])
    assert float(apart.norm()) == pytest.approx(float((second[-1] - first[-1]).norm()), rel=1e-6)


@pytest.mark.parametrize("kind", ["ends", "pca"])
def test_paths_in_a_plane(kind: str) -> None:
    basis = torch.linalg.qr(walk(4)[1:3].T).Q.T
    coordinates = walk(5, size=2), walk(6, size=2)
    paths = [walk(0)[0] + (c - c[0]) @ basis for c in coordinates]
    found = plane(paths, kind)
    assert found.explained == pytest.approx(1, abs=1e-12)
    assert max(off(found, path) for path in paths) < 1e-12
    lengths = (found.project(paths[0]) - found.project(paths[0])[0]).norm(dim=1)
    torch.testing.assert_close(lengths, (coordinates[0] - coordinates[0][0]).norm(dim=1))


def test_explained() -> None:
    path = torch.tensor([[0.0, 0, 0], [0, 0, 1], [3, 0, 0]]).double()
    other = torch.tensor([[0.0, 0, 0], [0, 0, 2], [0, 2, 0]]).double()
    assert plane([path, other]).explained == pytest.approx(13 / 18)


def test_pca_explains_the_spread() -> None:
    paths = [walk(1, steps=40), walk(2, steps=40)]
    points = torch.cat(paths) - torch.cat(paths).mean(0)
    most = torch.linalg.svdvals(points)[:2].square().sum()
    found = plane(paths, "pca")
    assert float((points @ found.directions.T).square().sum()) == pytest.approx(float(most), rel=1e-10)


@pytest.mark.parametrize("kind", ["ends", "pca"])
@pytest.mark.parametrize("size", [1, 2, 3, 30])
def test_identical_paths_and_straight_lines(kind: str, size: int) -> None:
    line = walk(0, size)[0] + torch.linspace(0, 1, 9).double()[:, None] * torch.ones(size).double()
    for paths in ([line, line], [line], [line, line[:4]]):
        found = plane(paths, kind)
        assert found.directions.shape == (2, size)
        assert found.explained == pytest.approx(1, abs=1e-12)
        assert off(found, line) < 1e-12
        assert size == 1 or orthonormal(found)


@pytest.mark.parametrize("kind", ["ends", "pca"])
def test_paths_that_do_not_move(kind: str) -> None:
    still = walk(0, 4)[:1]
    for path in (still, still.expand(3, -1)):
        found = plane([path, path], kind)
        assert found.explained == 1
        assert orthonormal(found)
        assert torch.equal(found.project(path), torch.zeros(len(path), 2).double())


def test_round_trip() -> None:
    found = plane([walk(1), walk(2)])
    points = walk(7, size=2).reshape(13, 1, 2)
    torch.testing.assert_close(found.project(found.lift(points)), points)
    assert found.lift(points).shape == (13, 1, 30)
    assert torch.equal(found.project(found.origin), torch.zeros(2).double())


def test_unknown_kind() -> None:
    with pytest.raises(UsageError, match="unknown plane 'PCA'"):
        plane([walk(1)], "PCA")
