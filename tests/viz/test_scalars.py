"""Scalars come back from TensorBoard's files as they were logged."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from neuralode.viz.dashboard import layout
from neuralode.viz.scalars import read_scalars


def log(folder: Path, steps: range, value: float, suffix: str) -> None:
    with SummaryWriter(str(folder), filename_suffix=suffix) as writer:
        for step in steps:
            writer.add_scalar("val/loss", value + step, step)
        writer.add_text("note", "no scalar")


def test_scalars_in_order_of_steps(tmp_path: Path) -> None:
    log(tmp_path / "version_0", range(4), 0.5, ".a")
    curves = read_scalars(tmp_path)
    assert set(curves) == {"val/loss"}
    assert curves["val/loss"][0].tolist() == [0, 1, 2, 3]
    assert curves["val/loss"][1].tolist() == [0.5, 1.5, 2.5, 3.5]


def test_resumed_run_replaces_the_steps_that_it_repeats(tmp_path: Path) -> None:
    log(tmp_path, range(4), 0.5, ".a")
    log(tmp_path, range(2, 6), 100.0, ".b")
    for suffix, when in ((".a", 1000), (".b", 2000)):
        (file,) = tmp_path.glob(f"*{suffix}")
        os.utime(file, (when, when))
    steps, values = read_scalars(tmp_path)["val/loss"]
    assert steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert values.tolist() == [0.5, 1.5, 102.0, 103.0, 104.0, 105.0]


def test_empty_folder(tmp_path: Path) -> None:
    assert read_scalars(tmp_path) == {}


def shown(metric: str, solves: bool, tag: str) -> int:
    """How many charts of the layout show the tag."""
    charts = [tags for group in layout(metric, solves).values() for _, tags in group.values()]
    return sum(any(re.match(pattern, tag) for pattern in tags) for tags in charts)


@pytest.mark.parametrize("metric", ["loss", "accuracy", "mae"])
def test_layout_shows_what_is_logged(metric: str) -> None:
    for tag in ("train/loss", "val/loss", f"val/{metric}", "lr-Adam", "solver/nfe_forward", "solver/rejected_steps"):
        assert shown(metric, True, tag) == 1, tag
    assert shown(metric, True, "train/loss_step") == 0, "the epoch's mean is shown, not each step"
    assert shown(metric, False, "solver/nfe_forward") == 0, "without a solve there is nothing to show of one"
