"""The paths that are compared, against closed forms, and beside trainings of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from neuralode.callbacks import GradientFlowMonitor
from neuralode.callbacks.gradient_flow.modes import Paths
from tests.callbacks.gradient_flow.trainings import fit, rows, samples

pytestmark = pytest.mark.usefixtures("undrawn")
OPTIONS: dict[str, Any] = {"window": 10, "every": 100, "defect_every": 1, "budget": None, "rtol": 1e-5}


class Fit(pl.LightningModule):
    """A model by mean squared error, in float64, without anything random in a step."""

    def __init__(self, net: nn.Module, optimizer: Callable[..., Any], schedule: Callable[..., Any] | None = None):
        super().__init__()
        self.net, self.optimizer, self.schedule = net.double(), optimizer, schedule

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.net)
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}


def line() -> nn.Linear:
    net = nn.Linear(1, 1)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    return net


def tanh() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))


def sgd(lr: float, **options: Any) -> Callable[..., Any]:
    return lambda net: torch.optim.SGD(net.parameters(), lr, **options)


def textbook() -> TensorDataset:
    """The linear regression of the design page: θ* = (4.21509616, 2.77011339), λ = (0.33942384, 4.13005521)."""
    np.random.seed(42)  # noqa: NPY002 - as the numbers were made
    x = 2 * np.random.rand(100, 1)  # noqa: NPY002
    y = 4 + 3 * x + np.random.randn(100, 1)  # noqa: NPY002
    return TensorDataset(torch.from_numpy(x), torch.from_numpy(y))


def doubles() -> TensorDataset:
    x, y = samples()
    return TensorDataset(x.double(), y.double())


def run(module: pl.LightningModule, data: Any, folder: Path, mode: str = "window", batch_size: int | None = None,
        monitor: dict[str, Any] | None = None, **options: Any) -> GradientFlowMonitor:  # fmt: skip
    ours = GradientFlowMonitor(str(folder), mode, **{**OPTIONS, **(monitor or {})})
    loader = DataLoader(data, batch_size=batch_size or len(data), shuffle=batch_size is not None)
    fit(module, loader, ours, **{"max_epochs": -1, "max_steps": 10, **options})
    assert ours.paths is not None
    return ours


def paths(monitor: GradientFlowMonitor) -> Paths:
    assert monitor.paths is not None
    return monitor.paths


def apart(monitor: GradientFlowMonitor, one: str, other: str) -> float:
    """Largest distance of two paths, over the way that the first goes."""
    a, b = (torch.stack(paths(monitor).thetas[name]) for name in (one, other))
    return float((a - b).norm(dim=1).max() / (a[-1] - a[0]).norm())


# --- window ----------------------------------------------------------------------------------------------------------


def test_window_on_the_linear_regression(tmp_path: Path) -> None:
    monitor = run(Fit(line(), sgd(0.01)), textbook(), tmp_path, monitor={"window": 24, "rtol": 1e-6}, max_steps=24)
    found = paths(monitor)
    assert set(found.thetas) == {"sgd", "gradient_flow", "descent", "closed_form"}
    assert apart(monitor, "sgd", "descent") < 1e-12  # the probe is all there is
    assert apart(monitor, "gradient_flow", "closed_form") < 1e-4
    assert found.distances["sgd"][-1] == pytest.approx(0.0376210, abs=1e-4)
    assert found.steps[0] == 0
    assert found.steps[-1] == 24
    assert found.s == pytest.approx([0.01 * k for k in found.steps])
    assert monitor.summary["distance"] == found.distances["sgd"][-1]
    flow, known = found.line("gradient_flow"), found.line("closed_form")
    assert len(flow) == 8 * (len(found.steps) - 1) + 1, "the picture's line has more points than are compared"
    assert (flow - known).norm(dim=1).max() < 1e-3
    assert len(found.line("descent")) == 25
    assert monitor.summary["distance_relative"] == pytest.approx(found.distances["sgd"][-1] / found.gone[-1])


GROUPS: dict[str, Callable[..., Any]] = {
    "plain": sgd(0.1),
    "momentum": sgd(0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda net: torch.optim.AdamW(net.parameters(), 0.01),
    "groups": lambda net: torch.optim.SGD(
        [{"params": net[2].parameters(), "lr": 0.3}, {"params": net[0].parameters(), "lr": 0.02}], 0.1, momentum=0.5
    ),
}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_clip_val": 0.2}, {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
     {"accumulate_grad_batches": 3}],
    ids=["as_it_is", "clip_norm", "clip_value", "accumulated"],
)  # fmt: skip
def test_the_replica_does_what_training_does(groups: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Where the probe is the training set, also behind a scheduler that acts within the window."""
    halve = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)  # noqa: E731
    batches = ConcatDataset([doubles()] * options.get("accumulate_grad_batches", 1))
    ours = GradientFlowMonitor(str(tmp_path), **OPTIONS)
    loader = DataLoader(batches, batch_size=len(doubles()))
    fit(Fit(tanh(), GROUPS[groups], halve), loader, ours, max_epochs=-1, max_steps=10, **options)
    monitor = ours
    found = paths(monitor)
    assert apart(monitor, "sgd", "descent") < 1e-6  # torch clips by the norm over parameters, the probe over all
    first = found.s[1]
    assert found.s[-1] == pytest.approx(first * (4 + 4 / 2 + 2 / 4))
    if not options:
        assert 1e-6 < apart(monitor, "sgd", "gradient_flow") < 0.9


def test_clipping_matters(tmp_path: Path) -> None:
    clipped = run(Fit(tanh(), sgd(0.1)), doubles(), tmp_path, gradient_clip_val=0.01)
    free = run(Fit(tanh(), sgd(0.1)), doubles(), tmp_path)
    assert paths(clipped).gone[-1] == pytest.approx(10 * 0.1 * 0.01, rel=0.01)
    assert paths(free).gone[-1] > 5 * paths(clipped).gone[-1]


def test_windows_follow_each_other_from_the_present_weights(tmp_path: Path) -> None:
    monitor = run(Fit(tanh(), sgd(0.1)), doubles(), tmp_path, monitor={"window": 5, "every": 3}, max_steps=21)
    at = {int(step) for step, path, tag, _ in rows(tmp_path) if (path, tag) == ("gradient_flow", "flow/loss")}
    assert at == {*range(6), *range(8, 14), *range(16, 22)}
    assert paths(monitor).steps == [16, 17, 18, 19, 20, 21]
    assert paths(monitor).s[0] == pytest.approx(1.6)
    assert torch.equal(paths(monitor).thetas["sgd"][0], paths(monitor).thetas["gradient_flow"][0])


# --- piecewise -------------------------------------------------------------------------------------------------------


def test_piecewise_with_one_full_batch_is_the_windows_flow(tmp_path: Path) -> None:
    window = run(Fit(tanh(), sgd(0.1)), doubles(), tmp_path)
    pieces = run(Fit(tanh(), sgd(0.1)), doubles(), tmp_path, "piecewise")
    assert paths(pieces).steps == paths(window).steps
    assert paths(pieces).distances["sgd"] == pytest.approx(paths(window).distances["sgd"], rel=0.01, abs=1e-9)
    assert paths(pieces).losses["gradient_flow"] == pytest.approx(paths(window).losses["gradient_flow"], rel=1e-4)


def test_piecewise_leaves_discretisation_alone(tmp_path: Path) -> None:
    """Of order η² a step, so of order η at a fixed flow time; the window's distance has the samples' noise in it."""

    def distance(mode: str, lr: float, steps: int) -> float:
        monitor = run(Fit(tanh(), sgd(lr)), doubles(), tmp_path, mode, 5, {"window": steps}, max_steps=steps)
        return max(paths(monitor).distances["sgd"])

    fine = distance("piecewise", 0.00125, 8)
    assert 3.5 < distance("piecewise", 0.0025, 8) / fine < 4.2
    assert 1.7 < distance("piecewise", 0.0025, 4) / fine < 2.3
    assert distance("window", 0.00125, 8) > 3 * fine


def test_pieces_of_accumulated_gradients(tmp_path: Path) -> None:
    """A step takes the mean over its batches, and at an end of an epoch with two for three two thirds of it."""

    def distance(lr: float) -> float:
        steps = run(Fit(tanh(), sgd(lr)), doubles(), tmp_path, "piecewise", 5, accumulate_grad_batches=3, max_steps=6)
        return apart(steps, "sgd", "gradient_flow")

    assert distance(0.01) < 0.02
    assert distance(0.0025) < 0.3 * distance(0.01)


# --- global ----------------------------------------------------------------------------------------------------------


def test_global_on_the_linear_regression(tmp_path: Path) -> None:
    monitor = run(
        Fit(line(), sgd(0.01)), textbook(), tmp_path, "global", monitor={"window": 1, "rtol": 1e-7}, max_steps=40
    )
    found = paths(monitor)
    gaps = dict(zip(found.steps, found.distances["sgd"], strict=True))
    assert found.steps == list(range(41))
    assert max(gaps, key=gaps.__getitem__) == 24
    assert gaps[24] == pytest.approx(0.0376210, abs=2e-5)
    assert max(found.distances["closed_form"]) < 1e-4
    assert all(len(points) <= 32 for points in found.thetas.values())
    assert len(found.line("gradient_flow")) == len(found.line("closed_form")) == 128, "of 8 between two steps"
    assert found.losses["sgd"][0] == pytest.approx(float(textbook().tensors[1].square().mean()))


@pytest.mark.parametrize(("numbers", "points"), [(3 * 31 * 5 + 1, 5), (10, 2)])
def test_global_keeps_to_its_memory(numbers: int, points: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a larger model fewer points, and of the solves that gave them nothing; what is compared is all there."""
    monkeypatch.setattr("neuralode.callbacks.gradient_flow.modes._MOST_NUMBERS", numbers)
    monitor = run(Fit(tanh(), GROUPS["adamw"]), doubles(), tmp_path, "global", monitor={"window": 1}, max_steps=12)
    found = paths(monitor)
    assert found.steps == list(range(13))
    assert len(found.losses["gradient_flow"]) == len(found.distances["sgd"]) == 13
    lines = [*found.thetas.values(), *found.finer.values()]
    assert [len(path) for path in lines] == [points] * 3
    assert all(theta.untyped_storage().nbytes() == 8 * 31 for path in lines for theta in path)
    state = monitor.state_dict()["globally"]
    assert state["z"].untyped_storage().nbytes() == 3 * 8 * 31
    assert all(torch.equal(path[0], found.thetas["sgd"][0]) for path in lines)
    assert found.distances["sgd"][-1] == float((found.thetas["sgd"][-1] - found.line("gradient_flow")[-1]).norm())


@pytest.mark.parametrize("groups", ["momentum", "adamw"])
def test_global_is_one_flow_however_it_is_cut(groups: str, tmp_path: Path) -> None:
    ends = []
    for window in (1, 4, 100):
        monitor = run(Fit(tanh(), GROUPS[groups]), doubles(), tmp_path, "global", monitor={"window": window})
        assert paths(monitor).steps == sorted({0, *range(window, 11, window), 10})
        ends.append(paths(monitor).thetas["gradient_flow"][-1])
    way = float((ends[0] - paths(monitor).thetas["sgd"][0]).norm())
    assert float((ends[0] - ends[2]).norm()) < 1e-3 * way
    assert float((ends[1] - ends[2]).norm()) < 1e-3 * way


def test_global_goes_beside_the_whole_run_under_minibatches(tmp_path: Path) -> None:
    monitor = run(Fit(tanh(), sgd(0.02)), doubles(), tmp_path, "global", 10, {"window": 10}, max_steps=40)
    found = paths(monitor)
    assert found.steps == [0, 10, 20, 30, 40]
    assert found.losses["gradient_flow"] == sorted(found.losses["gradient_flow"], reverse=True)
    assert found.distances["sgd"][-1] < found.gone[-1]
