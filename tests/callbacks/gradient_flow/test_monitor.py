"""The monitor beside training: it leaves no trace, and what fails in it stops nothing."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from neuralode.callbacks import GradientFlowMonitor
from neuralode.errors import UsageError
from neuralode.training import train
from tests.callbacks.gradient_flow.trainings import MODES, SMALL, Plain, everything, fit, rows, same, samples, shuffled

# --- no trace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_training_is_untouched(mode: str, tmp_path: Path) -> None:
    without = everything(fit(Plain(), shuffled()))
    monitor = GradientFlowMonitor(str(tmp_path), mode, **SMALL)
    assert same(everything(fit(Plain(), shuffled(), monitor)), without)
    measured = {tag for _, _, tag, _ in rows(tmp_path)}
    assert measured >= {"flow/defect", "flow/sharpness", "flow/jerk", "flow/loss", "flow/distance", "flow/time"}
    assert (tmp_path / "trajectory.png").exists()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("returns", ["tensor", "dict"])
@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.AdamW(p, 0.01), lambda p: torch.optim.Adam(p, 0.01)])
def test_training_with_adam_is_untouched(returns: str, optimizer: Callable, tmp_path: Path) -> None:
    without = everything(fit(Plain(returns, optimizer), shuffled(), gradient_clip_val=0.5))
    monitor = GradientFlowMonitor(str(tmp_path), **SMALL)
    assert same(everything(fit(Plain(returns, optimizer), shuffled(), monitor, gradient_clip_val=0.5)), without)
    assert rows(tmp_path)


class Collecting(Plain):
    """Keeps what its steps found in attributes that change in place, as torchmetrics and many examples do."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[torch.Tensor] = []
        self.total = torch.zeros(())

    def training_step(self, batch: Any, index: int) -> Any:
        loss = super().training_step(batch, index)
        self.outputs.append(loss.detach())
        self.total += loss.detach()
        return loss


@pytest.mark.usefixtures("undrawn")
def test_attributes_that_change_in_place_are_untouched(tmp_path: Path) -> None:
    without = fit(Collecting(), shuffled()).lightning_module
    module = fit(Collecting(), shuffled(), GradientFlowMonitor(str(tmp_path), **SMALL)).lightning_module
    assert same(module.outputs, without.outputs)
    assert torch.equal(module.total, without.total)


class Noisy(TensorDataset):
    """Augments its samples with numbers from the global generators, as torchvision's transforms do."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(3) + 0.1 * random.random() + 0.1 * np.random.rand(), y  # noqa: NPY002


@pytest.mark.usefixtures("undrawn")
def test_samples_that_are_augmented_at_random(tmp_path: Path) -> None:
    loader = DataLoader(Noisy(*samples()), batch_size=10, shuffle=True)
    without = everything(fit(Plain(), loader))
    assert same(everything(fit(Plain(), loader, GradientFlowMonitor(str(tmp_path), **SMALL))), without)


@pytest.mark.usefixtures("undrawn")
def test_names_of_the_module_are_logged_by_training_alone(tmp_path: Path) -> None:
    """Each value once: the monitor's own evaluations of training_step log nothing."""

    def logged(*monitor: pl.Callback) -> list[tuple[Any, dict[str, float]]]:
        found: list[Any] = []
        logger = pl.loggers.CSVLogger(tmp_path / "csv")
        logger.log_metrics = lambda metrics, step=None: found.append((step, dict(metrics)))  # type: ignore[method-assign]
        fit(Plain(), shuffled(), *monitor, logger=logger)
        return [(step, values) for step, values in found if not any(tag.startswith("flow/") for tag in values)]

    assert logged(GradientFlowMonitor(str(tmp_path), **SMALL)) == logged()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("mode", MODES)
def test_a_task_of_this_package_is_untouched(mode: str, make_config: Callable, tmp_path: Path) -> None:
    run = ["data=moons", "data.samples=48", "data.batch_size=16", "trainer.max_epochs=2", "logger=none",
           "solver=rk4", "solver.step_size=0.5", "~callbacks.phase_portrait"]  # fmt: skip
    small = ["callbacks=gradient_flow", f"monitor.flow_mode={mode}", "monitor.flow_every=2", "monitor.flow_window=2",
             "monitor.flow_defect_every=2", "monitor.flow_budget=null"]  # fmt: skip
    found = []
    for name, overrides in (("without", run), ("with", [*run, *small])):
        folder = tmp_path / name
        result = train(make_config(*overrides, output=folder), folder, overrides)
        saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        kept = [saved["state_dict"], saved["optimizer_states"], saved["exact_resume"]["random"]]
        found.append([*kept, result["metrics"], result["solver"]])
    for i, (one, other) in enumerate(zip(*found, strict=True)):
        assert same(one, other), i
    assert "flow/distance" in {tag for _, _, tag, _ in rows(tmp_path / "with" / "gradient_flow")}
    assert {"distance", "sharpness", "stability", "overhead"} <= result["gradient_flow"].keys()


@pytest.mark.usefixtures("undrawn")
def test_its_share_of_the_time_is_one_number(
    make_config: Callable, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = ["data=moons", "data.samples=48", "trainer.max_epochs=2", "logger=none", "~callbacks.phase_portrait",
           "callbacks=gradient_flow", "monitor.flow_every=1", "monitor.flow_budget=null"]  # fmt: skip
    share = train(make_config(*run, output=tmp_path), tmp_path, run)["gradient_flow"]["overhead"]
    said = f"took {100 * share:.1f} % of the training's time"
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "gradient_flow" / "summary.md").read_text()
    written = (tmp_path / "gradient_flow" / "scalars.csv").read_text()
    assert re.findall(r"flow/overhead,(.*)", written) == [repr(share)]


def test_a_gradient_that_is_dampened_away_is_watched_and_drawn(tmp_path: Path) -> None:
    """Nothing enters the momentum after the first step, so that no curvature is too large."""
    module = Plain(optimizer=lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, dampening=1.0))
    fit(module, shuffled(), GradientFlowMonitor(str(tmp_path), **SMALL))
    thresholds = {value for _, _, tag, value in rows(tmp_path) if tag == "flow/threshold"}
    assert thresholds == {"inf"}
    assert "is below (2+2β)/(η(1−d)) = inf; stable, far from the edge." in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "edge.png").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_momentum_that_forgets_nothing_is_watched(tmp_path: Path) -> None:
    module = Plain(optimizer=lambda p: torch.optim.SGD(p, 0.001, momentum=1.0))
    fit(module, shuffled(), GradientFlowMonitor(str(tmp_path), **SMALL))
    steps = [step for step, _, tag, _ in rows(tmp_path) if tag == "flow/sharpness"]
    assert len(steps) > 1


# --- what fails ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("call", [1, 3, 40])
@pytest.mark.parametrize("mode", MODES)
def test_a_failing_loss_switches_the_monitor_off(mode: str, call: int, tmp_path: Path) -> None:
    calls: list[int] = []

    def failing(module: pl.LightningModule, batch: Any) -> torch.Tensor:
        calls.append(1)
        module.eval()
        module.net[1].running_mean.add_(1)
        torch.randn(1), random.random()
        if len(calls) == call:
            raise RuntimeError("no loss today\nand a second line")
        return (module.net(batch[0]) - batch[1]).square().mean()

    without = everything(fit(Plain(), shuffled()))
    monitor = GradientFlowMonitor(str(tmp_path), mode, **SMALL, loss_fn=failing)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = fit(Plain(), shuffled(), monitor)
    ours = [str(w.message) for w in said if "gradient-flow" in str(w.message)]
    assert len(ours) == 1
    assert "switched off in step" in ours[0]
    assert ours[0].endswith("no loss today")
    assert trainer.global_step == 12
    assert same(everything(trainer), without)
    assert len(calls) == call  # nothing was measured from there on


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "windows"}, "'windows'; did you mean 'window'? Allowed: global, piecewise, window."),
        ({"plane": "tsne"}, "unknown monitor.flow_plane 'tsne'"),
        ({"window": 0}, "monitor.flow_window is 0"),
        ({"probe": 0}, "monitor.flow_probe is 0"),
        ({"rtol": 0.0}, "monitor.flow_rtol is 0.0"),
        ({"budget": 0.0}, "monitor.flow_budget is 0.0"),
        ({"every": 0}, "cadence of sharpness is 0"),
        ({"defect_every": 0}, "cadence of defect is 0"),
    ],
)
def test_bad_settings_are_one_sentence(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        GradientFlowMonitor(str(tmp_path), **options)
    assert words in str(error.value)


def test_config_keeps_the_default_callbacks(make_config: Callable, tmp_path: Path) -> None:
    default, ours = make_config().callbacks, make_config("callbacks=gradient_flow").callbacks
    assert set(ours) == {*default, "gradient_flow"}
    assert ours.gradient_flow._target_ == "neuralode.callbacks.GradientFlowMonitor"
    cfg = make_config("callbacks=gradient_flow", "monitor.flow_mode=windows", "logger=none", output=tmp_path)
    with pytest.raises(UsageError, match=r"unknown monitor.flow_mode 'windows'; did you mean 'window'"):
        train(cfg, tmp_path, [])
