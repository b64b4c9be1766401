"""Scalars back from TensorBoard's event files."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def read_scalars(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every scalar logged in the folder: tag -> (steps [K], values [K]), in order of steps.

    A run that was resumed has several event files; where two of them hold the same step, the later one counts.
    """
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    points: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("**/events.out.tfevents.*"), key=lambda f: f.stat().st_mtime):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars" and value.HasField("tensor"):
                    points.setdefault(value.tag, {})[event.step] = float(tensor_util.make_ndarray(value.tensor))
    curves = {}
    for tag, by_step in points.items():
        steps = sorted(by_step)
        curves[tag] = (np.array(steps), np.array([by_step[s] for s in steps]))
    return curves
