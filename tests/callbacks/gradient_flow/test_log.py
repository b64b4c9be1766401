"""Where the monitor writes, and that a resumed run writes what the uninterrupted one does."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from neuralode.callbacks import ExactResume, GradientFlowMonitor
from neuralode.callbacks.gradient_flow.log import FlowLog
from neuralode.viz.scalars import read_scalars
from tests.callbacks.gradient_flow.trainings import (
    MODES,
    SMALL,
    Plain,
    everything,
    fit,
    replayed,
    rows,
    same,
)


def silent(**options: Any) -> pl.Trainer:
    return pl.Trainer(logger=options.pop("logger", False), accelerator="cpu", enable_model_summary=False, **options)


class SaveAt(ExactResume):
    """Saves at the boundary before one step alone, and can end the run some steps later as a crash would."""

    def __init__(self, folder: Path, step: int, crash: int = 10**9):
        super().__init__(str(folder), every_seconds=0)
        self.step, self.crash = step, crash

    def _save(self, trainer: pl.Trainer, finished: bool) -> None:
        if trainer.global_step == self.step and not finished:
            super()._save(trainer, finished)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_batch_start(trainer, *args)
        if trainer.global_step >= self.crash:
            raise KeyError("crash")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("crash", [0, 1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_resumed_run_equals_the_uninterrupted(mode: str, crash: int, tmp_path: Path) -> None:
    def monitor(name: str) -> GradientFlowMonitor:
        return GradientFlowMonitor(str(tmp_path / name), mode, **SMALL)

    whole = fit(Plain(), replayed(), monitor("whole"), SaveAt(tmp_path / "unused", 99))
    assert len(set(rows(tmp_path / "whole"))) == len(rows(tmp_path / "whole"))
    saving = 8  # in the middle of a window from 7 to 11
    with pytest.raises(KeyError, match="crash"):
        fit(Plain(), replayed(), monitor("part"), SaveAt(tmp_path, saving, saving + crash))
    path = tmp_path / "last.ckpt"
    saved = torch.load(path, weights_only=True)["callbacks"]
    state = next(value for key, value in saved.items() if "GradientFlowMonitor" in key)
    assert mode == "global" or state["window"]["active"]
    resumed = fit(Plain(), replayed(), monitor("part"), SaveAt(tmp_path / "unused", 99), ckpt_path=path)
    assert same(everything(resumed)[:2], everything(whole)[:2])
    assert rows(tmp_path / "part") == rows(tmp_path / "whole")


@pytest.mark.usefixtures("undrawn")
def test_resume_before_the_first_step(tmp_path: Path) -> None:
    fit(Plain(), replayed(), GradientFlowMonitor(str(tmp_path / "whole"), **SMALL))
    with pytest.raises(KeyError, match="crash"):
        fit(Plain(), replayed(), GradientFlowMonitor(str(tmp_path / "part"), **SMALL), SaveAt(tmp_path, 0, 2))
    again = GradientFlowMonitor(str(tmp_path / "part"), **SMALL)
    fit(Plain(), replayed(), again, ckpt_path=tmp_path / "last.ckpt")
    assert rows(tmp_path / "part") == rows(tmp_path / "whole")


@pytest.mark.usefixtures("undrawn")
def test_resume_in_another_mode_starts_afresh(tmp_path: Path) -> None:
    fit(Plain(), replayed(), GradientFlowMonitor(str(tmp_path / "flow"), "piecewise", **SMALL), SaveAt(tmp_path, 6))
    monitor = GradientFlowMonitor(str(tmp_path / "flow"), "global", **SMALL)
    fit(Plain(), replayed(), monitor, ckpt_path=tmp_path / "last.ckpt")
    assert monitor.paths is not None
    assert monitor.paths.steps[0] == 6


@pytest.mark.usefixtures("undrawn")
def test_resume_of_a_finished_run_saved_by_hand(tmp_path: Path) -> None:
    trainer = fit(Plain(), replayed(), GradientFlowMonitor(str(tmp_path / "flow"), **SMALL))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    before = rows(tmp_path / "flow")
    again = GradientFlowMonitor(str(tmp_path / "flow"), **SMALL)
    fit(Plain(), replayed(), again, ckpt_path=tmp_path / "end.ckpt", max_epochs=4)
    after = rows(tmp_path / "flow")
    assert after[: len(before)] == before
    times = {int(step): float(value) for step, path, tag, value in after if tag == "flow/time"}
    assert times == pytest.approx({k: 0.05 * k for k in range(16)})


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("mode", MODES)
def test_a_second_fit_goes_on(mode: str, tmp_path: Path) -> None:
    monitor, module = GradientFlowMonitor(str(tmp_path), mode, **SMALL), Plain()
    trainer = fit(module, replayed(), monitor)
    before, share = rows(tmp_path), monitor.governor.spent
    trainer.fit_loop.max_epochs = 6
    trainer.fit(module, replayed())
    after = rows(tmp_path)
    assert after[: len(before)] == before
    times = {int(step): float(value) for step, _, tag, value in after if tag == "flow/time"}
    assert times == pytest.approx({k: 0.05 * k for k in range(24)})
    assert monitor.governor.spent > share
    assert {int(step) for step, _, tag, _ in after if tag == "flow/sharpness"} >= {0, 3, 6, 9, 12, 15, 18, 21, 24}
    assert mode != "global" or monitor.paths.steps == [*range(0, 25, 4)]  # type: ignore[union-attr]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("mode", MODES)
def test_a_fit_of_another_run_starts_afresh(mode: str, tmp_path: Path) -> None:
    used = GradientFlowMonitor(str(tmp_path / "used"), mode, **SMALL)
    fit(Plain(), replayed(), used, max_steps=7)
    fit(Plain(), replayed(), used)
    fresh = GradientFlowMonitor(str(tmp_path / "fresh"), mode, **SMALL)
    fit(Plain(), replayed(), fresh)
    assert rows(tmp_path / "used") == rows(tmp_path / "fresh")
    assert used.summary.keys() == fresh.summary.keys()


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Paired(Plain):
    """Its batches are of a class that no checkpoint can be read with."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return Pair(*batch)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("mode", MODES)
def test_resume_without_the_batches(mode: str, tmp_path: Path) -> None:
    """The probe is drawn again; only a window that needs the batches of its steps begins anew."""

    def monitor(name: str) -> GradientFlowMonitor:
        return GradientFlowMonitor(str(tmp_path / name), mode, **SMALL)

    whole = fit(Paired(), replayed(), monitor("whole"))
    fit(Paired(), replayed(), monitor("part"), SaveAt(tmp_path, 8), max_steps=9)
    resumed = fit(
        Paired(), replayed(), monitor("part"), SaveAt(tmp_path / "unused", 99), ckpt_path=tmp_path / "last.ckpt"
    )
    assert same(everything(resumed)[:2], everything(whole)[:2])
    found = rows(tmp_path / "part")
    if mode == "piecewise":
        windows = [int(step) for step, path, _, _ in found if path == "gradient_flow"]
        assert windows == [*range(5), *range(9, 13)]
    else:
        assert found == rows(tmp_path / "whole")


# --- FlowLog ---------------------------------------------------------------------------------------------------------


def test_sub_runs_have_the_tags_of_the_run(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path / "tb")
    fit(Plain(), replayed(), GradientFlowMonitor(str(tmp_path / "flow"), **SMALL), logger=logger)
    folder = Path(logger.log_dir)
    ours = [(int(step), path, tag, float(value)) for step, path, tag, value in rows(tmp_path / "flow")]
    assert {path for _, path, _, _ in ours} == {"sgd", "gradient_flow", "descent"}
    for path in ("gradient_flow", "descent"):
        found = read_scalars(folder / path)
        tags = {tag for _, p, tag, _ in ours if p == path}
        assert set(found) == tags
        for tag in tags:
            expected = {step: value for step, p, t, value in ours if (p, t) == (path, tag)}
            assert dict(zip(*found[tag], strict=True)) == pytest.approx(expected, rel=1e-6)
    assert "flow/loss" in read_scalars(folder / "gradient_flow")
    run = {tag for _, path, tag, _ in ours if path == "sgd"}
    assert run | {"train/loss_step"} <= set(read_scalars(folder))
    for name in ("trajectory", "curves", "edge", "gauge"):
        assert (tmp_path / "flow" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "sharpness" in (tmp_path / "flow" / "summary.md").read_text()


def test_rows_after_the_resume_point_are_dropped(tmp_path: Path) -> None:
    log = FlowLog(silent(), tmp_path)
    log.scalars(1, {"a": 0.1, "b": 0.2})
    log.scalars(2, {"a": 0.1 + 0.2})
    kept = log.rows
    log.scalars(2, {"late": 1.0})
    log.scalars(3, {"a": 4.0}, "gradient_flow")
    resumed = FlowLog(silent(), tmp_path, resumed_at=2, rows=kept)
    assert resumed.series("a") == ([1, 2], [0.1, 0.1 + 0.2])  # to the last digit
    assert resumed.series("late") == resumed.series("a", "gradient_flow") == ([], [])
    resumed.scalars(3, {"a": 5.0}, "gradient_flow")
    assert resumed.series("a", "gradient_flow") == ([3], [5.0])
    assert FlowLog(silent(), tmp_path).rows == 0  # a new run starts a new file
    assert (tmp_path / "scalars.csv").read_text().split() == ["step,path,tag,value"]


@pytest.mark.parametrize("cut", ["2", "2,sgd", "2,sgd,a", "2,sgd,a,", "2,sgd,a,0."])
def test_half_a_line_is_tolerated(cut: str, tmp_path: Path) -> None:
    log = FlowLog(silent(), tmp_path)
    log.scalars(1, {"a": 1.5})
    with (tmp_path / "scalars.csv").open("a") as file:
        file.write(cut)
    resumed = FlowLog(silent(), tmp_path, resumed_at=1, rows=log.rows)
    assert resumed.series("a") == ([1], [1.5])
    resumed.scalars(2, {"a": 2.5})
    assert resumed.series("a") == ([1, 2], [1.5, 2.5])


def test_a_lost_file_is_begun_again(tmp_path: Path) -> None:
    log = FlowLog(silent(), tmp_path / "elsewhere", resumed_at=7, rows=40)
    log.scalars(8, {"a": float("nan")})
    assert log.series("a")[0] == [8]
    assert log.rows == 1


def test_sub_runs_drop_what_a_killed_run_wrote_beyond(tmp_path: Path) -> None:
    for resumed_at, rows_then, value in ((None, 0, 1.0), (2, 3, 2.0)):
        logger = TensorBoardLogger(tmp_path, name="", version="")
        log = FlowLog(silent(logger=logger), tmp_path / "flow", resumed_at, rows_then)
        for step in range(1, 6) if resumed_at is None else (3,):
            log.scalars(step, {"flow/loss": value}, "gradient_flow")
        log.close()
    steps, values = read_scalars(tmp_path / "gradient_flow")["flow/loss"]
    assert list(steps)[:3] == [1, 2, 3]
    assert list(values)[:3] == [1.0, 1.0, 2.0]
    assert _purges(tmp_path / "gradient_flow") == [3]


def _purges(folder: Path) -> list[int]:
    """Steps at which TensorBoard is told to forget what follows."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.compat.proto.event_pb2 import SessionLog

    events = [event for file in folder.iterdir() for event in EventFileLoader(str(file)).Load()]
    return [e.step for e in events if e.HasField("session_log") and e.session_log.status == SessionLog.START]


def test_loggers_of_several_kinds(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")]
    log = FlowLog(silent(logger=loggers), tmp_path / "flow")
    log.scalars(3, {"flow/defect": 0.5})
    log.scalars(3, {"flow/loss": 0.25}, "gradient_flow")
    log.text(3, "flow/summary", "words")
    log.close()
    for logger in loggers:
        logger.save()
    with next((tmp_path / "csv").rglob("metrics.csv")).open() as file:
        assert next(csv.DictReader(file)) == {"flow/defect": "0.5", "step": "3"}
    assert read_scalars(Path(loggers[1].log_dir) / "gradient_flow")["flow/loss"][1] == [0.25]


def test_no_logger_at_all(tmp_path: Path) -> None:
    log = FlowLog(silent(), tmp_path)
    log.scalars(3, {"flow/defect": 0.5})
    log.scalars(3, {"flow/loss": 0.25}, "gradient_flow")
    log.text(3, "flow/summary", "words")
    log.close()
    assert log.series("flow/loss", "gradient_flow") == ([3], [0.25])
    assert (tmp_path / "summary.md").read_text() == "words\n"
    assert {file.name for file in tmp_path.iterdir()} == {"scalars.csv", "summary.md"}
