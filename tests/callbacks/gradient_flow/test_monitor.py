"""The monitor beside training: it leaves no trace, and what fails in it stops nothing."""

from __future__ import annotations

import csv
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from neuralode.callbacks import GradientFlowMonitor
from neuralode.data.loader import EpochOrder, ReplayLoader
from neuralode.errors import UsageError
from neuralode.training import train

SMALL: dict[str, Any] = {"window": 4, "every": 3, "defect_every": 2, "budget": None}
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "log_every_n_steps": 1, "max_epochs": 3,
}  # fmt: skip
MODES = ["window", "piecewise", "global"]


class Plain(pl.LightningModule):
    """Nothing of this package: dropout, batch norm, noise drawn in the step, logging, a tensor or a dict."""

    def __init__(self, returns: str = "tensor", optimizer: Callable[..., Any] | None = None):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))
        self.returns, self.optimizer = returns, optimizer or (lambda p: torch.optim.SGD(p, 0.05, momentum=0.9))

    def training_step(self, batch: Any, index: int) -> Any:
        x, y = batch
        noise = 0.1 * torch.randn_like(x) + 0.01 * random.random() + 0.01 * np.random.rand()  # noqa: NPY002
        loss = (self.net(x + noise) - y).square().mean()
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"train/twice": 2 * loss})
        return loss if self.returns == "tensor" else {"loss": loss, "more": 1}

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


def samples(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, generator=generator)
    return x, x[:, :1] * x[:, 1:2] + 0.1 * torch.randn(count, 1, generator=generator)


def replayed() -> ReplayLoader:
    return ReplayLoader(samples(), EpochOrder(40, 10, shuffle=True, seed=5))


def shuffled() -> DataLoader:
    return DataLoader(TensorDataset(*samples()), batch_size=10, shuffle=True)


def everything(trainer: pl.Trainer) -> list[Any]:
    """Weights, buffers, modes, the optimiser's state and the random states after a run."""
    module, optimizer = trainer.lightning_module, trainer.optimizers[0]
    state = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [{k: v for k, v in optimizer.state[p].items() if v is not None} for p in state]
    numpy_state = [torch.from_numpy(np.random.get_state()[1].copy()), np.random.get_state()[2]]  # noqa: NPY002
    return [
        dict(module.state_dict()), kept, [p.grad for p in state], [part.training for part in module.modules()],
        sorted(module.__dict__), torch.get_rng_state(), numpy_state, random.getstate(),
        {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("flow/")},
    ]  # fmt: skip


def same(one: Any, other: Any) -> bool:
    """Equal bit for bit, down to the tensors."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def fit(module: pl.LightningModule, loader: Any, monitor: pl.Callback | None = None, *others: pl.Callback,
        ckpt_path: Any = None, **options: Any) -> pl.Trainer:  # fmt: skip
    pl.seed_everything(7)
    callbacks = [*others, *([] if monitor is None else [monitor])]
    trainer = pl.Trainer(**{**QUIET, **options}, callbacks=callbacks)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def rows(folder: Path) -> list[tuple[str, str, str, str]]:
    """What `scalars.csv` holds, but for what the clock says."""
    with (folder / "scalars.csv").open(newline="") as file:
        return [tuple(row) for row in list(csv.reader(file))[1:] if row[2] != "flow/overhead"]  # type: ignore[misc]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pictures, which take most of a short run's time."""
    monkeypatch.setattr("neuralode.callbacks.gradient_flow.monitor.draw", lambda *args: None)


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
