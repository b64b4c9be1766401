"""The monitor's pictures, from what it measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from neuralode.callbacks.gradient_flow.log import CLOSED_FORM, DESCENT, FLOW, FlowLog
from neuralode.callbacks.gradient_flow.modes import Paths
from neuralode.gradient_flow import GradientField, Plane, plane

_NAMES = {FLOW: "gradient flow", DESCENT: "descent on the probe", CLOSED_FORM: "closed form"}
GRIDS = (25, 9)
"""Losses evaluated along each side of the contours: where one takes little time, and else."""
_FINE = 97
"""Points along each side after smooth interpolation."""


def draw(log: FlowLog, step: int, paths: Paths | None, field: GradientField, kind: str,
         grid: int = GRIDS[-1], optimizer: str = "SGD") -> None:  # fmt: skip
    """Draws what there is: the trajectory, the curves over flow time, sharpness against threshold, the gauge.

    Args:
        kind: of the plane.
        grid: losses along each side of the contours under the trajectory, 0 for none; nine cost some thirty gradients.
        optimizer: its name, for the path that it took.
    """
    from neuralode.viz import gradient_flow as viz  # matplotlib, only when something is drawn

    names = _NAMES | {"sgd": optimizer}
    if paths is not None and len(paths.steps) > 1:
        span = f"steps {paths.steps[0]} to {paths.steps[-1]}"
        thetas = {name: torch.stack(path) for name, path in paths.thetas.items()}
        order = ["sgd", FLOW, *(name for name in thetas if name not in ("sgd", FLOW))]
        found = plane([thetas[name] for name in order], kind)
        flat = {names[name]: found.project(paths.line(name)).cpu().numpy() for name in order}
        under = contours(field, found, flat, grid) if grid else None
        trajectory = viz.trajectory_figure(flat, under, found.explained, f"paths of the weights, {span}")
        log.figure(step, "trajectory", trajectory)
        losses = {names[name]: np.array(paths.losses[name]) for name in order}
        distances = {names[name]: np.array(values) for name, values in paths.distances.items()}
        log.figure(step, "curves", viz.curves_figure(np.array(paths.s), losses, distances, span))
    steps, sharpness = log.series("flow/sharpness")
    if steps:
        _, threshold = log.series("flow/threshold")
        edge = viz.edge_figure(np.array(steps), np.array(sharpness), np.array(threshold), "edge of stability")
        log.figure(step, "edge", edge)
        log.figure(step, "gauge", viz.gauge_figure(sharpness[-1] / threshold[-1], f"stability at step {steps[-1]}"))


def contours(
    field: GradientField, found: Plane, flat: dict[str, Any], grid: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses on a grid in the plane that holds the paths: x [nx], y [ny], loss [ny, nx]."""
    points = np.concatenate(list(flat.values()))
    low, high = points.min(0), points.max(0)
    # a window that is not a slit, for the loss around the paths is what the picture shows
    middle, half = (low + high) / 2, np.maximum((high - low) * 0.65, 0.2 * (high - low).max() + 1e-12)
    axes = [torch.linspace(m - h, m + h, grid, dtype=torch.float64) for m, h in zip(middle, half, strict=True)]
    places = torch.cartesian_prod(*axes).reshape(grid, grid, 2).transpose(0, 1)
    with field.borrowed():
        rows = [[float(field.loss(found.lift(point.to(found.origin)))) for point in row] for row in places]
    coarse = torch.tensor(rows, dtype=torch.float64)
    if torch.isfinite(coarse).all():
        logarithms = bool(coarse.min() > 0)  # in which the contours are even, and nothing overshoots below zero
        # the bottom of a valley is zero, or not, by where the grid happens to meet it
        given = coarse.clamp_min(1e-4 * float(coarse.max())).log() if logarithms else coarse
        fine = F.interpolate(given[None, None], (_FINE, _FINE), mode="bicubic", align_corners=True)[0, 0]
        coarse = fine.exp() if logarithms else fine
        axes = [torch.linspace(float(a[0]), float(a[-1]), _FINE, dtype=torch.float64) for a in axes]
    return axes[0].numpy(), axes[1].numpy(), coarse.numpy()
