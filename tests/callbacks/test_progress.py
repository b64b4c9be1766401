"""The lines that a run prints where no terminal shows a bar."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from neuralode.training import train
from neuralode.viz.scalars import read_scalars

SHORT = ["data.samples=64", "data.batch_size=16", "trainer.max_epochs=3"]


def lines(make_config: Callable, capsys: pytest.CaptureFixture, folder: Path, *overrides: str) -> list[str]:
    given = [*SHORT, *overrides]
    train(make_config(*given, output=folder), folder, given)
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]


def test_every_epoch_with_its_own_means(make_config: Callable, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    found = lines(make_config, capsys, tmp_path, "callbacks.progress.every_seconds=0")
    scalars = read_scalars(tmp_path)
    for epoch, line in enumerate(found):
        words = line.split()
        assert words[1] == f"{epoch + 1}/3"
        for metric in ("train/loss", "train/accuracy", "val/loss"):
            assert words[words.index(metric) + 1] == f"{scalars[metric][1][epoch]:.4g}"
    assert len(found) == 3


def test_a_short_run_shows_its_end(make_config: Callable, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (line,) = lines(make_config, capsys, tmp_path)
    assert line.startswith("epoch 3/3  ")


def test_a_resumed_run_goes_on_counting(make_config: Callable, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    lines(make_config, capsys, tmp_path)
    more = [f"ckpt_path='{tmp_path}/checkpoints/last.ckpt'", "callbacks.progress.every_seconds=0"]
    found = lines(make_config, capsys, tmp_path, *more, "trainer.max_epochs=5")
    assert [line.split()[1] for line in found] == ["4/5", "5/5"]
