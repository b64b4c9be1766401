"""What each task measures, by hand, and what the epoch's means are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from neuralode.data import EpochOrder, ReplayLoader
from neuralode.errors import UsageError
from neuralode.models.regression import LinearModel, TwoWeights
from neuralode.models.saved import KEY
from neuralode.tasks import TASKS, Classification, Language, Regression, Task, TrajectoryFitting


class Fixed(nn.Module):
    """Returns what it was given, whatever comes in."""

    def __init__(self, returned: torch.Tensor, scale: torch.Tensor | None = None):
        super().__init__()
        self.returned = nn.Parameter(returned)
        if scale is not None:
            self.register_buffer("scale", scale)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.returned


def quiet(task: Task) -> Task:
    task.log = lambda *a, **k: None  # type: ignore[method-assign]
    return task


def values(measured: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in measured.items()}


def test_every_task_has_a_name() -> None:
    assert set(TASKS.values()) == {Classification, Language, Regression, TrajectoryFitting}


LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [4.0, 0.0]])
CLASSES = torch.tensor([0, 1, 1])
# -log of the softmax at the class, sample by sample
LOSSES = [math.log1p(math.exp(-2)), math.log1p(math.exp(-1)), 4 + math.log1p(math.exp(-4))]


def test_classification() -> None:
    found = values(Classification(Fixed(LOGITS)).measure((torch.zeros(3, 1), CLASSES), "val"))
    assert set(found) == set(Classification.measures)
    assert found == pytest.approx({"loss": sum(LOSSES) / 3, "accuracy": 2 / 3}, rel=1e-6)


def test_label_smoothing_is_for_training_alone() -> None:
    task = Classification(Fixed(LOGITS), label_smoothing=0.2)
    batch = (torch.zeros(3, 1), CLASSES)
    for stage in ("val", "test"):
        assert values(task.measure(batch, stage))["loss"] == pytest.approx(sum(LOSSES) / 3, rel=1e-6)
    # a tenth of each target goes to the other class, whose logit differs by the gap
    gaps = [2.0, 1.0, -4.0]
    smoothed = sum(loss + 0.1 * gap for loss, gap in zip(LOSSES, gaps, strict=True)) / 3
    assert values(task.measure(batch, "train"))["loss"] == pytest.approx(smoothed, rel=1e-6)
    for wrong in (-0.1, 1.0):
        with pytest.raises(UsageError, match=r"label_smoothing is .*\[0, 1\)"):
            Classification(Fixed(LOGITS), label_smoothing=wrong)


def test_language() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0)])
    following = torch.stack([CLASSES, CLASSES.flip(0)])
    found = values(Language(Fixed(logits)).measure((torch.zeros(2, 3), following), "val"))
    assert set(found) == set(Language.measures)
    mean = sum(LOSSES) / 3
    assert found == pytest.approx({"loss": mean, "bits": mean / math.log(2), "accuracy": 2 / 3}, rel=1e-6)


def test_tasks_for_one_class_and_for_many_refuse_each_others_data() -> None:
    one, many = (torch.zeros(3, 1), CLASSES), (torch.zeros(1, 3), CLASSES[None])
    for task, batch in ((Language(Fixed(LOGITS)), one), (Classification(Fixed(LOGITS[None])), many)):
        with pytest.raises(UsageError, match="task=classification takes one class a sample, task=language one a pos"):
            task.measure(batch, "train")


def test_regression() -> None:
    task = Regression(Fixed(torch.tensor([[1.0], [2.0]])))
    found = values(task.measure((torch.zeros(2, 1), torch.tensor([[0.0], [5.0]])), "train"))
    assert found == {"loss": 5.0}
    assert set(found) == set(Regression.measures)
    # would broadcast to [2, 2] and be learned without a word
    with pytest.raises(UsageError, match=r"\(2, 1\) for targets \(2,\)"):
        task.measure((torch.zeros(2, 1), torch.zeros(2)), "train")


def test_squared_loss_is_half_the_sum_over_outputs() -> None:
    batch = (torch.zeros(3, 1), CLASSES)
    task = Classification(Fixed(LOGITS), loss="squared")
    # residuals (1, 0), (0, 0) and (4, −1)
    for stage in ("train", "val"):
        assert values(task.measure(batch, stage)) == pytest.approx({"loss": (1 + 0 + 17) / 2 / 3, "accuracy": 2 / 3})
    task.measure(batch, "train")["loss"].backward()
    torch.testing.assert_close(task.model.returned.grad * 3, torch.tensor([[1.0, 0.0], [0.0, 0.0], [4.0, -1.0]]))
    regression = Regression(Fixed(torch.tensor([[1.0, 2.0], [0.0, 0.0]])), loss="squared")
    targets = torch.tensor([[0.0, 5.0], [0.0, 2.0]])
    assert values(regression.measure((torch.zeros(2, 1), targets), "train")) == {"loss": (10 + 4) / 2 / 2}


def test_squared_loss_keeps_the_precision() -> None:
    logits = LOGITS.double() / 3
    found = Classification(Fixed(logits), loss="squared").measure((torch.zeros(3, 1), CLASSES), "train")["loss"]
    assert found.dtype == torch.float64
    error = logits - torch.eye(2).double()[CLASSES]
    assert found.item() == pytest.approx(error.square().sum().item() / 6, rel=1e-14)


def test_losses_that_cannot_be() -> None:
    with pytest.raises(UsageError, match=r"unknown task.loss 'square'; did you mean 'squared'.*cross_entropy"):
        Classification(Fixed(LOGITS), loss="square")
    with pytest.raises(UsageError, match=r"unknown task.loss 'cross_entropy'.*mse, squared"):
        Regression(Fixed(LOGITS), loss="cross_entropy")
    with pytest.raises(UsageError, match=r"label_smoothing is 0.1.*task.loss=squared"):
        Classification(Fixed(LOGITS), label_smoothing=0.1, loss="squared")


def test_descent_on_two_weights_loses_what_the_flow_conserves() -> None:
    lr, x, y = 0.05, 1.3, 0.6
    model = TwoWeights().double()
    task = Regression(model, loss="squared")
    optimizer = torch.optim.SGD(task.parameters(), lr=lr)
    batch = tuple(torch.tensor([[value]], dtype=torch.float64) for value in (x, y))
    for _ in range(50):
        a, b = model.a.item(), model.b.item()
        optimizer.zero_grad()
        task.measure(batch, "train")["loss"].backward()
        optimizer.step()
        factor = 1 - (lr * (a * b * x - y) * x) ** 2
        assert model.a.item() ** 2 - model.b.item() ** 2 == pytest.approx(factor * (a**2 - b**2), rel=1e-12, abs=1e-12)


TIMES = torch.tensor([0.0, 1.0, 2.0, 3.0])
RECORD = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [4.0, 40.0], [8.0, 80.0]]])  # [1, 4, 2]
# off by 1, 1, 2 and 4 times (1, 10) in turn
PREDICTED = RECORD + torch.tensor([1.0, 1.0, 2.0, 4.0])[:, None] * torch.tensor([1.0, 10.0])


def trajectory(loss: str = "mse", train_until: float | None = 2.0) -> TrajectoryFitting:
    return TrajectoryFitting(Fixed(PREDICTED, torch.tensor([1.0, 10.0])), loss, train_until=train_until)


@pytest.mark.parametrize(
    ("loss", "fitted"),
    [
        ("mse", (1 + 1 + 4) / 3),
        ("mae", (1 + 1 + 2) / 3),
        ("log_mse", (math.log(2) ** 2 + 2 * math.log(1.5) ** 2) / 3),
    ],
)
def test_trajectory_loss_is_of_the_fitted_times_in_units_of_the_scale(loss: str, fitted: float) -> None:
    for stage in ("train", "val", "test"):
        assert values(trajectory(loss).measure((RECORD, TIMES), stage))["loss"] == pytest.approx(fitted, rel=1e-5)


def test_trajectory_errors_are_in_the_units_of_the_data() -> None:
    wanted = {"mae": 5.5 * 8 / 4, "fit_mae": 5.5 * 4 / 3, "forecast_mae": 5.5 * 4}
    found = values(trajectory().measure((RECORD, TIMES), "test"))
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert set(trajectory().measure((RECORD, TIMES), "val")) == {"loss", "mae"} == set(TrajectoryFitting.measures)
    assert set(trajectory(train_until=None).measure((RECORD, TIMES), "test")) == {"loss", "mae"}
    assert values(trajectory("mae", None).measure((RECORD, TIMES), "val"))["loss"] == pytest.approx(2.0)


def test_trajectory_starts_at_the_first_point() -> None:
    class Still(nn.Module):
        def forward(self, y0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return y0[:, None].expand(-1, len(t), -1)

    found = values(TrajectoryFitting(Still(), "mae").measure((RECORD, TIMES), "train"))
    assert found["loss"] == pytest.approx(5.5 * (0 + 1 + 3 + 7) / 4)


def test_unknown_trajectory_loss() -> None:
    with pytest.raises(UsageError, match=r"task.loss 'log_mae'; did you mean"):
        trajectory("log_mae")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_is_refused(value: float) -> None:
    task = quiet(Regression(Fixed(torch.tensor([[value]]))))
    with pytest.raises(UsageError, match=rf"the loss is {value} in step 0.*learning rate"):
        task.training_step((torch.zeros(1, 1), torch.zeros(1, 1)), 0)


def test_training_step_returns_the_loss_with_its_graph() -> None:
    model = Fixed(torch.tensor([[3.0]]))
    loss = quiet(Regression(model)).training_step((torch.zeros(1, 1), torch.zeros(1, 1)), 0)
    loss.backward()
    assert loss.item() == 9.0
    assert model.returned.grad.item() == 6.0


def fit(task: Task, targets: torch.Tensor, size: int, folder: Path, **trainer: Any) -> pl.Trainer:
    order = EpochOrder(len(targets), size, shuffle=True, seed=0)
    runner = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, **{"max_epochs": 1, **trainer},
    )  # fmt: skip
    loader = ReplayLoader((torch.ones_like(targets), targets), order)
    runner.fit(task, loader, ReplayLoader((torch.ones_like(targets), targets), order))
    return runner


def sgd(lr: float) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


@pytest.mark.filterwarnings("ignore")
def test_means_of_an_epoch_are_over_samples(tmp_path: Path) -> None:
    targets = torch.arange(7.0)[:, None]  # batches of 3, 3 and 1
    found = fit(Regression(LinearModel(1), sgd(0.0)), targets, 3, tmp_path).callback_metrics  # it predicts zero
    assert float(found["train/loss"]) == pytest.approx(float((targets**2).mean()))
    assert float(found["val/loss"]) == pytest.approx(float((targets**2).mean()))


@pytest.mark.filterwarnings("ignore")
def test_scheduler_is_made_of_the_optimizer_and_steps(tmp_path: Path) -> None:
    made: list[torch.optim.lr_scheduler.LRScheduler] = []

    def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        made.append(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
        return made[-1]

    task = Regression(nn.Linear(1, 1), sgd(1e-3), scheduler, interval="step")
    fit(task, torch.ones(6, 1), 2, tmp_path)
    assert made[0].get_last_lr() == pytest.approx([1e-3 / 8])


@pytest.mark.filterwarnings("ignore")
def test_scheduler_that_watches_the_validation_steps_with_it(tmp_path: Path) -> None:
    made: list[torch.optim.lr_scheduler.ReduceLROnPlateau] = []

    def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
        made.append(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))
        return made[-1]

    task = Regression(nn.Linear(1, 1), sgd(1e-3), scheduler, scheduler_monitor="val/loss")
    fit(task, torch.ones(6, 1), 2, tmp_path, max_epochs=5, check_val_every_n_epoch=2)
    assert made[0].last_epoch == 2


def test_checkpoint_carries_the_description_and_the_sums_so_far() -> None:
    task = quiet(Regression(Fixed(torch.tensor([[3.0]])), description={"model": "fixed"}))
    task.training_step((torch.zeros(1, 1), torch.zeros(1, 1)), 0)
    checkpoint: dict[str, Any] = {}
    task.on_save_checkpoint(checkpoint)
    assert checkpoint[KEY] == {"model": "fixed"}
    assert checkpoint["epoch_so_far"]["samples"] == 1
    assert float(checkpoint["epoch_so_far"]["sums"]["loss"]) == 9.0


def test_warm_up_fits_the_first_points_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Watching(torch.nn.Module):
        def forward(self, y0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            seen.append(len(t))
            return y0[:, None].expand(-1, len(t), -1)

    task = TrajectoryFitting(Watching(), warmup_steps=2, warmup_points=2)
    for step in range(4):
        monkeypatch.setattr(TrajectoryFitting, "global_step", step)
        task.measure((RECORD, TIMES), "train")
        task.measure((RECORD, TIMES), "val")
    whole = len(TIMES)
    assert seen == [2, whole, 2, whole, whole, whole, whole, whole]
