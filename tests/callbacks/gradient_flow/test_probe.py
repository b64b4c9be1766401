"""What is measured, by hand computations, and which trainings can be measured at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, TensorDataset

from neuralode.callbacks import GradientFlowMonitor
from neuralode.callbacks.gradient_flow.probe import probe_batch, training_loss, unable
from neuralode.tasks import Regression
from tests.callbacks.gradient_flow.trainings import (
    SMALL,
    Plain,
    everything,
    fit,
    replayed,
    rows,
    same,
    samples,
    shuffled,
)

pytestmark = pytest.mark.usefixtures("undrawn")
H = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 0.25]], dtype=torch.float64)
LR = 0.1


class Bowl(pl.LightningModule):
    """½θᵀHθ, whatever the batch, times the batch's mean: a step known to the last digit."""

    def __init__(self, theta: tuple[float, ...] = (1.0, -2.0, 3.0), **optimizer: Any):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))
        self.optimizer = {"lr": LR, **optimizer}

    def training_step(self, batch: Any) -> torch.Tensor:  # an index is not needed
        return 0.5 * self.theta @ H @ self.theta * batch[0].mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), **self.optimizer)


def scales(*values: float) -> DataLoader:
    """A batch of one row for each."""
    return DataLoader(TensorDataset(torch.tensor(values, dtype=torch.float64)), batch_size=1)


def scalars(folder: Path, path: str = "sgd") -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for step, where, tag, value in rows(folder):
        if where == path:
            found.setdefault(tag.removeprefix("flow/"), {})[int(step)] = float(value)
    return found


def measured(module: pl.LightningModule, loader: Any, folder: Path, **options: Any) -> dict[str, dict[int, float]]:
    fit(module, loader, GradientFlowMonitor(str(folder), **{**SMALL, "defect_every": 1}), **options)
    return scalars(folder)


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_scalars_of_a_quadratic(tmp_path: Path) -> None:
    found = measured(Bowl(), scales(1.0), tmp_path, max_epochs=7)
    theta = [torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)]
    for _ in range(7):
        theta.append(theta[-1] - LR * H @ theta[-1])
    top = float(torch.linalg.eigvalsh(H)[-1])
    for k in range(7):
        g = H @ theta[k]
        square = float(g @ g)
        assert found["time"][k] == pytest.approx(LR * k)
        assert found["rate"][k] == pytest.approx(LR * square)
        # of the step from k to k + 1
        assert found["defect"][k + 1] == pytest.approx(LR**2 / 2 * float((H @ g).norm()))
        assert found["defect_relative"][k + 1] == pytest.approx(LR / 2 * float((H @ g).norm()) / math.sqrt(square))
        assert found["kappa"][k + 1] == pytest.approx(float(g @ H @ g) / square)
    assert set(found["acceleration"]) == {0, 3, 6}
    assert set(found["sharpness"]) == {0, 3, 6, 7}  # and once more at the end
    for k in (0, 3, 6):
        g, loss = H @ theta[k], float(theta[k] @ H @ theta[k]) / 2
        assert found["acceleration"][k] == pytest.approx(LR**2 * float((H @ g).norm()), rel=1e-6)
        assert found["jerk"][k] == pytest.approx(LR**3 * float((H @ H @ g).norm()), rel=1e-5)
        assert found["jerk_ratio"][k] < 1e-4
        assert found["pl"][k] == pytest.approx(float(g @ g) / (2 * loss))
        assert found["sharpness"][k] == pytest.approx(top, rel=1e-6)
        assert found["threshold"][k] == pytest.approx(2 / LR)
        assert found["stability"][k] == pytest.approx(top * LR / 2, rel=1e-6)


def test_clipping_does_not_change_what_is_measured_of_the_loss(tmp_path: Path) -> None:
    names = ("sharpness", "stability", "acceleration", "jerk", "pl")
    free = measured(Bowl(), scales(1.0), tmp_path / "free", max_epochs=1)
    clipped = measured(Bowl(), scales(1.0), tmp_path / "clipped", max_epochs=1, gradient_clip_val=0.1)
    assert [clipped[name][0] for name in names] == [free[name][0] for name in names]


class Quartic(Bowl):
    """Falls into a valley that gets steeper: L'' rises along the way, by 0.04 for each 0.1 of θ."""

    def training_step(self, batch: Any) -> torch.Tensor:
        return ((2 - self.theta) + (self.theta - 1) ** 3 / 15).sum()


def test_steps_to_the_edge(tmp_path: Path) -> None:
    found = measured(Quartic((1.0,)), scales(1.0), tmp_path, max_epochs=7)
    sharpness, steps = found["sharpness"], found["steps_to_edge"]
    assert 0 not in steps  # nothing to extrapolate from
    for then, now in ((0, 3), (3, 6)):
        pace = (sharpness[now] - sharpness[then]) / (now - then)
        assert steps[now] == pytest.approx((found["threshold"][now] - sharpness[now]) / pace)
        assert steps[now] > 0


def test_loss_floor(tmp_path: Path) -> None:
    for floor, folder in ((0.0, tmp_path / "none"), (-2.0, tmp_path / "floor")):
        monitor = GradientFlowMonitor(str(folder), **SMALL, loss_floor=floor)
        fit(Bowl(), scales(1.0), monitor, max_epochs=1)
    g, loss = H @ Bowl().theta.detach(), 0.5 * float(Bowl().theta.detach() @ H @ Bowl().theta.detach())
    assert scalars(tmp_path / "floor")["pl"][0] == pytest.approx(float(g @ g) / (2 * (loss + 2)))
    assert scalars(tmp_path / "none")["pl"][0] == pytest.approx(float(g @ g) / (2 * loss))


@pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 0.5}])
def test_accumulated_gradients(clip: dict[str, float], tmp_path: Path) -> None:
    """Steps of three batches, and at the end of the epoch of two, whose gradients are divided by three all the same."""
    found = measured(Bowl(), scales(1, 2, 3, 4, 5, 6, 7, 8), tmp_path, max_epochs=1, accumulate_grad_batches=3, **clip)
    assert found["time"] == pytest.approx({k: LR * k for k in range(3)})
    theta = Bowl().theta.detach()
    for k, weight in enumerate([(1 + 2 + 3) / 3, (4 + 5 + 6) / 3, (7 + 8) / 3]):
        g = weight * H @ theta
        step = g * min(1.0, clip.get("gradient_clip_val", math.inf) / float(g.norm()))
        assert found["rate"][k] == pytest.approx(LR * float(g @ g))  # before clipping
        assert found["defect"][k + 1] == pytest.approx(LR / 2 * float((weight * H @ (LR * step)).norm()), rel=1e-5)
        theta = theta - LR * step


def test_defect_with_dropout_and_batch_norm_is_that_of_one_loss(tmp_path: Path) -> None:
    """The masks of training are not known; with one mask for both gradients a short step has a small defect."""

    def defect(lr: float) -> float:
        module = Plain(optimizer=lambda p: torch.optim.SGD(p, lr))
        return measured(module, shuffled(), tmp_path, max_epochs=1)["defect"][1]

    assert defect(1e-3) < 0.02 * defect(1e-2)  # of order η²


# --- the probe -------------------------------------------------------------------------------------------------------


def of(loader: Any) -> Any:
    """A trainer as far as the probe looks."""
    return SimpleNamespace(
        train_dataloader=loader,
        precision_plugin=SimpleNamespace(convert_input=lambda batch: batch),
        strategy=SimpleNamespace(batch_to_device=lambda batch, device: batch),
    )


def test_the_probe_is_a_fixed_sample() -> None:
    x, _ = samples()
    for loader in (shuffled(), replayed()):
        whole, some = probe_batch(of(loader), Plain(), None), probe_batch(of(loader), Plain(), 12)
        assert torch.equal(whole[0], x)
        assert some[0].shape == (12, 3)
        assert some[0].unique(dim=0).shape == (12, 3)
        torch.manual_seed(torch.seed() % 1000)
        assert torch.equal(probe_batch(of(loader), Plain(), 12)[0], some[0])
        assert torch.equal(probe_batch(of(loader), Plain(), 40)[0], x)


class Endless(IterableDataset):
    """Has a length and no index."""

    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Iterator[Any]:
        x, y = samples(20)
        return iter(zip(x, y, strict=True))


class Batches(ConcatDataset):
    """Its entries are batches already."""

    def __getitem__(self, index: int) -> Any:
        x, y = samples()
        return x[10 * index : 10 * index + 10], y[10 * index : 10 * index + 10]

    def __len__(self) -> int:
        return 4


class Pairs:
    """Any iterable of batches serves Lightning."""

    def __iter__(self) -> Iterator[Any]:
        return iter(Batches([[0]])[i] for i in range(4))


@pytest.mark.parametrize(
    "make",
    [lambda: DataLoader(Endless(), batch_size=10), lambda: DataLoader(Batches([[0]]), batch_size=None), Pairs],
    ids=["iterable", "batches", "any"],
)
def test_without_an_index_the_first_batch_is_the_probe(make: Callable, tmp_path: Path) -> None:
    assert probe_batch(of(make()), Plain(), 12) is None
    without = everything(fit(Plain(), make(), max_epochs=2))
    monitor = GradientFlowMonitor(str(tmp_path), **SMALL)
    trainer = fit(Plain(), make(), monitor, max_epochs=2)
    for one, other in zip(everything(trainer)[0].values(), without[0].values(), strict=True):
        assert torch.equal(one, other)
    assert {"loss", "defect", "sharpness", "jerk"} <= set(scalars(tmp_path))
    assert min(scalars(tmp_path)["sharpness"]) == 1


def test_mixed_precision_on_the_cpu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    without = everything(fit(Plain(), shuffled(), precision="bf16-mixed"))
    trainer = fit(Plain(), shuffled(), GradientFlowMonitor(str(tmp_path), **SMALL), precision="bf16-mixed")
    assert torch.equal(everything(trainer)[0]["net.0.weight"], without[0]["net.0.weight"])
    found = scalars(tmp_path)
    assert {"loss", "defect", "sharpness", "distance"} <= set(found)
    assert all(math.isfinite(value) for values in found.values() for value in values.values())


# --- what cannot be measured -----------------------------------------------------------------------------------------


class ByHand(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((self.net(batch[0]) - batch[1]).square().mean())
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (ByHand, "optimises by hand"),
        (lambda: Plain(optimizer=lambda p: torch.optim.LBFGS(p, 0.01)), "the flow of LBFGS is not known"),
        (lambda: Plain(optimizer=lambda p: torch.optim.Adam(p, 0.01, amsgrad=True)), "amsgrad=True is not known"),
        (lambda: Plain(optimizer=lambda p: torch.optim.SGD(p, 0.01, maximize=True)), "maximize=True is not known"),
    ],
)
def test_what_cannot_be_monitored_is_trained(make: Callable, reason: str, tmp_path: Path) -> None:
    without = everything(fit(make(), shuffled(), max_epochs=1))
    with pytest.warns(UserWarning, match="monitor is switched off in step 0: ") as said:
        trainer = fit(make(), shuffled(), GradientFlowMonitor(str(tmp_path), **SMALL), max_epochs=1)
    ours = [str(w.message) for w in said if "switched off" in str(w.message)]
    assert len(ours) == 1
    assert reason in ours[0]
    assert ours[0].count(". ") == 0
    assert trainer.global_step == 4
    assert same(everything(trainer)[0], without[0])


class Strategy:
    """Of a name that is not known."""


def trainer_with(**changed: Any) -> Any:
    known = {"optimizers": [0], "precision": "32-true", "strategy": type("SingleDeviceStrategy", (), {})()}
    return SimpleNamespace(**{"world_size": 1, **known, **changed})


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"optimizers": [0, 1]}, "it has 2 optimisers"),
        ({"optimizers": []}, "it has 0 optimisers"),
        ({"precision": "16-true"}, "weights in 16-true are too coarse"),
        ({"precision": "bf16-true"}, "weights in bf16-true are too coarse"),
        ({"strategy": Strategy()}, "Strategy spreads the weights over processes"),
        ({}, ""),
        ({"precision": "16-mixed"}, ""),
        ({"strategy": type("DDPStrategy", (), {})()}, ""),
        (
            {"strategy": type("DDPStrategy", (), {})(), "world_size": 2},
            "training_step may wait for other processes; give",
        ),
    ],
)
def test_what_is_unable(changed: dict[str, Any], reason: str) -> None:
    said = unable(trainer_with(**changed), Plain(), training_loss)
    assert said.startswith(reason)
    assert bool(said) == bool(reason)
    assert "by hand" in unable(trainer_with(), ByHand(), training_loss)


def test_a_loss_that_waits_for_no_process_is_monitored_under_ddp() -> None:
    trainer = trainer_with(strategy=type("DDPStrategy", (), {})(), world_size=2)
    assert unable(trainer, Plain(), lambda module, batch: module.net(batch[0]).mean()) == ""
    assert unable(trainer, Regression(nn.Linear(3, 1)), training_loss) == ""  # a task of this package
