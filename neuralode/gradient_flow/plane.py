"""The plane in which two paths through the space of weights are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from neuralode.errors import UsageError, unknown
from neuralode.gradient_flow.sharpness import orthogonal_part

PLANES = ("ends", "pca")


@dataclass(frozen=True)
class Plane:
    """Two orthonormal directions through an origin."""

    origin: torch.Tensor
    """[P]."""
    directions: torch.Tensor
    """[2, P]."""
    explained: float
    """Share of the paths' squared distance from the origin that lies in the plane."""

    def project(self, thetas: torch.Tensor) -> torch.Tensor:
        """Weights [..., P] to coordinates [..., 2]."""
        return (thetas - self.origin) @ self.directions.T

    def lift(self, points: torch.Tensor) -> torch.Tensor:
        """Coordinates [..., 2] to weights [..., P] in the plane."""
        return self.origin + points @ self.directions


def plane(paths: Sequence[torch.Tensor], kind: str = "ends") -> Plane:
    """The plane for paths [T, P] that start at the same weights.

    Args:
        kind: `ends`, through the start and the ends of the first two paths; or `pca`, along which all points spread
            the most. Even a random walk looks smooth in its principal components, so trust their shape less.
    """
    if kind not in PLANES:
        raise UsageError(unknown("plane", kind, PLANES))
    origin = paths[0][0]
    points = torch.cat(list(paths)) - origin
    if kind == "ends":
        spans = torch.stack([path[-1] - origin for path in (paths[0], paths[-1] if len(paths) == 1 else paths[1])])
        middle = (paths[0][len(paths[0]) // 2] - origin)[None]
        directions = _orthonormal(torch.cat([spans.mean(0, keepdim=True), spans[:1] - spans[1:], middle, points]))
    else:
        directions = _orthonormal(torch.linalg.svd(points - points.mean(0), full_matrices=False).Vh[:2])
    total = points.square().sum()
    inside = (points @ directions.T).square().sum()
    return Plane(origin, directions, float(inside / total) if total > 0 else 1.0)


def _orthonormal(candidates: torch.Tensor) -> torch.Tensor:
    """Two orthonormal rows [2, P] from the first candidates that span a plane; any, where they span less."""
    count = candidates.shape[1]
    found: list[torch.Tensor] = []
    for row in torch.cat([candidates, torch.eye(min(3, count), count).to(candidates)]):
        rest = orthogonal_part(torch.stack(found), row) if found else row
        size = torch.linalg.vector_norm(rest)
        if size > 1e-6 * torch.linalg.vector_norm(row):
            found.append(rest / size)
        if len(found) == 2:
            break
    return torch.stack(found) if len(found) == 2 else torch.stack([found[0], torch.zeros_like(found[0])])
