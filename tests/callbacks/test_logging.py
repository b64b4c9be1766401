"""What a run leaves in TensorBoard and in its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from neuralode import training
from neuralode.callbacks import PhasePortrait, SolverMonitor
from neuralode.models.classifier import ODEClassifier
from neuralode.nn import ODEBlock
from neuralode.ode import SolverConfig
from neuralode.tasks import Classification
from neuralode.training import train
from neuralode.viz import phase_portrait as viz
from neuralode.viz.scalars import read_scalars

SHORT = ["data.samples=64", "data.batch_size=16", "trainer.max_epochs=3", "monitor.solver_every=1"]


@pytest.fixture
def run(make_config: Callable, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The result of a short run in tmp_path."""

    def go(*overrides: str) -> dict[str, Any]:
        return train(make_config(*SHORT, *overrides, output=tmp_path), tmp_path, [*SHORT, *overrides])

    return go


def tags(folder: Path, plugin: str) -> set[str]:
    files = folder.rglob("events.out.tfevents.*")
    events = (event for file in files for event in EventFileLoader(str(file)).Load())
    return {v.tag for e in events for v in e.summary.value if v.metadata.plugin_data.plugin_name == plugin}


def test_solver_charts_are_those_of_the_steps(run: Callable, tmp_path: Path) -> None:
    run("solver=rk4", "solver.step_size=0.25")
    scalars = read_scalars(tmp_path)
    for tag, value in {"nfe_forward": 16, "nfe_backward": 16, "accepted_steps": 4, "step_size_mean": 0.25}.items():
        steps, values = scalars[f"solver/{tag}"]
        assert list(steps) == list(range(1, 13))
        assert values == pytest.approx(np.full(12, value))
    share = scalars["solver/forward_time_share"][1]
    assert ((share > 0) & (share < 1)).all()


def test_language_run_shows_what_it_would_say_along_the_depth(make_config: Callable, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 100)
    overrides = [
        "data=text", f"data.path={tmp_path / 'text.txt'}", "data.length=8", "model=ode_transformer", "model.width=16",
        "task=language", "monitor=language", "trainer.max_epochs=2",
    ]  # fmt: skip
    result = train(make_config(*overrides, output=tmp_path), tmp_path, overrides)
    assert result["metrics"]["test/bits"] < 4
    assert tags(tmp_path, "images") == {"phase_portrait"}
    for figure in ("phase_portrait", "learning"):
        assert (tmp_path / "figures" / f"{figure}.png").stat().st_size > 1000


def test_result_says_what_the_solves_cost(run: Callable) -> None:
    result = run("solver=rk4", "solver.step_size=0.5", "gradient=adjoint")
    assert result["solver"]["nfe_forward"] == 9  # four stages in two steps, and the slope by which a change is noticed
    assert result["solver"]["nfe_test"] == 8
    assert result["solver"]["nfe_backward"] > 0
    assert result["solver"]["max_jacobian_norm"] > 0


def test_dashboard(run: Callable, tmp_path: Path) -> None:
    result = run()
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "lr-Adam"} <= set(read_scalars(tmp_path))
    assert tags(tmp_path, "images") == {"phase_portrait"}
    assert tags(tmp_path, "hparams") >= {"_hparams_/experiment", "_hparams_/session_start_info"}
    assert tags(tmp_path, "custom_scalars")
    assert read_scalars(tmp_path)["final/accuracy"][1][-1] == pytest.approx(result["metrics"]["test/accuracy"])


def test_portrait_changes_nothing(run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built: list[torch.nn.Module] = []
    build = training.build_task

    def remember(*args: Any) -> Any:
        built.append(build(*args))
        return built[-1]

    monkeypatch.setattr(training, "build_task", remember)
    run("monitor.figure_every=1")
    run("monitor.figure_every=1000")
    for one, other in zip(built[0].parameters(), built[1].parameters(), strict=True):
        assert torch.equal(one, other)
    assert (tmp_path / "figures" / "phase_portrait.png").stat().st_size > 1000


def test_failing_portrait_does_not_stop_the_run(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no canvas")

    monkeypatch.setattr("neuralode.callbacks.phase_portrait.portrait", fail)
    with pytest.warns(UserWarning, match="no canvas"):
        assert run()["steps"] == 12


@pytest.mark.filterwarnings("ignore")
def test_module_of_another_shape(tmp_path: Path) -> None:
    class Own(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.flow = ODEBlock(torch.nn.Linear(2, 2), SolverConfig("rk4", step_size=0.5))
            self.flow.field.eval()  # as a frozen part may be

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.flow(batch).square().mean()

        def test_step(self, batch: torch.Tensor, index: int) -> None:
            self.flow(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    def fit_and_test(module: pl.LightningModule) -> dict[str, float]:
        monitor = SolverMonitor()
        trainer = pl.Trainer(
            max_epochs=2, accelerator="cpu", callbacks=[monitor, PhasePortrait(str(tmp_path), every=1)], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        with pytest.warns(UserWarning, match="portrait could not be drawn") as caught:
            trainer.fit(module, torch.utils.data.DataLoader(torch.ones(4, 2)))
        assert sum("portrait" in str(warning.message) for warning in caught) == 1
        trainer.test(module, torch.utils.data.DataLoader(torch.ones(4, 2)), verbose=False)
        return monitor.summary

    own = Own()
    assert fit_and_test(own)["nfe_test"] == 8
    assert own.training
    assert not own.flow.field.training

    own.model = ODEClassifier(2, 2, SolverConfig("rk4", step_size=0.5))  # but the data is a plain loader
    own.model.block.field.eval()
    assert "max_jacobian_norm" not in fit_and_test(own)
    assert not own.model.block.field.training


def test_portrait_of_a_line_knows_its_whole_way(
    make_config: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[np.ndarray] = []
    figure = viz.regression_figure

    def watch(x: np.ndarray, y: np.ndarray, path: np.ndarray) -> Any:
        drawn.append(path)
        return figure(x, y, path)

    monkeypatch.setattr(viz, "regression_figure", watch)
    overrides = ["+experiment=linear_regression", "trainer.max_epochs=3"]
    train(make_config(*overrides, output=tmp_path), tmp_path, overrides)
    overrides = [*overrides[:1], "trainer.max_epochs=5", f"ckpt_path='{tmp_path}/checkpoints/last.ckpt'"]
    result = train(make_config(*overrides, output=tmp_path), tmp_path, overrides)
    assert drawn[-1].shape == (6, 2)
    assert drawn[-1][0].tolist() == [0.0, 0.0]
    assert drawn[-1][-1].tolist() == [result["weights"]["linear.bias"], result["weights"]["linear.weight"]]


def test_portrait_refuses_a_cadence_of_zero(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="figure_every"):
        PhasePortrait(str(tmp_path), every=0)


def test_early_stopping(run: Callable) -> None:
    # with a learning rate of zero nothing gets better
    result = run("callbacks=early_stopping", "monitor.patience=1", "trainer.max_epochs=9", "optimizer.lr=0.0")
    assert result["epochs"] == 2


def test_more_than_one_logger_or_none(run: Callable, tmp_path: Path) -> None:
    run("logger=none")
    assert not read_scalars(tmp_path)


def test_overfitting_meets_the_same_batches_in_each_epoch(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    measure = Classification.measure

    def watch(task: Classification, batch: Any, stage: str) -> Any:
        if stage == "train":
            seen.append(batch[0])
        return measure(task, batch, stage)

    monkeypatch.setattr(Classification, "measure", watch)
    run("debug=overfit", "trainer.max_epochs=2")
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
